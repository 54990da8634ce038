"""From a folder of images to a folder of latents: shared by several processes, and resumed after any kill."""

import dataclasses
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
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

from sit_atconv.data.codecs import WHERE_FROM, Codec, open_codec, typed_codec
from sit_atconv.data.images import RULES, ImageFolder
from sit_atconv.data.latent_extension import arrange
from sit_atconv.data.latent_folder import (
    INDEX,
    PREVIEW,
    LatentFolder,
    LatentIndex,
    LatentSettings,
    ShardReport,
    inspect_shard,
    locate,
    newest_settings,
    open_shard,
    read_index,
    show_empty_classes,
    sum_counts,
)
from sit_atconv.data.latent_summary import describe_images
from sit_atconv.data.loading import leave_ctrl_c_to_the_parent
from sit_atconv.data.pixels import CROP_RULE, to_float, to_uint8
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.devices import keep_freed_memory, on_cpu, share_cores
from sit_atconv.runtime.files import PARTIAL, check_room, gigabytes
from sit_atconv.runtime.plots import save_sample_grid
from sit_atconv.runtime.processes import held_by_main, share, together


@dataclass(frozen=True)
class EncodeOptions:
    """What to encode; the help of `encode.py` says what each option means, and has the defaults."""

    images: str
    out: Path
    vae: str
    image_size: int
    dtype: str
    mirror: bool
    batch_size: int
    shard_mib: float
    precision: str
    slicing: bool
    tiling: bool
    skip_unreadable: bool
    keep_empty_classes: bool
    extend: bool
    max_megapixels: float
    num_workers: int | None
    cpu_threads: int | None


@dataclass(frozen=True)
class Job:
    """What is encoded, by what, into what; and which of several processes this is."""

    options: EncodeOptions
    images: ImageFolder
    codec: Codec
    folder: LatentFolder
    state: PartialState


@dataclass(frozen=True)
class EncodedShard:
    """What `LatentFolder.write` wants, and what must not be left out but stops the work: a disk that fails, ..."""

    tensors: dict[str, Tensor]
    names: list[str]
    skipped: dict[str, str]
    enlarged: int
    faults: list[str]


class Pictures(Dataset):
    """Image i as uint8 (3, H, W), whether it was enlarged to that, and why it is no image, and why its file cannot be
    read; "" where all is well.

    An image that cannot be read is zeros, so that its batch keeps its shape and the others' bits stay the same.
    """

    def __init__(self, images: ImageFolder):
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, bool, str, str]:
        nothing = torch.zeros(3, self.images.image_size, self.images.image_size, dtype=torch.uint8)
        try:
            pixels, size = self.images.read_with_size(index)
            return pixels, min(size) < self.images.image_size, "", ""
        except OSError as error:
            return nothing, False, "", str(error)
        except Exception as error:  # whatever one file does, the others are read and it is named
            return nothing, False, str(error) or f"cannot be read as an image: {type(error).__name__}", ""


def encode_images(options: EncodeOptions, patch_sizes: Sequence[int] = ()) -> tuple[LatentIndex, float]:
    """Encodes what is missing of a folder of latents, on all processes together, and completes it with its index.

    Neither the number of processes nor a kill on the way changes a byte (but for the last bits of a VAE's arithmetic
    with another number of threads).

    Args:
        options: as asked for.
        patch_sizes: of the models that are likely to be trained: it is said if none of them fits the latents.

    Returns:
        The index, and the images encoded a second: 0 where all was there.

    Raises:
        ValueError: images, VAE or size that cannot be; a folder that holds something else or is in use; too little
            room; images that cannot be read, all of them named.
        OSError: what could not be written, or is damaged.
    """
    _check_out(options)
    known = newest_settings(options.out)
    images = ImageFolder(options.images, options.image_size, rules=known.rules if known else RULES,
                         keep_empty_classes=options.keep_empty_classes,
                         max_megapixels=options.max_megapixels)
    codec = open_codec(typed_codec(options.vae, images.channels), "encoding begins", options.precision,
                       slicing=options.slicing, tiling=options.tiling, remedy=WHERE_FROM)
    images, settings = arrange(images, latent_settings(options, images, codec), options.out, extend=options.extend)
    folder = LatentFolder(options.out, settings)
    may_skip = options.skip_unreadable or options.extend  # which leaves existing shards as they are
    missing = folder.missing(may_skip)
    index = None if missing else _finished(folder)
    room = folder.settings.bytes_per_image * sum(len(folder.images(number)) for number in missing)
    check_room(folder.path, room)
    if is_main_process():
        print("\n".join(describe_images(images, settings, patch_sizes)), file=sys.stderr)
    if index:
        return index, 0.0

    state = PartialState(cpu=on_cpu(), timeout=timedelta(days=7))  # one may wait long for another's last shard
    if state.device.type == "cpu":
        share_cores(options.cpu_threads)
        keep_freed_memory()
    job = Job(options, images, codec.to(state.device), folder, state)
    with held_by_main(folder.path, state):
        if state.is_main_process:
            for partial in folder.path.glob(f"{PARTIAL}*"):  # of a process that was killed
                partial.unlink()
            if not _outlasts(folder, missing):
                (folder.path / INDEX).unlink(missing_ok=True)
            print(f"encoding {len(images)} images of {len(images.class_names)} classes into {folder.path}, "
                  f"{state.num_processes} x {state.device.type}: {folder.num_shards - len(missing)} of "
                  f"{folder.num_shards} shards are there, the others take {gigabytes(room)}", file=sys.stderr)
        state.wait_for_everyone()
        missing = folder.missing(may_skip)
        state.wait_for_everyone()  # all have listed them before one writes: all share out the same
        rate = _encode_missing(job, missing)
        _complete(job)
        state.wait_for_everyone()
    return read_index(folder.path), rate


def _finished(folder: LatentFolder) -> LatentIndex | None:
    """Returns the index if it is that of the shards which are there; a damaged one is made again."""
    try:
        index = read_index(folder.path)
    except ValueError:
        return None
    sizes = [folder.shard(number).stat().st_size for number in range(folder.num_shards)]
    fits = index.settings == folder.settings and [entry["bytes"] for entry in index.shards] == sizes
    return index if fits and not index.unwanted_classes else None


def _outlasts(folder: LatentFolder, missing: list[int]) -> bool:
    """Whether the index is that of shards which are all there: it is valid until that of all parts replaces it."""
    try:
        index = read_index(folder.path)
    except ValueError:
        return False
    to_make = {folder.shard(number).name for number in missing}
    return index.settings in folder.settings.parts and not to_make & {entry["file"] for entry in index.shards}


def latent_settings(options: EncodeOptions, images: ImageFolder, codec: Codec) -> LatentSettings:
    """ValueError: the codec cannot encode images of this size."""
    settings = LatentSettings(
        num_images=len(images),
        files=images.files_sha256(),
        image_size=options.image_size,
        crop=CROP_RULE,
        codec=codec.identity(),
        precision=options.precision,
        slicing=options.slicing,
        tiling=options.tiling,
        mirrored=options.mirror,
        dtype=options.dtype,
        moments_shape=list(codec.stored_shape(options.image_size)),
        batch_size=options.batch_size,
        images_per_shard=options.batch_size,
        rules=images.rules,
    )
    batches = int(options.shard_mib * 2**20) // (settings.bytes_per_image * options.batch_size)
    return dataclasses.replace(settings, images_per_shard=max(1, batches) * options.batch_size)


def _check_out(options: EncodeOptions) -> None:
    """Raises ValueError where the folder holds something else, or lies among the images."""
    if options.out.is_file():
        raise ValueError(f"{options.out} is a file: give another --out")
    if options.out.resolve().is_relative_to(Path(options.images).resolve()):
        raise ValueError(f"{options.out} lies in {options.images} and would count among the images: give another --out")
    ours = re.compile(rf"shard-\d+\.safetensors|{INDEX}|{PREVIEW}|\.lock|{re.escape(PARTIAL)}.*")
    for path in options.out.iterdir() if options.out.exists() else ():
        if not ours.fullmatch(path.name):
            raise ValueError(f"{options.out} holds something else ({path.name}): give another --out")


def _encode_missing(job: Job, missing: list[int]) -> float:
    """Encodes this process's part. Returns the images a second of all; raises on all processes what one found."""
    mine = share(missing, job.state)
    batches = [batch for number in mine for batch in job.folder.batches(number)]
    loader = iter(DataLoader(Pictures(job.images), batch_sampler=batches, pin_memory=job.state.device.type == "cuda",
                             num_workers=_num_workers(job.options), worker_init_fn=leave_ctrl_c_to_the_parent))
    several = job.state.num_processes > 1
    progress = tqdm(total=sum(map(len, batches)), unit="image", disable=not job.state.is_main_process,
                    desc=f"encoding, process 1 of {job.state.num_processes}" if several else "encoding")
    unreadable, clock = [], time.perf_counter()
    with together() as faults, progress:
        for number in mine:
            shard = _encode_shard(job, number, loader, progress)
            unreadable += [f"{job.images.folder / name} {why}" for name, why in shard.skipped.items()]
            faults += shard.faults
            if faults:
                break
            if job.options.skip_unreadable or not shard.skipped:
                enlarged = shard.enlarged if job.folder.settings.rules > 1 else None  # older folders keep their bytes
                job.folder.write(number, shard.tensors, shard.names, shard.skipped, enlarged)
    rate = sum(len(job.folder.images(number)) for number in missing) / (time.perf_counter() - clock)
    if (unreadable := sorted(gather_object(unreadable))) and not job.options.skip_unreadable:
        raise OSError("\n".join([f"{len(unreadable)} images cannot be read: mend them and run the same command again, "
                                 "or give --skip-unreadable to leave them out", *unreadable]))
    return rate


def _encode_shard(job: Job, number: int, loader: Iterator, progress: tqdm) -> EncodedShard:
    """Takes the shard's batches from the loader."""
    indices, reasons, faults, enlarged = job.folder.images(number), [], [], 0
    parts = {kind: [] for kind in job.folder.settings.kinds}
    for _ in job.folder.batches(number):
        pixels, small, why, wrong = next(loader)
        enlarged += int(small.sum())
        reasons += why
        faults += filter(None, wrong)
        x = to_float(pixels.to(job.state.device, non_blocking=True))
        read = torch.tensor([not reason for reason in why])
        for kind in parts:
            moments = job.codec.encode(x.flip(-1) if kind == "mirrored" else x)
            parts[kind].append(moments.to(job.folder.settings.torch_dtype).cpu()[read])
        progress.update(len(why))
    tensors = {kind: torch.cat(moments).contiguous() for kind, moments in parts.items()}
    kept = [i for i, reason in zip(indices, reasons, strict=True) if not reason]
    names = [job.images.name(i) for i in kept]
    skipped = {job.images.name(i): reason for i, reason in zip(indices, reasons, strict=True) if reason}
    finite = torch.stack([moments.isfinite().flatten(1).all(1) for moments in tensors.values()]).all(0).tolist()
    faults += [f"{job.images.folder / name}: its latents do not fit into {job.options.dtype}: give --dtype float32, or "
               "--precision fp32 if they do not fit into the VAE's arithmetic"
               for name, fits in zip(names, finite, strict=True) if not fits]
    labels = torch.from_numpy(job.images.labels)[kept]
    return EncodedShard(tensors | {"labels": labels}, names, skipped, enlarged, faults)


def _num_workers(options: EncodeOptions) -> int:
    if options.num_workers is not None:
        return options.num_workers
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _complete(job: Job) -> None:
    """Reads all shards again, each process some, and writes preview and index. Raises where something is wrong."""
    reports = []
    with together() as faults:
        for number in share(range(job.folder.num_shards), job.state):
            try:
                report = inspect_shard(job.folder.shard(number), job.folder.settings, len(job.images.class_names))
            except (ValueError, OSError) as error:
                report = ShardReport({}, [], {}, None, [str(error)])
            faults += [f"{fault}: delete that file and run the same command again" for fault in report.faults]
            reports.append(report)
    reports = sorted(gather_object(reports), key=lambda report: report.entry["file"])
    class_names, counts = list(job.images.class_names), sum_counts(reports)
    if not any(counts):
        raise ValueError(f"none of the {len(job.images)} images of {job.images.folder} can be read")
    if (empty := show_empty_classes(class_names, counts)) and not job.options.keep_empty_classes:
        raise ValueError(f"{empty}: mend or add images and run the same command again, or give --keep-empty-classes")
    with together():
        if job.state.is_main_process:
            _draw_preview(job, reports)
            job.folder.write_index(job.codec.name, class_names, reports, job.options.keep_empty_classes)


def _draw_preview(job: Job, reports: list[ShardReport], columns: int = 5) -> None:
    """Some images, from all over the set, above what is decoded from their latents and from those of their mirror."""
    rows = {"image": []} | {f"decoded {kind}": [] for kind in job.folder.settings.kinds}
    pictures = Pictures(job.images)
    ends = list(itertools.accumulate(report.entry["num_images"] for report in reports))
    for index in np.linspace(0, ends[-1] - 1, min(columns, ends[-1])).astype(int).tolist():
        number, place = locate(ends, index)
        shard = open_shard(job.folder.shard(number))
        kept = [i for i in job.folder.images(number) if job.images.name(i) not in shard.skipped]
        rows["image"].append(pictures[kept[place]][0])
        for kind in job.folder.settings.kinds:
            moments = shard.tensors[kind][place][None].to(job.state.device)
            z = job.codec.latents(moments, torch.Generator(job.state.device).manual_seed(0))
            rows[f"decoded {kind}"].append(to_uint8(job.codec.decode(z))[0].expand(3, -1, -1).cpu())
    pixels = torch.stack([image for row in rows.values() for image in row]).permute(0, 2, 3, 1).numpy()
    labels = [label for label, row in enumerate(rows.values()) for _ in row]
    save_sample_grid(pixels, labels, list(rows), job.folder.path / PREVIEW, "images, and what their latents decode to")
