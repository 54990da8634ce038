"""Times attention, ATConv as published, ATConv, their hybrid and the floor of them all, interleaved in one run.

    python eval/speed.py
    python eval/speed.py --preset XL/2 --levels op block model train sampling --resolutions 256 512 1024 \\
        --batch-size 64 16 4 --dtypes bf16 --decoder sd-vae --compile --device cuda

Nothing is timed before each form has been seen to compute what it should, by a second computation of it.
In a terminal it prints a table. With --json, or if stdout is no terminal, JSON goes to stdout and the table to stderr.
The folder --out gets both, as speed.json and speed.md, after every resolution, and a chart, speed.png, at the end.
One process measures: under torchrun the others leave at once.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

from sit_atconv.models.presets import PATCHES, SIZES
from sit_atconv.runtime.commands import (
    ArgumentParser,
    add_import_option,
    at_least,
    finite,
    is_main_process,
    run_command,
    user_errors,
    wants_json,
)
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.tables import import_module_of
from sit_atconv.speed.forms import FORMS, LEVELS
from sit_atconv.speed.options import PRECISIONS, SpeedOptions


def main(argv: list[str] | None = None) -> None:
    arguments = vars(make_parser().parse_args(argv))
    if not is_main_process():
        return
    out, as_json = arguments.pop("out"), wants_json(arguments.pop("json"))
    with user_errors():
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is found before torch is imported
        for form in arguments["forms"]:
            import_module_of(form)
        options = SpeedOptions(**arguments)
        from sit_atconv.runtime.files import write_aside
        from sit_atconv.speed.benchmark import compare
        from sit_atconv.speed.chart import save_chart
        from sit_atconv.speed.table import table

        def save(comparison) -> tuple[str, str]:
            result, text = json.dumps(comparison.to_json(), indent=1), table(comparison)
            write_aside(out / "speed.json", result + "\n")
            write_aside(out / "speed.md", text + "\n")
            return result, text

        comparison = compare(options, progress=True, after_case=save)
    result, text = save(comparison)
    save_chart(comparison, out / "speed.png")
    print(text, f"\nchart: {out / 'speed.png'}", sep="\n", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(result)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("speed"),
        usage="%(prog)s [--preset XL/2] [--levels model sampling] [--resolutions 256 512] [--out DIR] "
        "[options]",
        description="Times what ATConv is compared with, interleaved in one run, after checking each by a second "
        "computation: milliseconds, images per second, ratios, multiply-adds and peak memory, as JSON, a table and a "
        "chart.",
    )
    parser.add_argument("--preset", metavar="SIZE/PATCH",
                        help="XL/2 stands for SiT-XL/2, SiT-ATConv-XL/2 and its hybrid; sizes "
                        f"{', '.join(SIZES)}, patches {', '.join(map(str, PATCHES))}")
    parser.add_argument("--depth", type=at_least(1), help="number of blocks, if not the preset's")
    parser.add_argument("--forms", nargs="+", metavar="FORM",
                        help=f"what is compared, of {', '.join(FORMS)}, or token mixers of yours, as module.NAME or as "
                        "a module given by --import registers them; each level takes those that it has")
    add_import_option(parser)
    parser.add_argument("--levels", choices=LEVELS, nargs="+", metavar="LEVEL",
                        help=f"what is timed, of {', '.join(LEVELS)}")
    parser.add_argument("--baseline", metavar="FORM",
                        help="the form that the others' speeds are divided by")
    parser.add_argument("--resolutions", type=at_least(1), nargs="+", metavar="PX",
                        help="sides of the square images, in pixels")
    parser.add_argument("--batch-size", type=at_least(1), nargs="+", dest="batch_sizes", metavar="B",
                        help="images at a time, one number for each resolution or one for all")
    parser.add_argument("--downsample", type=at_least(1),
                        help="pixels for one of the model's input: 8 for latents, 1 in pixel space")
    parser.add_argument("--channels", type=at_least(1), help="of the model's input: 4 latent, 3 for RGB")
    parser.add_argument("--dtypes", choices=PRECISIONS, nargs="+",
                        help="of weights and arithmetic; in training of arithmetic alone")
    parser.add_argument("--steps", type=at_least(1), help="Euler steps in which an image is sampled")
    parser.add_argument("--cfg", type=finite, help="guidance scale in sampling; 1 is off")
    parser.add_argument("--decoder", metavar="none|sd-vae|FOLDER",
                        help="of what is sampled: sd-vae is its architecture with random weights, FOLDER holds an "
                        "AutoencoderKL")
    parser.add_argument("--compile", action="store_true", help="compile every form with torch.compile")
    parser.add_argument("--rounds", type=at_least(1), help="how often each form is timed")
    parser.add_argument("--warmup", type=at_least(0), help="rounds before those, thrown away")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; auto is the accelerator, if any")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of the results")
    parser.add_argument("--json", action="store_true",
                        help="print JSON on stdout and the table on stderr, as is always done if stdout is no terminal")
    parser.set_defaults(**{option.name: option.default for option in fields(SpeedOptions)})
    return parser


if __name__ == "__main__":
    run_command(main)
