"""Command that makes averages of other widths from a run's snapshots, after training.

python -m sit_atconv.training.average RUN --std 0.05 0.10 --out FOLDER
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.runtime.commands import ArgumentParser, at_least, positive, run_command, user_errors
from sit_atconv.runtime.installation import command

if TYPE_CHECKING:
    from sit_atconv.checkpoints.exported import Weights
    from sit_atconv.checkpoints.snapshots import Snapshot

ROUGH = 0.02  # relative error of the weights of steps above which a warning is printed


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        from sit_atconv.checkpoints.exported import export_weights
        from sit_atconv.checkpoints.snapshots import list_snapshots
        from sit_atconv.checkpoints.weights import load_weights
        from sit_atconv.training.power_averages import exponent_of, solve

        snapshots = list_snapshots(options.run)
        if not snapshots:
            raise ValueError(
                f"{options.run} has no snapshots: train with --train.ema_profile power --train.ema_decay "
                '"[0.05,0.1]" --train.snapshot_every N'
            )
        steps = sorted({snapshot.step for snapshot in snapshots})
        step = options.step or steps[-1]
        kept = [snapshot for snapshot in snapshots if snapshot.step <= step]
        if not kept:
            raise ValueError(f"the first snapshot of {options.run} is of step {steps[0]}, after --step {step}")
        for std in options.std:
            exponent_of(std)  # checks all widths before any work
        several = len(options.std) > 1
        outs = {std: options.out / f"std-{std}" if several else options.out for std in options.std}
        for out in outs.values():
            if out.is_file() or (out.is_dir() and any(out.iterdir())):
                raise ValueError(f"{out} is not an empty folder: give another --out")
        weights = load_weights(str(options.run))
        for std, out in outs.items():
            coefficients, error = solve([(each.step, each.std) for each in kept], (step, std))
            averaged = combine(weights, kept, coefficients.tolist(), step, std)
            export_weights(averaged, out)
            if error > ROUGH:
                print(
                    f"warning: the average of width {std} is rough: its weights of steps are off by {error:.1%}; more "
                    f"snapshots, and widths on both sides of {std}, make it exact",
                    file=sys.stderr,
                )
            print(
                f"{out}: average of width {std} at step {step} from {len(kept)} kept averages, weights of steps off by "
                f"{error:.1e}\nsample: {command('generate')} --ckpt {out}"
            )


def combine(
    weights: "Weights", kept: "Sequence[Snapshot]", coefficients: Sequence[float], step: int, std: float
) -> "Weights":
    """Returns the weights with the combination of kept averages in place of their trained tensors.

    ValueError: the snapshots hold other tensors than the model.
    """
    import torch

    state = weights.model.state_dict()
    if wrong := [each.path for each in kept if not each.names <= state.keys()]:
        raise ValueError(f"{wrong[0]} is of another model than {weights.path}: delete it")
    sums = {name: torch.zeros_like(state[name], dtype=torch.float64) for name in kept[0].names}
    for each, coefficient in zip(kept, coefficients, strict=True):
        for name, tensor in each.tensors().items():
            sums[name] += coefficient * tensor.double()
    for name, total in sums.items():
        state[name].copy_(total)
    recipe = dataclasses.replace(weights.recipe, step=step, ema_decay=std)
    return dataclasses.replace(weights, recipe=recipe)


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
