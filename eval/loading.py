"""Measures how fast training data are read: cached latents, images, or both by turns.

    python eval/loading.py --latents LATENTS --images DIR --image-size 256
    python eval/loading.py --random-gb 10

JSON goes to stdout: samples a second (median, all rounds), seconds to the first batch, the workers' private memory.
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

from sit_atconv.commands import ArgumentParser, at_least, positive, run_command, user_errors


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if not (options.latents or options.images or options.random_gb):
        parser.error("give --latents, --images or --random-gb")
    with user_errors(), tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        from sit_atconv.data.images import ImageFolder
        from sit_atconv.data.latents import CachedLatents
        from sit_atconv.data.loading_speed import forget_files, measure_loading, write_random_latents

        sources = {}
        if options.latents:
            sources["latents"] = lambda: CachedLatents(options.latents, options.mirror)
        if options.random_gb:
            write_random_latents(Path(scratch), math.ceil(options.random_gb * 1e9 / (2 * 2 * 8 * 32 * 32)))
            sources["random latents"] = lambda: CachedLatents(scratch)
        if options.images:
            sources["images"] = lambda: ImageFolder(options.images, options.image_size)
        folders = [Path(folder) for folder in (options.latents, options.random_gb and scratch) if folder]
        cold = {"before_round": lambda: [forget_files(folder) for folder in folders]} if options.cold else {}
        found = measure_loading(sources, batch_size=options.batch_size, num_workers=options.num_workers,
                                rounds=options.rounds, seconds=options.seconds, mirror=options.mirror, progress=True,
                                **cold)
    print(json.dumps({name: dataclasses.asdict(speed) for name, speed in found.items()}, indent=1))


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage="python eval/loading.py [--latents LATENTS] [--images DIR] [--random-gb GB] [options]",
        description="Measures how fast training data are read, in training's order and with its mirror images.",
    )
    parser.add_argument("--latents", default=None, help="a folder that encode.py wrote")
    parser.add_argument("--images", metavar="DIR", default=None, help="a folder of images")
    parser.add_argument("--image-size", type=at_least(1), default=256, metavar="PX", help="side of those images")
    parser.add_argument("--random-gb", type=positive, default=None, metavar="GB",
                        help="write latents of 32x32x4 of this size, random numbers, and measure those")
    parser.add_argument("--scratch", default=None, metavar="DIR", help="where those lie meanwhile")
    parser.add_argument("--no-mirror", dest="mirror", action="store_false", help="without the mirror images")
    parser.add_argument("--cold", action="store_true",
                        help="from the disk: have the system forget the latents it keeps in memory before each round")
    parser.add_argument("--batch-size", type=at_least(1), default=256, help="samples of a batch")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="processes that read")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="how often each is read")
    parser.add_argument("--seconds", type=positive, default=3.0, help="how long each time")
    return parser


if __name__ == "__main__":
    run_command(main)
