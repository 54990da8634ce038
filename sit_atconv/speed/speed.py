"""The command that compares the speed of attention, ATConv as published, ours, hybrid and floor.

    python eval/speed.py
    python eval/speed.py --preset XL/2 --levels op block model train sampling --resolutions 256 512 1024 \\
        --batch-size 64 16 4 --dtypes bf16 --decoder sd-vae --compile --device cuda

Every form must agree with a second computation before it is timed.
In a terminal it prints a table. With --json, or if stdout is no terminal, JSON goes to stdout and the table to stderr.
With --classifiers it times AttNet and timm's models of images instead, in inference and training.
The folder --out gets both, as speed.json and speed.md, after every resolution, and a chart, speed.png, at the end.
Under torchrun, rank 0 measures and all other processes exit at once.
"""

import argparse
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
    parser, names = make_parser(), [option.name for option in fields(SpeedOptions)]
    arguments = vars(parser.parse_args(argv))
    if not is_main_process():
        return
    out, as_json = arguments.pop("out"), wants_json(arguments.pop("json"))
    if classifiers := arguments.pop("classifiers"):
        parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names))))  # None where not given
        given = {name: parsed[name] for name in names if parsed[name] is not None}
        time_classifiers(classifiers, given, out, as_json)
        return
    with user_errors():
        out.mkdir(parents=True, exist_ok=True)  # an impossible folder fails before torch is imported
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


def time_classifiers(names: list[str], given: dict, out: Path, as_json: bool) -> None:
    """Times image classifiers and writes classifiers.json and classifiers.md.

    Args:
        names: the classifiers.
        given: the options that were given, without defaults.
        out: folder of the two files.
        as_json: print the record instead of the table.
    """
    taken = ("resolutions", "batch_sizes", "levels", "dtypes", "rounds", "warmup", "device")
    with user_errors():
        if others := [name for name in given if name not in taken]:
            raise ValueError(f"--{others[0].replace('_', '-')} is not for --classifiers")
        single = {"resolutions": "resolution", "batch_sizes": "batch_size"}
        if any(len(given.get(name, [0])) > 1 for name in single):
            raise ValueError("--classifiers takes one of --resolutions and one --batch-size")
        if unknown := [level for level in given.get("levels", ()) if level not in ("model", "train")]:
            raise ValueError(f"--classifiers has the levels model and train, not {unknown[0]}")
        options = {single.get(name, name): value[0] if name in single else value for name, value in given.items()}
        out.mkdir(parents=True, exist_ok=True)
        from sit_atconv.runtime.files import write_aside
        from sit_atconv.speed.classifiers import compare_classifiers, table

        found = compare_classifiers(names, **options, progress=True)
        result, text = json.dumps(found, indent=1), table(found)
        write_aside(out / "classifiers.json", result + "\n")
        write_aside(out / "classifiers.md", text + "\n")
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(result)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("speed"),
        usage="%(prog)s [--preset XL/2] [--levels model sampling] [--resolutions 256 512] [--out DIR] [options]",
        description="Time ATConv and the forms that it is compared with in interleaved rounds. Before that, check that "
        "each form computes the right values. The results are milliseconds, images per second, ratios, multiply-adds "
        "and peak memory, as a table, a chart and JSON.",
    )
    parser.add_argument(
        "--preset",
        metavar="SIZE/PATCH",
        help="size and patch of the models: XL/2 compares SiT-XL/2, SiT-ATConv-XL/2 and its hybrid; "
        f"sizes are {', '.join(SIZES)}, patches are {', '.join(map(str, PATCHES))}",
    )
    parser.add_argument("--depth", type=at_least(1), help="number of blocks; by default that of the preset")
    parser.add_argument(
        "--forms",
        nargs="+",
        metavar="FORM",
        help=f"forms to compare: {', '.join(FORMS)}, or your own token mixers (as module.NAME, or by "
        "the name that a module given with --import registers); each level times the forms that it has",
    )
    parser.add_argument(
        "--classifiers",
        nargs="+",
        metavar="MODEL",
        help="time these models of timm instead, such as attnet_t2 and convnext_tiny, in inference and training; "
        "fused:attnet_t2 has its norms folded, published:attnet_t2 computes as published; the first is the baseline",
    )
    add_import_option(parser)
    parser.add_argument(
        "--levels", choices=LEVELS, nargs="+", metavar="LEVEL", help=f"parts of the model to time: {', '.join(LEVELS)}"
    )
    parser.add_argument("--baseline", metavar="FORM", help="form that all speedups are relative to")
    parser.add_argument(
        "--resolutions", type=at_least(1), nargs="+", metavar="PX", help="sides of the square images, in pixels"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        nargs="+",
        dest="batch_sizes",
        metavar="B",
        help="images per batch: one number for all resolutions, or one for each",
    )
    parser.add_argument(
        "--downsample", type=at_least(1), help="factor from image side to model input side: 8 for latents, 1 for pixels"
    )
    parser.add_argument("--channels", type=at_least(1), help="channels of the model's input: 4 for latents, 3 for RGB")
    parser.add_argument(
        "--dtypes",
        choices=PRECISIONS,
        nargs="+",
        help="dtypes of weights and arithmetic; a training step keeps its weights in fp32",
    )
    parser.add_argument("--steps", type=at_least(1), help="number of Euler steps to sample an image")
    parser.add_argument("--cfg", type=finite, help="guidance scale in sampling; 1 turns guidance off")
    parser.add_argument(
        "--decoder",
        metavar="none|sd-vae|FOLDER",
        help="decoder of the samples: none, sd-vae (its architecture with random weights), or a folder "
        "with an AutoencoderKL",
    )
    parser.add_argument("--compile", action="store_true", help="compile every form with torch.compile")
    parser.add_argument("--rounds", type=at_least(1), help="number of rounds; each round times every form once")
    parser.add_argument("--warmup", type=at_least(0), help="number of rounds to run first and discard")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; auto takes the accelerator if there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for the results")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON on stdout and the table on stderr; the default if stdout is no terminal",
    )
    parser.set_defaults(**{option.name: option.default for option in fields(SpeedOptions)})
    return parser


if __name__ == "__main__":
    run_command(main)
