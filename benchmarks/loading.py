"""Benchmark of reading training data: cached latents, images, or both in turn.

    python benchmarks/loading.py --latents LATENTS --images DIR DIR.zip wids:SHARDS hf:NAME --image-size 256
    python benchmarks/loading.py --random-gb 10
    python benchmarks/loading.py --entries 1281167

Prints JSON: samples per second (median and all rounds), seconds to the first batch, private memory of the workers.
"""

import functools
import json
import math
import os
import re
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import active_children
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm, trange

from sit_atconv.data.data_source import DataSource
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import LatentFolder, LatentSettings, inspect_shard
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.loading import Batch, leave_ctrl_c_to_the_parent, load_batches
from sit_atconv.data.order import BatchOrder
from sit_atconv.data.stores import open_store
from sit_atconv.data.tar_archives import CACHE
from sit_atconv.runtime.commands import ArgumentParser, at_least, positive, run_command, user_errors
from sit_atconv.runtime.files import check_room


def measure_loading(
    sources: Mapping[str, Callable[[], DataSource]],
    *,
    batch_size: int = 256,
    num_workers: int = 2,
    rounds: int = 5,
    seconds: float = 3.0,
    mirror: bool = True,
    cold_folders: Iterable[Path] = (),
) -> dict[str, dict]:
    """Measures reading each source in training's order; every round reads each source for some seconds.

    Args:
        sources: maps the name of each source to a function that opens it.
        num_workers: number of processes that read; with 0, this process reads, and its memory is measured.
        seconds: duration of one measurement of one source.
        cold_folders: folders that are removed from the system's file cache before each measurement.

    Returns:
        For each source: `samples` in total, `samples_per_second` (median of `rounds`, which holds all), seconds from
        opening it to its first batch (`startup_seconds`), and the largest sum over its workers of the memory that they
        do not share with this process (`private_mib`), None if the system does not report it.

    Raises:
        ValueError: a source cannot be opened or read, or is smaller than a batch.
    """
    loaders: dict[str, Iterator[Batch]] = {}
    pids: dict[str, list[int | str | None]] = {}
    found: dict[str, dict] = {}
    for name, open_source in sources.items():
        clock, others = time.perf_counter(), {*active_children()}
        data = open_source()
        order = BatchOrder(len(data), batch_size, seed=0, mirror=mirror)
        loaders[name] = load_batches(data, order, num_workers, torch.device("cpu"), leave_ctrl_c_to_the_parent)
        next(loaders[name])
        found[name] = {
            "samples": len(data),
            "samples_per_second": 0.0,
            "rounds": [],
            "startup_seconds": time.perf_counter() - clock,
            "private_mib": None,
        }
        pids[name] = [worker.pid for worker in {*active_children()} - others] if num_workers else ["self"]
    for name in tqdm(list(sources) * rounds, unit="round"):
        for _ in range(2 * num_workers):  # batches that were read ahead while another source was timed
            next(loaders[name])
        for folder in cold_folders:
            forget_files(folder)
        clock, count, speed = time.perf_counter(), 0, found[name]
        while time.perf_counter() - clock < seconds:
            next(loaders[name])
            count += batch_size
        speed["rounds"].append(count / (time.perf_counter() - clock))
        speed["samples_per_second"] = median(speed["rounds"])
        speed["private_mib"] = max(speed["private_mib"] or 0.0, sum(map(private_mib, pids[name]))) or None
    return found


def forget_files(folder: Path) -> None:
    """Removes a folder's files from the system's file cache, so that they are read from disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not yet on the disk cannot be removed
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def private_mib(pid: int | str | None) -> float:
    """Returns the memory that a process has written to and shares with no other; 0 if not reported."""
    usage = Path("/proc", str(pid), "smaps_rollup")
    found = re.search(r"Private_Dirty:\s+(\d+) kB", usage.read_text()) if usage.exists() else None
    return int(found[1]) / 1024 if found else 0.0


def write_random_latents(folder: Path, num_images: int, moments_shape: tuple[int, int, int] = (8, 32, 32)) -> None:
    """Writes a folder of random latents, float16, with their horizontal flips, for measuring."""
    settings = LatentSettings(
        num_images,
        files="random",
        image_size=8 * moments_shape[-1],
        crop="none",
        codec={},
        precision="fp32",
        slicing=False,
        tiling=False,
        mirrored=True,
        dtype="float16",
        moments_shape=list(moments_shape),
        batch_size=32,
        images_per_shard=4096,
    )
    check_room(folder, num_images * settings.bytes_per_image)
    folder.mkdir(parents=True, exist_ok=True)
    num_classes = min(10, num_images)
    latents, reports, generator = LatentFolder(folder, settings), [], torch.Generator().manual_seed(0)
    for number in trange(latents.num_shards, unit="shard", desc="writing random latents"):
        images = latents.images(number)
        tensors = {
            kind: torch.randn((len(images), *moments_shape), generator=generator).to(torch.float16)
            for kind in settings.kinds
        }
        labels = torch.tensor(images) % num_classes
        latents.write(number, tensors | {"labels": labels}, list(map(str, images)), {})
        reports.append(inspect_shard(latents.shard(number), settings, num_classes))
    latents.write_index("random", list(map(str, range(num_classes))), reports)


def write_many_entries(folder: Path, num_images: int) -> list[str]:
    """Writes small images of 1,000 classes into a zip and a tar archive, and returns the places of both."""
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(num_images)]
    picture = b"P5 16 16 255\n" + bytes(256)
    with zipfile.ZipFile(folder / "many.zip", "w") as archive:
        for name in tqdm(names, unit="image", desc="writing a zip archive"):
            archive.writestr(zipfile.ZipInfo(name), picture)
    with (folder / "many.tar").open("wb") as archive:
        for name in tqdm(names, unit="image", desc="writing a tar archive"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            archive.write(info.tobuf() + picture.ljust(512, b"\0"))
        archive.write(bytes(1024))
    return [str(folder / "many.zip"), str(folder / "many.tar")]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if not (options.latents or options.images or options.random_gb or options.entries):
        parser.error("give --latents, --images, --random-gb or --entries")
    with user_errors(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        sources: dict[str, Callable[[], DataSource]] = {}
        if options.latents:
            sources["latents"] = lambda: CachedLatents(options.latents, options.mirror)
        if options.random_gb:
            write_random_latents(Path(scratch), math.ceil(options.random_gb * 1e9 / (2 * 2 * 8 * 32 * 32)))
            sources["random latents"] = lambda: CachedLatents(scratch)
        if options.entries:
            places = write_many_entries(Path(scratch), options.entries)
            os.environ[CACHE] = scratch
            list(map(open_store, places))  # lists the tar archive, which later openings need not do
            options.images += places
        for place in options.images:
            sources[place] = functools.partial(ImageFolder, place, options.image_size)
        folders = [Path(folder) for folder in (options.latents, options.random_gb and scratch) if folder]
        found = measure_loading(
            sources,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            rounds=options.rounds,
            seconds=options.seconds,
            mirror=options.mirror,
            cold_folders=folders if options.cold else (),
        )
    print(json.dumps(found, indent=1))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage="python benchmarks/loading.py [--latents LATENTS] [--images PLACE ...] [--random-gb GB] [options]",
        description="Measures how fast training data are read, in training's order and with random horizontal flips.",
    )
    parser.add_argument("--latents", default=None, help="folder of latents written by encode.py")
    parser.add_argument("--images", metavar="PLACE", nargs="+", default=[], help="images, named as for training")
    parser.add_argument(
        "--entries",
        type=at_least(1),
        metavar="N",
        help="write N small images into a zip and a tar archive, and read them",
    )
    parser.add_argument("--image-size", type=at_least(1), default=256, metavar="PX", help="image side in pixels")
    parser.add_argument(
        "--random-gb",
        type=positive,
        default=None,
        metavar="GB",
        help="write random latents of shape 32x32x4, of this total size, and measure them",
    )
    parser.add_argument("--scratch", default=None, metavar="DIR", help="folder for the random latents")
    parser.add_argument("--no-mirror", dest="mirror", action="store_false", help="do not flip samples horizontally")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="read from the disk: remove the latents from the system's file cache before each round",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=256, help="samples per batch")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="number of processes that read")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="number of measurements of each source")
    parser.add_argument("--seconds", type=positive, default=3.0, help="duration of one measurement in seconds")
    return parser


if __name__ == "__main__":
    run_command(main)
