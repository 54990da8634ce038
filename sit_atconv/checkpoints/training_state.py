"""Checkpoints that training resumes from.

    RUN/checkpoints/step-*/        model/, ema/, ema-DECAY/ (exported weights), optimizer.safetensors, state.json;
                                   with an auxiliary loss auxiliary.safetensors, its averages as ema/NAME, ...

The form of exported weights is the caller's: that of `save_weights` for SiT, timm's for classifiers.

state.json is written last and holds the sha256 of all other files. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sit_atconv import __version__
from sit_atconv.checkpoints.exported import WEIGHTS_FILE, save_weights
from sit_atconv.checkpoints.recipe import check_fields, later_version
from sit_atconv.checkpoints.run_folder import best_step, checkpoint_step, list_checkpoints, newest_checkpoint
from sit_atconv.runtime.files import PARTIAL, flush, sha256_of

if TYPE_CHECKING:  # importing torch takes seconds: functions that find a checkpoint do without it
    import torch

AUXILIARY_FILE = "auxiliary.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FIELDS = ("step", "sha256", "computed_on", "scaler", "optimizer", "versions")  # three required, then optional


@dataclass(frozen=True)
class TrainingState:
    """The objects that a checkpoint restores.

    Data order, noise, times and learning rate are not saved: they follow from (seed, step).

    Args:
        model: the model being trained, unwrapped.
        averages: EMA decay -> EMA of the model; the first is saved in `ema`, any other in `ema-DECAY`.
        optimizer: the optimizer.
        scaler: the gradient scaler of fp16, or None.
        auxiliary: the auxiliary loss, or None.
        auxiliary_averages: EMA decay -> averages of its trained parameters by name.
        weights_file: name of the file of weights in an exported folder.
    """

    model: "torch.nn.Module"
    averages: "Mapping[float, torch.nn.Module]"
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler | None" = None
    auxiliary: "torch.nn.Module | None" = None
    auxiliary_averages: "Mapping[float, Mapping[str, torch.Tensor]]" = field(default_factory=dict)
    weights_file: str = WEIGHTS_FILE

    def parameters(self) -> "dict[str, torch.nn.Parameter]":
        """Returns all parameters by name; those of the auxiliary loss are called "auxiliary.NAME"."""
        own = self.auxiliary.named_parameters() if self.auxiliary is not None else ()
        return dict(self.model.named_parameters()) | {f"auxiliary.{name}": p for name, p in own}

    def auxiliary_tensors(self) -> "dict[str, torch.Tensor]":
        """Returns the tensors of the auxiliary loss but frozen ones, and its averages as FOLDER/NAME."""
        assert self.auxiliary is not None
        frozen = {name for name, p in self.auxiliary.named_parameters() if not p.requires_grad}
        tensors = {name: tensor for name, tensor in self.auxiliary.state_dict().items() if name not in frozen}
        for folder, (decay, _) in self.average_folders().items():
            averages = self.auxiliary_averages.get(decay, {})
            tensors |= {f"{folder}/{name}": tensor for name, tensor in averages.items()}
        return tensors

    def average_folders(self) -> "dict[str, tuple[float, torch.nn.Module]]":
        """Returns the decay and the EMA that each folder holds."""
        named = enumerate(self.averages.items())
        return {f"ema-{decay}" if i else "ema": (decay, model) for i, (decay, model) in named}


def checkpoint_bytes(net: "torch.nn.Module", num_averages: int, auxiliary: "torch.nn.Module | None" = None) -> int:
    """Returns the bytes of a checkpoint: all trained parameters, their EMAs and AdamW's two moments."""
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    beside = sum(p.nbytes for p in auxiliary.parameters() if p.requires_grad) if auxiliary is not None else 0
    return (1 + num_averages) * (sum(p.nbytes for p in net.parameters()) + beside) + 2 * (trained + beside)


def snapshots_bytes(net: "torch.nn.Module", num_averages: int, steps: int, every: int | None, itemsize: int) -> int:
    """Returns the bytes of all snapshots: the trained tensors of every average, each time."""
    count = 0 if every is None else len({*range(every, steps + 1, every), steps})
    return count * num_averages * itemsize * sum(p.numel() for p in net.parameters() if p.requires_grad)


def checkpoints_at_once(
    steps: int,
    every: int,
    keep: int,
    keep_every: int | None,
    evaluate_every: int | None = None,
    keep_best: bool = False,
) -> int:
    """Returns the largest number of checkpoints on the disk, with the one being written."""
    of_evaluations = range(evaluate_every, steps, evaluate_every) if evaluate_every else ()
    made = sorted({*range(every, steps, every), *of_evaluations, steps})
    return keep_best + len(made) - sum(not keep_every or step % keep_every > 0 for step in made[: -keep - 1])


# -------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    run: Path,
    state: TrainingState,
    recipe: Any,
    *,
    write: Callable[..., None] = save_weights,
    keep: int,
    keep_every: int | None = None,
    keep_best: bool = False,
    computed_on: dict | None = None,
) -> Path:
    """Writes the checkpoint of `recipe.step` atomically and deletes old checkpoints.

    Args:
        run: the run's folder.
        state: the state to save.
        recipe: recipe of the weights: a `Recipe`, or another dataclass with `step`, `ema_decay` and `versions`.
        write: writes exported weights, as (model, recipe, folder).
        keep: number of newest checkpoints to keep.
        keep_every: also keep every step divisible by this.
        keep_best: also keep the step with the best score, see `best_step`.
        computed_on: settings other than the state that change the bits of the result; `load_checkpoint` returns them.

    Raises:
        OSError: the disk is full, ...; earlier checkpoints are unchanged, and no partial one is left.
    """
    from safetensors.torch import save_file

    folder = run / "checkpoints" / f"step-{recipe.step:07d}"
    partial = folder.with_name(PARTIAL + folder.name)
    for left in folder.parent.glob(PARTIAL + "*"):
        _remove(left)
    try:
        partial.mkdir(parents=True)
        write(state.model, recipe, partial / "model")
        for name, (decay, model) in state.average_folders().items():
            write(model, dataclasses.replace(recipe, ema_decay=decay), partial / name)
        save_file(_optimizer_tensors(state), partial / OPTIMIZER_FILE)
        if state.auxiliary is not None:
            tensors = {name: tensor.contiguous() for name, tensor in state.auxiliary_tensors().items()}
            save_file(tensors, partial / AUXILIARY_FILE)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        content = {
            "step": recipe.step,
            "scaler": state.scaler and state.scaler.state_dict(),
            **({"optimizer": numbers} if any(numbers := _optimizer_numbers(state.optimizer)) else {}),
            "computed_on": computed_on or {},
            "versions": recipe.versions,
            "sha256": {str(path.relative_to(partial)): sha256_of(path) for path in files},
        }
        (partial / "state.json").write_text(json.dumps(content, indent=1))
        for path in [*files, partial / "state.json"]:
            path.chmod((partial / "state.json").stat().st_mode)  # safetensors lets only the owner read its files
            flush(path)
        if folder.exists():
            _delete(folder)
        os.replace(partial, folder)
        flush(folder.parent)
    except Exception as error:  # on a full disk safetensors raises an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            before = newest_checkpoint(run)
            intact = f"{before} is intact" if before else "there is no earlier one"
            raise OSError(
                f"the checkpoint of step {recipe.step} cannot be written to {run} ({_reason(error)}); "
                f"{intact}: fix that and run the same command again"
            ) from error
        raise
    best = best_step(run) if keep_best else None
    for old in list_checkpoints(run)[:-keep]:
        if (not keep_every or checkpoint_step(old) % keep_every) and checkpoint_step(old) != best:
            _delete(old)
    return folder


def _delete(checkpoint: Path) -> None:
    """Deletes a checkpoint, renamed first so that a kill leaves no partial one under its name."""
    doomed = checkpoint.with_name(PARTIAL + checkpoint.name + "-deleted")
    os.replace(checkpoint, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Deletes a folder with its content, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _optimizer_tensors(state: TrainingState) -> "dict[str, torch.Tensor]":
    """Returns the optimizer's moments and step counts as NAME OF PARAMETER/KEY -> tensor."""
    import torch

    tensors = {
        f"{name}/{key}": value
        for name, p in state.parameters().items()
        for key, value in state.optimizer.state.get(p, {}).items()
        if value is not None
    }
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor | int | float):
            raise OSError(
                f"{type(state.optimizer).__name__} keeps {name} as a {type(value).__name__}, but checkpoints "
                "hold only tensors and numbers: use another --optimizer"
            )
    return {name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}


def _optimizer_numbers(optimizer: "torch.optim.Optimizer") -> list[dict]:
    """Returns for each parameter group the numbers, other than options, that the optimizer has changed."""
    options = {"lr", "weight_decay"}
    return [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, int | float) and name not in options and optimizer.defaults.get(name, value) != value
        }
        for group in optimizer.param_groups
    ]


# ------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Resumable:
    """The checkpoint that a run resumes from.

    Args:
        checkpoint: the newest intact checkpoint, or None if there are no checkpoints.
        step: its step, or 0.
        damaged: newer checkpoints -> their damage.
    """

    checkpoint: Path | None
    step: int
    damaged: dict[Path, str]


def find_resumable(run: Path, weights_file: str = WEIGHTS_FILE) -> Resumable:
    """Finds the newest checkpoint whose files all have their checksums.

    Args:
        run: the run's folder.
        weights_file: as in `TrainingState`.

    Raises:
        ValueError: there are checkpoints but none is intact, or a later version wrote the newest.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(run)):
        if not (problem := _damage(checkpoint, weights_file)):
            return Resumable(checkpoint, checkpoint_step(checkpoint), damaged)
        damaged[checkpoint] = problem
    if damaged:
        checkpoint, problem = next(iter(damaged.items()))
        raise ValueError(
            f"no checkpoint of {run} can be resumed from; the newest, {checkpoint}: {problem}. Give "
            "another --out, or delete the checkpoints to start this run from scratch"
        )
    return Resumable(None, 0, {})


def _damage(checkpoint: Path, weights_file: str) -> str | None:
    """Describes the first damage of a checkpoint, or returns None. ValueError: a later version wrote it."""
    file = checkpoint / "state.json"
    try:
        content = dict(json.loads(file.read_text()))
        versions = dict(content.get("versions", {}))
        sums = dict(content.get("sha256", {}))
    except (OSError, ValueError, TypeError) as error:
        return f"state.json is missing or damaged ({_reason(error)})"
    check_fields(content, STATE_FIELDS, file)
    needed = [f"model/{weights_file}", f"ema/{weights_file}", OPTIMIZER_FILE]
    missing = [name for name in STATE_FIELDS[:3] if name not in content] + [name for name in needed if name not in sums]
    if missing and versions.get("sit_atconv", __version__) != __version__:
        raise later_version(file, f"has no {missing[0]}, which sit_atconv {__version__} needs", content)
    if missing:
        return f"state.json is damaged: it has no {missing[0]}"
    if content["step"] != checkpoint_step(checkpoint):
        return f"its state.json is of step {content['step']}"
    for name, sha256 in sums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            if sha256_of(checkpoint / name) != sha256:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def load_checkpoint(checkpoint: Path, state: TrainingState) -> dict:
    """Restores `state` in place and returns the `computed_on` that was saved with it.

    Raises:
        ValueError: the checkpoint is of another model or has other EMA decays.
    """
    from safetensors.torch import load_file

    content = json.loads((checkpoint / "state.json").read_text())
    try:
        state.model.load_state_dict(load_file(checkpoint / "model" / state.weights_file))
        for name, (_, model) in state.average_folders().items():
            model.load_state_dict(load_file(checkpoint / name / state.weights_file))
        if state.auxiliary is not None:
            _restore_auxiliary(state, load_file(checkpoint / AUXILIARY_FILE))
        _restore_optimizer(state, load_file(checkpoint / OPTIMIZER_FILE))
        for group, numbers in zip(state.optimizer.param_groups, content.get("optimizer", ()), strict=False):
            group |= numbers
        if state.scaler:
            state.scaler.load_state_dict(content["scaler"])
    except Exception as error:  # of any type: it depends on the part that does not fit
        raise ValueError(f"{checkpoint} does not fit this model ({_reason(error)})") from error
    return content["computed_on"]


def _restore_auxiliary(state: TrainingState, held: "dict[str, torch.Tensor]") -> None:
    """Restores the loss and its averages, which start from its parameters if the file has none."""
    wanted = state.auxiliary_tensors()
    if not any("/" in name for name in held):
        held = held | {name: held[name.partition("/")[2]] for name in wanted if "/" in name}
    shapes, expected = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (held, wanted))
    if shapes != expected:
        raise ValueError(f"{AUXILIARY_FILE} has other tensors than this auxiliary loss")
    for name, tensor in wanted.items():
        tensor.copy_(held[name])


def _restore_optimizer(state: TrainingState, tensors: "dict[str, torch.Tensor]") -> None:
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(name, {})[kind] = value
    names = {p: name for name, p in state.parameters().items()}
    ordered = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    by_index = {index: moments[name] for index, name in enumerate(ordered) if name in moments}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint so that it is never used again; returns its new path."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    with contextlib.suppress(FileNotFoundError):
        _remove(aside)
    os.replace(checkpoint, aside)
    return aside


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
