"""Encodes a folder of images into cached latents: on several processes, and resumable after any kill."""

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

from sit_atconv.data.codecs import WHERE_FROM, Codec, Precision, open_codec, typed_codec
from sit_atconv.data.image_rules import RULES
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_extension import arrange
from sit_atconv.data.latent_folder import (
    INDEX,
    PREVIEW,
    LatentFolder,
    LatentIndex,
    LatentSettings,
    Shard,
    ShardReport,
    features_of,
    find_index,
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
from sit_atconv.data.pixels import CROP_RULE, encode_jpegs, to_float, to_uint8
from sit_atconv.encoders.by_name import canonical, identity_of, open_encoder
from sit_atconv.encoders.image_encoder import ImageEncoder
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.devices import keep_freed_memory, on_cpu, share_cores, usable_cores
from sit_atconv.runtime.files import PARTIAL, check_room, gigabytes
from sit_atconv.runtime.plots import save_sample_grid
from sit_atconv.runtime.processes import held_by_main, share, together


@dataclass(frozen=True)
class EncodeOptions:
    """The options of `encode.py`; its help explains them and its parser has the defaults."""

    images: str
    out: Path
    vae: str
    image_size: int
    dtype: str
    mirror: bool
    batch_size: int
    shard_mib: float
    precision: Precision
    slicing: bool
    tiling: bool
    pixels: str
    features: str | None
    features_weights: str | None
    features_grid: int | None
    skip_unreadable: bool
    keep_empty_classes: bool
    extend: bool
    max_megapixels: float
    num_workers: int | None
    cpu_threads: int | None


@dataclass(frozen=True)
class Job:
    """The task of one encoding process."""

    options: EncodeOptions
    images: ImageFolder
    codec: Codec
    encoder: ImageEncoder | None  # of --features
    folder: LatentFolder
    state: PartialState


class Pictures(Dataset):
    """Images that are read without raising errors, for a DataLoader.

    Item i is the image, uint8 (3, H, W), then True if it was enlarged, then the reason why it is not an image, then the
    reason why its file cannot be read; "" without such a reason. An image that cannot be read is zeros, so that its
    batch keeps its shape and the other latents stay bitwise the same.
    """

    def __init__(self, images: ImageFolder):
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, bool, str, str]:
        zeros = torch.zeros(3, self.images.image_size, self.images.image_size, dtype=torch.uint8)
        try:
            pixels, size = self.images.read_with_size(index)
            return pixels, min(size) < self.images.image_size, "", ""
        except OSError as error:
            return zeros, False, "", str(error)
        except Exception as error:  # any error of one file is reported with its name, and the others are read
            return zeros, False, str(error) or f"cannot be read as an image: {type(error).__name__}", ""


def encode_images(options: EncodeOptions, patch_sizes: Sequence[int] = ()) -> tuple[LatentIndex, float]:
    """Encodes the missing shards of a folder of latents, on all processes together, and writes its index.

    The bytes depend neither on the number of processes nor on kills (but a VAE's last bits on the number of threads).

    Args:
        options: those of the command.
        patch_sizes: those of the presets; a warning is printed if none of them divides the latents.

    Returns:
        The index, and the number of images encoded per second, 0 if there was nothing to encode.

    Raises:
        ValueError: unusable images, VAE or image size, or `out` holds something else, is in use, or has too little
            free disk space.
        OSError: images that cannot be read (all of them are named), shards that cannot be written or are damaged.
    """
    _check_out(options)
    known = newest_settings(options.out)
    images = ImageFolder(
        options.images,
        options.image_size,
        rules=known.rules if known else RULES,
        keep_empty_classes=options.keep_empty_classes,
        max_megapixels=options.max_megapixels,
    )
    codec = open_codec(
        typed_codec(options.vae, images.channels),
        "encoding begins",
        options.precision,
        slicing=options.slicing,
        tiling=options.tiling,
        remedy=WHERE_FROM,
    )
    encoder = _open_encoder(options, codec)
    settings = latent_settings(options, images, codec, encoder)
    images, settings = arrange(images, settings, options.out, extend=options.extend)
    folder = LatentFolder(options.out, settings)
    may_skip = options.skip_unreadable or options.extend  # --extend never changes existing shards
    missing = folder.missing(may_skip)
    index = None if missing else _finished(folder)
    room = settings.bytes_per_image * sum(len(folder.images(number)) for number in missing)
    check_room(folder.path, room)
    if is_main_process():
        print("\n".join(describe_images(images, settings, patch_sizes)), file=sys.stderr)
    if index:
        return index, 0.0

    state = PartialState(cpu=on_cpu(), timeout=timedelta(days=7))  # a process may wait long for another's last shard
    if state.device.type == "cpu":
        share_cores(options.cpu_threads)
        keep_freed_memory()
    if encoder is not None:
        encoder.to(state.device)
    job = Job(options, images, codec.to(state.device), encoder, folder, state)
    with held_by_main(folder.path, state):
        if state.is_main_process:
            for partial in folder.path.glob(f"{PARTIAL}*"):  # left by a process that was killed
                partial.unlink()
            if not _outlasts(folder, missing):
                (folder.path / INDEX).unlink(missing_ok=True)
            print(
                f"encoding {len(images)} images of {len(images.class_names)} classes into {folder.path}, "
                f"{state.num_processes} x {state.device.type}: {folder.num_shards - len(missing)} of "
                f"{folder.num_shards} shards are there, the others take {gigabytes(room)}",
                file=sys.stderr,
            )
        state.wait_for_everyone()
        missing = folder.missing(may_skip)
        state.wait_for_everyone()  # no process writes before all have the same list to share
        rate = _encode_missing(job, missing)
        _complete(job)
        state.wait_for_everyone()
    return read_index(folder.path), rate


def _finished(folder: LatentFolder) -> LatentIndex | None:
    """Returns the index if it describes the shards in the folder, else None: then it is written again."""
    index = find_index(folder.path)
    if not index or index.settings != folder.settings or index.unwanted_classes:
        return None
    sizes = [folder.shard(number).stat().st_size for number in range(folder.num_shards)]
    return index if [entry["bytes"] for entry in index.shards] == sizes else None


def _outlasts(folder: LatentFolder, missing: list[int]) -> bool:
    """True if all shards of the index exist: then it stays valid until the index of all parts replaces it."""
    index = find_index(folder.path)
    to_make = {folder.shard(number).name for number in missing}
    return bool(
        index and index.settings in folder.settings.parts and not to_make & {entry["file"] for entry in index.shards}
    )


def _open_encoder(options: EncodeOptions, codec: Codec) -> ImageEncoder | None:
    """Opens the image encoder of --features, for as many tokens as a model of patch size 2 has by default."""
    if options.features is None:
        if options.features_weights or options.features_grid:
            raise ValueError(
                "--features-weights and --features-grid are for --features: give it too, or leave them out"
            )
        return None
    side = options.features_grid or max(1, codec.latent_size(options.image_size) // 2)
    shape = (3, options.image_size, options.image_size)
    return open_encoder(options.features, options.features_weights, (side, side), shape)


def latent_settings(
    options: EncodeOptions, images: ImageFolder, codec: Codec, encoder: ImageEncoder | None = None
) -> LatentSettings:
    """Returns the settings of a new folder. ValueError: the codec cannot encode images of this size."""
    features: dict = {}
    if encoder is not None:
        grid = [encoder.grid_size[0], encoder.grid_size[1]]
        name, weights = canonical(str(options.features)), identity_of(options.features_weights)
        features = {"encoder": name, "weights": weights, "grid_size": grid, "width": encoder.width}
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
        pixels="" if options.pixels == "none" else options.pixels,
        features=features,
    )
    batches = int(options.shard_mib * 2**20) // (settings.bytes_per_image * options.batch_size)
    return dataclasses.replace(settings, images_per_shard=max(1, batches) * options.batch_size)


def _check_out(options: EncodeOptions) -> None:
    """Raises ValueError if `out` is among the images, or holds something else or a later version's index."""
    if options.out.is_file():
        raise ValueError(f"{options.out} is a file: give another --out")
    if options.out.resolve().is_relative_to(Path(options.images).resolve()):
        raise ValueError(f"{options.out} is inside {options.images} and would count as images: give another --out")
    ours = re.compile(rf"shard-\d+\.safetensors|{INDEX}|{PREVIEW}|\.lock|{re.escape(PARTIAL)}.*")
    for path in options.out.iterdir() if options.out.exists() else ():
        if not ours.fullmatch(path.name):
            raise ValueError(f"{options.out} holds something else ({path.name}): give another --out")
    find_index(options.out)  # checked before any process changes the folder


def _encode_missing(job: Job, missing: list[int]) -> float:
    """Encodes this process's share of the shards.

    Returns:
        The number of images that all processes together encode per second.

    Raises:
        OSError: on all processes, with the faults that any of them found.
    """
    folder, images = job.folder, job.images
    mine = share(missing, job.state)
    batches = (list(batch) for number in mine for batch in folder.batches(number))
    loader = iter(
        DataLoader(
            Pictures(images),
            batch_sampler=batches,
            pin_memory=job.state.device.type == "cuda",
            num_workers=_num_workers(job.options),
            worker_init_fn=leave_ctrl_c_to_the_parent,
        )
    )
    several = job.state.num_processes > 1
    progress = tqdm(
        total=sum(len(folder.images(number)) for number in mine),
        unit="image",
        disable=not job.state.is_main_process,
        desc=f"encoding, process 1 of {job.state.num_processes}" if several else "encoding",
    )
    unreadable, clock = [], time.perf_counter()
    with together() as faults, progress:
        for number in mine:
            shard, wrong = _encode_shard(job, number, loader, progress)
            unreadable += [f"{images.where(name)} {why}" for name, why in shard.skipped.items()]
            faults += wrong
            if faults:
                break
            if job.options.skip_unreadable or not shard.skipped:
                folder.write(number, shard.tensors, shard.names, shard.skipped, shard.enlarged)
    rate = sum(len(folder.images(number)) for number in missing) / (time.perf_counter() - clock)
    if (unreadable := sorted(gather_object(unreadable))) and not job.options.skip_unreadable:
        raise OSError(
            "\n".join(
                [
                    f"{len(unreadable)} images cannot be read: fix them and run the same command again, "
                    "or give --skip-unreadable to leave them out",
                    *unreadable,
                ]
            )
        )
    return rate


def _encode_shard(job: Job, number: int, loader: Iterator, progress: tqdm) -> tuple[Shard, list[str]]:
    """Encodes the next batches of the loader as a shard. Also returns faults that must stop the command."""
    settings, indices = job.folder.settings, job.folder.images(number)
    reasons, faults, enlarged = list[str](), list[str](), 0
    parts: dict[str, list[Tensor]] = {kind: [] for kind in settings.kinds}
    beside: dict[str, list[Tensor]] = {features_of(kind): [] for kind in parts if job.encoder is not None}
    crops = list[Tensor]()
    for _ in job.folder.batches(number):
        pixels, small, why, wrong = next(loader)
        enlarged += int(small.sum())
        reasons += why
        faults += filter(None, wrong)
        x = to_float(pixels.to(job.state.device, non_blocking=True))
        read = torch.tensor([not reason for reason in why])
        for kind in parts:
            seen = x.flip(-1) if kind == "mirrored" else x
            parts[kind].append(job.codec.encode(seen).to(settings.torch_dtype).cpu()[read])
            if job.encoder is not None:
                with torch.no_grad():
                    beside[features_of(kind)].append(job.encoder(seen).half().cpu()[read])
        if settings.pixels:
            crops.append(pixels[read])
        progress.update(len(why))
    tensors = {kind: torch.cat(values).contiguous() for kind, values in (parts | beside).items()}
    kept = [i for i, reason in zip(indices, reasons, strict=True) if not reason]
    names = [job.images.name(i) for i in kept]
    skipped = {job.images.name(i): reason for i, reason in zip(indices, reasons, strict=True) if reason}
    finite = torch.stack([tensors[kind].isfinite().flatten(1).all(1) for kind in parts]).all(0).tolist()
    faults += [
        f"{job.images.where(name)}: its latents are too large for {job.options.dtype}: give --dtype float32, "
        "or --precision fp32 if they are too large for the VAE's own arithmetic"
        for name, fits in zip(names, finite, strict=True)
        if not fits
    ]
    faults += [
        f"{job.images.where(name)}: its features of {job.options.features} are not finite in float16: store --pixels "
        "instead"
        for kind in beside
        for name, fits in zip(names, tensors[kind].isfinite().flatten(1).all(1).tolist(), strict=True)
        if not fits
    ]
    if settings.pixels == "uint8":
        tensors["pixels"] = torch.cat(crops).contiguous()
    elif settings.pixels == "jpeg":
        tensors |= encode_jpegs(torch.cat(crops))
    tensors["labels"] = torch.from_numpy(job.images.labels)[kept]
    counted = enlarged if settings.rules > 1 else None  # shards of older folders keep their bytes
    return Shard(tensors, names, skipped, job.folder.places[number][0].as_dict(), counted), faults


def _num_workers(options: EncodeOptions) -> int:
    if options.num_workers is not None:
        return options.num_workers
    return max(1, min(8, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _complete(job: Job) -> None:
    """Checks all shards, shared by the processes, and writes preview and index. Raises the faults found."""
    reports = []
    with together() as faults:
        for number in share(range(job.folder.num_shards), job.state):
            report = inspect_shard(job.folder.shard(number), job.folder.settings, len(job.images.class_names))
            faults += [f"{fault}: delete that file and run the same command again" for fault in report.faults]
            reports.append(report)
    reports = sorted(gather_object(reports), key=lambda report: report.entry["file"])
    class_names, counts = list(job.images.class_names), sum_counts(reports)
    if not any(counts):
        raise ValueError(f"none of the {len(job.images)} images of {job.images.where()} can be read")
    if (empty := show_empty_classes(class_names, counts)) and not job.options.keep_empty_classes:
        raise ValueError(f"{empty}: fix or add images and run the same command again, or give --keep-empty-classes")
    with together():
        if job.state.is_main_process:
            _draw_preview(job, reports)
            job.folder.write_index(job.codec.name, class_names, reports, job.options.keep_empty_classes)


def _draw_preview(job: Job, reports: list[ShardReport], columns: int = 5) -> None:
    """Saves a picture of some images above their decoded latents, not flipped and flipped."""
    kinds, pictures = job.folder.settings.kinds, Pictures(job.images)
    tiles, labels = list[Tensor](), list[int]()
    ends = list(itertools.accumulate(report.entry["num_images"] for report in reports))
    for index in np.linspace(0, ends[-1] - 1, min(columns, ends[-1])).astype(int).tolist():
        number, place = locate(ends, index)
        shard = open_shard(job.folder.shard(number))
        kept = [i for i in job.folder.images(number) if job.images.name(i) not in shard.skipped]
        tiles.append(pictures[kept[place]][0])
        for kind in kinds:
            moments = shard.tensors[kind][place][None].to(job.state.device)
            z = job.codec.latents(moments, torch.Generator(job.state.device).manual_seed(0))
            tiles.append(to_uint8(job.codec.decode(z))[0].expand(3, -1, -1).cpu())
        labels += range(1 + len(kinds))
    save_sample_grid(
        [tile.permute(1, 2, 0).numpy() for tile in tiles],
        labels,
        ["image", *(f"decoded {kind}" for kind in kinds)],
        job.folder.path / PREVIEW,
        "images and their decoded latents",
    )
