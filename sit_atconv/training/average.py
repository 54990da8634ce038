"""Command that makes averages of other widths from a run's snapshots, after training.

python -m sit_atconv.training.average RUN --std 0.05 0.10 --out FOLDER
"""

import sys
from pathlib import Path

from sit_atconv.runtime.commands import ArgumentParser, at_least, positive, run_command, user_errors
from sit_atconv.runtime.installation import command

ROUGH = 0.02  # relative error of the weights of steps above which a warning is printed


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    several = len(options.std) > 1
    outs = {std: options.out / f"std-{std}" if several else options.out for std in options.std}
    with user_errors():
        for out in outs.values():
            if out.is_file() or (out.is_dir() and any(out.iterdir())):
                raise ValueError(f"{out} is not an empty folder: give another --out")
        from sit_atconv.checkpoints.exported import export_weights
        from sit_atconv.checkpoints.post_hoc import make_averages

        for (std, out), average in zip(outs.items(), make_averages(options.run, [*outs], options.step), strict=True):
            export_weights(average.weights, out)
            if average.error > ROUGH:
                print(
                    f"warning: the average of width {std} is rough, its weights of steps are off by "
                    f"{average.error:.1%}: more snapshots, and kept widths on both sides of {std}, make it exact",
                    file=sys.stderr,
                )
            print(
                f"{out}: average of width {std} at step {average.weights.recipe.step} from {average.num_kept} kept "
                f"averages, weights of steps off by {average.error:.1e}\nsample: {command('generate')} --ckpt {out}"
            )


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("average"),
        usage="%(prog)s RUN --std STD [STD ...] --out DIR [--step N]",
        description="Makes averages of a run's weights after training, of any width, from the snapshots that it kept "
        "(train.snapshot_every). The width is the standard deviation of the power function that weighs the steps, "
        "relative to the number of steps: 0.05 to 0.15 is usual.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--std", type=positive, nargs="+", required=True, help="widths of the averages")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder of weights; with several widths, DIR/std-STD"
    )
    parser.add_argument("--step", type=at_least(1), metavar="N", help="step of the averages (default: the last)")
    return parser


if __name__ == "__main__":
    run_command(main)
