"""The folder of a training run, and the checkpoints in it that training resumes from.

    RUN/config.yaml                the resolved configuration
    RUN/stats.jsonl, loss.png      the loss as it went
    RUN/samples/step-*.png         pictures drawn from the EMA weights on the way
    RUN/checkpoints/step-*/        model/ and ema/ (exported weights), optimizer.pt, state.json
"""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.checkpointing.weights import WEIGHTS_FILE, Recipe, save_weights
from sit_atconv.files import write_aside

if TYPE_CHECKING:  # finding a checkpoint must not wait for torch: it is imported where it is used
    import torch


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint restores; the data order, the noise and the learning rate follow from the step.

    Args:
        model: the model being trained, unwrapped.
        ema: its average.
        optimizer: the optimizer.
        scaler: the gradient scaler of fp16, or None.
    """

    model: "torch.nn.Module"
    ema: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler | None" = None


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the last step in a run folder, or None."""
    checkpoints = list_checkpoints(run)
    return checkpoints[-1] if checkpoints else None


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first. (One being written bears another name until it is whole.)"""
    found = [path for path in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(run: Path, state: TrainingState, recipe: Recipe, ema_decay: float, keep: int) -> Path:
    """Writes the checkpoint of `recipe.step` aside, renames it into place and deletes all but the newest `keep`."""
    import torch

    folder = run / "checkpoints" / f"step-{recipe.step:07d}"
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(state.model, recipe, partial / "model")
    save_weights(state.ema, dataclasses.replace(recipe, ema_decay=ema_decay), partial / "ema")
    torch.save(
        {"optimizer": state.optimizer.state_dict(), "scaler": state.scaler and state.scaler.state_dict()},
        partial / "optimizer.pt",
    )
    (partial / "state.json").write_text(json.dumps({"step": recipe.step, "versions": recipe.versions}))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(checkpoint: Path, state: TrainingState) -> int:
    """Restores `state` in place and returns the step.

    Raises:
        ValueError: the checkpoint is damaged, or is of another model.
    """
    import torch
    from safetensors.torch import load_file

    try:
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        state.model.load_state_dict(load_file(checkpoint / "model" / WEIGHTS_FILE))
        state.ema.load_state_dict(load_file(checkpoint / "ema" / WEIGHTS_FILE))
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.scaler:
            state.scaler.load_state_dict(saved["scaler"])
    except Exception as error:  # a damaged file raises whatever its reader raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{checkpoint} cannot be resumed from ({reason}): delete it to go on from the one before"
        ) from error
    return step


def append_stats(run: Path, **values) -> None:
    """Adds one line to stats.jsonl."""
    with open(run / "stats.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def read_stats(run: Path, up_to_step: int | None = None) -> list[dict]:
    """The lines of stats.jsonl, up to a step. (A line that a kill cut short is left out.)"""
    path, lines = run / "stats.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if up_to_step is None or line["step"] <= up_to_step]


def rewind_stats(run: Path, step: int) -> None:
    """Drops what was logged after the step that a run goes on from, since it will be logged again."""
    write_aside(run / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in read_stats(run, step)))
