"""Averages of other widths from a run's snapshots, made after training (EDM2, arXiv 2312.02696)."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sit_atconv.checkpoints.exported import Weights, export_weights
from sit_atconv.checkpoints.power_averages import exponent_of, solve
from sit_atconv.checkpoints.snapshots import Snapshot, list_snapshots
from sit_atconv.checkpoints.weights import load_weights


@dataclass(frozen=True)
class Average:
    """An average of the weights.

    Args:
        weights: the weights, whose recipe has the step and, as `ema_decay`, the width.
        num_kept: number of kept averages that it combines.
        error: relative error of its weights of steps.
    """

    weights: Weights
    num_kept: int
    error: float


def make_averages(run: Path, stds: Sequence[float], step: int | None = None) -> list[Average]:
    """Returns averages of these widths.

    Args:
        run: folder of a run that kept snapshots.
        stds: relative widths.
        step: step of the averages; None is the last snapshot's.

    Raises:
        ValueError: a width is impossible, or the snapshots are missing, damaged or of another model.
    """
    for std in stds:
        exponent_of(std)  # raises an error before any work
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}: give the folder of a run")
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(
            f"{run} has no snapshots: give the folder of a run, trained with --train.ema_profile power "
            '--train.ema_decay "[0.05,0.1]" --train.snapshot_every N'
        )
    steps = [snapshot.step for snapshot in snapshots]
    step = step or max(steps)
    kept = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not kept:
        raise ValueError(f"the first snapshot of {run} is of step {min(steps)}, after step {step}")
    made = []
    for std in stds:
        weights = load_weights(str(run))
        coefficients, error = solve([(each.step, each.std) for each in kept], (step, std))
        _combine(weights, kept, coefficients.tolist())
        recipe = dataclasses.replace(weights.recipe, step=step, ema_decay=std)
        made.append(Average(dataclasses.replace(weights, recipe=recipe), len(kept), error))
    return made


def _combine(weights: Weights, kept: Sequence[Snapshot], coefficients: Sequence[float]) -> None:
    """Puts the combination of kept averages into the trained tensors of a model, in place."""
    state = weights.model.state_dict()
    if wrong := [each.path for each in kept if not each.names <= state.keys()]:
        raise ValueError(f"{wrong[0]} is of another model than {weights.path}: delete it")
    sums = {name: torch.zeros_like(state[name], dtype=torch.float64) for name in kept[0].names}
    for each, coefficient in zip(kept, coefficients, strict=True):
        for name, tensor in each.tensors().items():
            sums[name] += coefficient * tensor.double()
    for name, total in sums.items():
        state[name].copy_(total)


def averaged_folder(run: Path, std: float) -> Path:
    """Returns the folder RUN/averages/step-STEP-std-STD, which is made if it does not exist.

    Several processes may ask for it at the same time. Raises as `make_averages`, or OSError: the disk is full, ...
    """
    last = max((snapshot.step for snapshot in list_snapshots(run)), default=0)
    folder = run / "averages" / f"step-{last:07d}-std-{std:g}"
    if not (folder / "recipe.json").exists():
        (average,) = make_averages(run, [std])
        own = folder.with_name(f".{folder.name}-{os.getpid()}")
        own.parent.mkdir(exist_ok=True)
        export_weights(average.weights, own)
        try:
            os.replace(own, folder)
        except OSError:  # another process was faster
            shutil.rmtree(own)
            if not (folder / "recipe.json").exists():
                raise
    return folder
