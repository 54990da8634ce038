"""From a folder of images to a folder of latents: shared by several processes, and gone on with after any kill."""

import contextlib
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sit_atconv.commands import is_main_process
from sit_atconv.data import DEFAULT_VAE
from sit_atconv.data.codecs import VAECodec
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import (
    DTYPES,
    INDEX,
    PREVIEW,
    Layout,
    as_tensor,
    inspect_shard,
    open_shard,
    read_index,
)
from sit_atconv.data.pixels import CROP_RULE, read_image, to_float, to_uint8
from sit_atconv.devices import keep_freed_memory, on_cpu, share_cores
from sit_atconv.files import PARTIAL, check_room, exclusive, gigabytes
from sit_atconv.pictures import save_sample_grid


@dataclass(frozen=True)
class EncodeOptions:
    """What to encode; the help of `encode.py` says what each option means."""

    images: str
    out: Path
    vae: str = DEFAULT_VAE
    image_size: int = 256
    dtype: str = "float16"
    mirror: bool = True
    batch_size: int = 32
    shard_mib: float = 128
    precision: str = "tf32"
    slicing: bool = False
    tiling: bool = False
    skip_unreadable: bool = False
    num_workers: int | None = None
    cpu_threads: int | None = None


class Pictures(Dataset):
    """Image i as uint8 (3, H, W), and ""; of an unreadable one zeros, so that its batch keeps its shape, and why."""

    def __init__(self, images: ImageFolder):
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.images.read(index), ""
        except ValueError as error:
            return torch.zeros(3, self.images.image_size, self.images.image_size, dtype=torch.uint8), str(error)


def encode_images(options: EncodeOptions) -> tuple[dict, float]:
    """Encodes what is missing of a folder of latents, on all processes together, and completes it with its index.

    Neither the number of processes nor a kill on the way changes a byte (but for the last bits of a VAE's arithmetic
    with another number of threads).

    Returns:
        The index, and the images encoded a second: 0 where all was there.

    Raises:
        ValueError: images, VAE or size that cannot be; a folder that holds something else or is in use; too little
            room; images that cannot be read, all of them named.
        OSError: a shard that could not be written.
    """
    images = ImageFolder(options.images, options.image_size)
    codec = VAECodec(options.vae, options.precision, slicing=options.slicing, tiling=options.tiling)
    layout = Layout(options.out, _settings(options, images, codec))
    _check_folder(options)
    missing = layout.missing()
    if not missing and (layout.folder / INDEX).exists():
        with contextlib.suppress(ValueError):  # a damaged index is made again
            return read_index(layout.folder), 0.0
    room = _bytes_per_image(layout.settings) * sum(len(layout.images(shard)) for shard in missing)
    check_room(options.out, room)

    with exclusive(options.out) if is_main_process() else contextlib.nullcontext():
        state = PartialState(cpu=on_cpu(), timeout=timedelta(days=7))  # one may wait long for another's last shard
        if state.device.type == "cpu":
            share_cores(options.cpu_threads)
            keep_freed_memory()
        if state.is_main_process:
            for partial in options.out.glob(f"{PARTIAL}*"):  # of a process that was killed
                partial.unlink()
            print(f"encoding {len(images)} images of {len(images.class_names)} classes into {options.out}, "
                  f"{state.num_processes} x {state.device.type}: {layout.num_shards - len(missing)} of "
                  f"{layout.num_shards} shards are there, the others take {gigabytes(room)}", file=sys.stderr)
        state.wait_for_everyone()
        missing = layout.missing()
        state.wait_for_everyone()
        codec = codec.to(state.device)
        rate = _encode_shards(missing, layout, images, codec, options, state)
        _complete(layout, images, codec, options, state)
        state.wait_for_everyone()
    return read_index(options.out), rate


def _settings(options: EncodeOptions, images: ImageFolder, codec: VAECodec) -> dict:
    """All that the bytes of the shards depend on. ValueError: the VAE cannot encode images of this size."""
    size = codec.latent_size(options.image_size)
    settings = {
        "images": len(images),
        "files": images.files_sha256(),
        "image_size": options.image_size,
        "crop": CROP_RULE,
        "codec": {key: value for key, value in codec.describe().items() if key != "source"},
        "precision": options.precision,
        "slicing": options.slicing,
        "tiling": options.tiling,
        "mirrored": options.mirror,
        "dtype": options.dtype,
        "moments_shape": [2 * codec.channels, size, size],
        "batch_size": options.batch_size,
    }
    batches = int(options.shard_mib * 2**20) // (_bytes_per_image(settings) * options.batch_size)
    return settings | {"images_per_shard": max(1, batches) * options.batch_size}


def _bytes_per_image(settings: dict) -> int:
    moments = math.prod(settings["moments_shape"]) * DTYPES[settings["dtype"]].itemsize
    return moments * (2 if settings["mirrored"] else 1) + 128  # and its name and label


def _check_folder(options: EncodeOptions) -> None:
    """Raises ValueError where the folder holds something else, or the images."""
    if options.out.is_file():
        raise ValueError(f"{options.out} is a file: give another --out")
    if options.out.resolve().is_relative_to(Path(options.images).resolve()):
        raise ValueError(f"{options.out} lies in {options.images} and would count among the images: give another --out")
    ours = re.compile(rf"shard-\d+\.safetensors|{INDEX}|{PREVIEW}|\.lock|{re.escape(PARTIAL)}.*")
    for path in options.out.iterdir() if options.out.exists() else ():
        if not ours.fullmatch(path.name):
            raise ValueError(f"{options.out} holds something else ({path.name}): give another --out")


def _encode_shards(
    missing: list[int], layout: Layout, images: ImageFolder, codec: VAECodec, options: EncodeOptions,
    state: PartialState,
) -> float:
    """Encodes this process's part and returns the images a second of all. Raises on all processes what one found."""
    mine = missing[state.process_index :: state.num_processes]
    batches = [batch for shard in mine for batch in layout.batches(shard)]
    workers = _share_of_cores(options.num_workers)
    loader = iter(DataLoader(Pictures(images), batch_sampler=batches, num_workers=workers,
                             pin_memory=state.device.type == "cuda"))
    unreadable, faults, clock = [], [], time.perf_counter()
    which = f"encoding, process 1 of {state.num_processes}" if state.num_processes > 1 else "encoding"
    with tqdm(total=sum(map(len, batches)), unit="image", desc=which, disable=not state.is_main_process) as progress:
        for shard in mine:
            tensors, reasons = _encode_shard(len(layout.batches(shard)), loader, codec, options, progress)
            indices = layout.images(shard)
            skipped = {images.name(i): reason for i, reason in zip(indices, reasons, strict=True) if reason}
            read = [i for i, reason in zip(indices, reasons, strict=True) if not reason]
            unreadable += skipped.items()
            for name, values in tensors.items():
                finite = values.isfinite().flatten(1).all(1).tolist()
                faults += [f"{images.name(i)}: its {name} exceed {options.dtype}, give --dtype float32"
                           for i, fits in zip(read, finite, strict=True) if not fits]
            if faults or (skipped and not options.skip_unreadable):
                continue
            tensors["labels"] = torch.from_numpy(images.labels[read])
            try:
                layout.write(shard, tensors, [images.name(i) for i in read], skipped)
            except OSError as error:
                faults.append(str(error))
                break
    rate = sum(len(layout.images(shard)) for shard in missing) / (time.perf_counter() - clock)
    _stop_on([] if options.skip_unreadable else unreadable, faults, options)
    return rate


def _encode_shard(num_batches: int, loader, codec: VAECodec, options: EncodeOptions, progress: tqdm):
    """The next batches of the loader -> moments of those that could be read, and for each image why not, or ""."""
    stored, reasons = {"moments": [], **({"mirrored": []} if options.mirror else {})}, []
    for _ in range(num_batches):
        pixels, why = next(loader)
        reasons += why
        x = to_float(pixels.to(codec.device, non_blocking=True))
        read = torch.tensor([not reason for reason in why])
        for name, parts in stored.items():
            moments = codec.encode(x.flip(-1) if name == "mirrored" else x)
            parts.append(moments.to(DTYPES[options.dtype]).cpu()[read])
        progress.update(len(why))
    return {name: torch.cat(parts).contiguous() for name, parts in stored.items()}, reasons


def _complete(
    layout: Layout, images: ImageFolder, codec: VAECodec, options: EncodeOptions, state: PartialState
) -> None:
    """Reads all shards again, each process some, and writes preview and index. Raises where something is wrong."""
    entries, skipped, faults = [], [], []
    for shard in range(layout.num_shards)[state.process_index :: state.num_processes]:
        entry, wrong = inspect_shard(layout.path(shard), layout.settings, len(images.class_names))
        entries.append(entry)
        skipped += open_shard(layout.path(shard)).skipped.items()
        faults += [f"{fault}: delete it and run the same command again" for fault in wrong]
    _stop_on([] if options.skip_unreadable else skipped, faults, options)
    entries, skipped = sorted(gather_object(entries), key=lambda entry: entry["file"]), sorted(gather_object(skipped))
    if not any(entry["images"] for entry in entries):
        raise ValueError(f"none of the {len(images)} images of {options.images} can be read")
    if state.is_main_process:
        _draw_preview(layout, [entry["images"] for entry in entries], images, codec)
        layout.write_index(options.vae, list(images.class_names), entries, dict(skipped))


def _stop_on(unreadable: list[tuple[str, str]], faults: list[str], options: EncodeOptions) -> None:
    """Raises on every process, and says there, what any of them found."""
    unreadable, faults = sorted(gather_object(unreadable)), sorted(gather_object(faults))
    if faults:
        raise OSError("\n".join(faults))
    if unreadable:
        named = "".join(f"\n{Path(options.images, name)} {reason}" for name, reason in unreadable)
        raise ValueError(f"{len(unreadable)} images cannot be read: mend them and run the same command again, or give "
                         f"--skip-unreadable to leave them out{named}")


def _share_of_cores(num_workers: int | None) -> int:
    if num_workers is not None:
        return num_workers
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _draw_preview(layout: Layout, sizes: list[int], images: ImageFolder, codec: VAECodec, columns: int = 5) -> None:
    """Some images, from all over the set, above what is decoded from their latents and from those of their mirror."""
    kinds = ["moments", "mirrored"] if layout.settings["mirrored"] else ["moments"]
    rows = {"image": []} | {f"decoded {name}": [] for name in kinds}
    ends = np.cumsum(sizes)
    for position in np.linspace(0, ends[-1] - 1, min(columns, ends[-1])).astype(int):
        number = int(np.searchsorted(ends, position, side="right"))
        shard = open_shard(layout.path(number))
        place = position - ends[number]  # from the end, as negative numbers count
        rows["image"].append(read_image(images.folder / shard.names[place], images.image_size))
        for name in kinds:
            moments = as_tensor(shard.arrays[name][place], layout.settings["dtype"])
            z = codec.latents(moments[None].to(codec.device), torch.Generator(codec.device).manual_seed(0))
            rows[f"decoded {name}"].append(to_uint8(codec.decode(z))[0].cpu())
    pixels = torch.stack([image for row in rows.values() for image in row]).permute(0, 2, 3, 1).numpy()
    labels = [label for label, row in enumerate(rows.values()) for _ in row]
    save_sample_grid(pixels, labels, list(rows), layout.folder / PREVIEW, "images, and what their latents decode to")
