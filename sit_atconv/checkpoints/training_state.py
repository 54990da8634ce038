"""Checkpoints that training resumes from.

    RUN/checkpoints/step-*/        model/, ema/, ema-DECAY/ (exported weights), optimizer.safetensors, state.json,
                                   and auxiliary.safetensors of a run with an auxiliary loss

state.json, written last, holds the sha256 of everything else. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.checkpoints.exported import WEIGHTS_FILE, save_weights
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.run_folder import checkpoint_step, list_checkpoints, newest_checkpoint
from sit_atconv.runtime.files import PARTIAL, flush, sha256_of

if TYPE_CHECKING:  # finding a checkpoint must not wait for torch: it is imported where it is used
    import torch

AUXILIARY_FILE = "auxiliary.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint restores; data order, noise, times and learning rate follow from (seed, step).

    Args:
        model: the model being trained, unwrapped.
        averages: decay -> average; the first lies in `ema`, any other in `ema-DECAY`.
        optimizer: the optimizer.
        scaler: the gradient scaler of fp16, or None.
        auxiliary: the auxiliary loss, whose parameters are saved beside the exported weights; or None.
    """

    model: "torch.nn.Module"
    averages: "Mapping[float, torch.nn.Module]"
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler | None" = None
    auxiliary: "torch.nn.Module | None" = None

    def parameters(self) -> "dict[str, torch.nn.Parameter]":
        """Returns all parameters by name, those of the auxiliary loss as "auxiliary.NAME"."""
        own = self.auxiliary.named_parameters() if self.auxiliary is not None else ()
        return dict(self.model.named_parameters()) | {f"auxiliary.{name}": p for name, p in own}

    def average_folders(self) -> "dict[str, tuple[float, torch.nn.Module]]":
        """Folder -> (decay, average)."""
        named = enumerate(self.averages.items())
        return {f"ema-{decay}" if i else "ema": (decay, model) for i, (decay, model) in named}


def checkpoint_bytes(net: "torch.nn.Module", num_averages: int) -> int:
    """Returns the size of a checkpoint: the model, its averages and AdamW's two moments."""
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    return (1 + num_averages) * sum(p.nbytes for p in net.parameters()) + 2 * trained


def checkpoints_at_once(steps: int, every: int, keep: int, keep_every: int | None) -> int:
    """Returns how many are on the disk at most: the one being written, the newest before it and those kept."""
    made = [*range(every, steps, every), steps]
    return len(made) - sum(not keep_every or step % keep_every > 0 for step in made[: -keep - 1])


# -------------------------------------------------------------------------------------------------------- saving

def save_checkpoint(
    run: Path,
    state: TrainingState,
    recipe: Recipe,
    *,
    keep: int,
    keep_every: int | None = None,
    computed_on: dict | None = None,
) -> Path:
    """Writes the checkpoint of `recipe.step` aside, renames it into place and deletes what need not be kept.

    Args:
        run: the run's folder.
        state: what to save.
        recipe: what the exported weights say of themselves.
        keep: so many of the newest stay.
        keep_every: and those whose step is divisible by this.
        computed_on: what the bits depend on beside the state; `load_checkpoint` gives it back.

    Raises:
        OSError: the disk is full, ...; earlier checkpoints are as they were, and nothing half written is left.
    """
    from safetensors.torch import save_file

    folder = run / "checkpoints" / f"step-{recipe.step:07d}"
    partial = folder.with_name(PARTIAL + folder.name)
    for left in folder.parent.glob(PARTIAL + "*"):
        _remove(left)
    try:
        partial.mkdir(parents=True)
        save_weights(state.model, recipe, partial / "model")
        for name, (decay, model) in state.average_folders().items():
            save_weights(model, dataclasses.replace(recipe, ema_decay=decay), partial / name)
        save_file(_optimizer_tensors(state), partial / "optimizer.safetensors")
        if state.auxiliary is not None:
            save_file(_auxiliary_tensors(state.auxiliary), partial / AUXILIARY_FILE)
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
            path.chmod((partial / "state.json").stat().st_mode)  # safetensors leaves its files to their owner alone
            flush(path)
        if folder.exists():
            _delete(folder)
        os.replace(partial, folder)
        flush(folder.parent)
    except Exception as error:  # safetensors raises its own where the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            before = newest_checkpoint(run)
            intact = f"{before} is intact" if before else "there is none before it"
            raise OSError(f"the checkpoint of step {recipe.step} cannot be written to {run} ({_reason(error)}); "
                          f"{intact}: mend that and run the same command again") from error
        raise
    for old in list_checkpoints(run)[:-keep]:
        if not keep_every or checkpoint_step(old) % keep_every:
            _delete(old)
    return folder


def _delete(checkpoint: Path) -> None:
    """Under another name first: half of one is no checkpoint."""
    doomed = checkpoint.with_name(PARTIAL + checkpoint.name + "-deleted")
    os.replace(checkpoint, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """A folder with all in it, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _optimizer_tensors(state: TrainingState) -> "dict[str, torch.Tensor]":
    """The optimizer's moments and step counts, by the parameters' names."""
    import torch

    tensors = {f"{name}/{key}": value for name, p in state.parameters().items()
               for key, value in state.optimizer.state.get(p, {}).items() if value is not None}
    if odd := [name for name, value in tensors.items() if not isinstance(value, torch.Tensor | int | float)]:
        raise OSError(f"{type(state.optimizer).__name__} keeps {odd[0]} as a {type(tensors[odd[0]]).__name__}, and "
                      "checkpoints hold tensors and numbers: use another --optimizer")
    return {name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}


def _optimizer_numbers(optimizer: "torch.optim.Optimizer") -> list[dict]:
    """What an optimizer has learned and keeps in its groups: numbers other than its options, group by group."""
    options = {"lr", "weight_decay"}
    return [{name: value for name, value in group.items() if isinstance(value, int | float) and name not in options
             and optimizer.defaults.get(name, value) != value} for group in optimizer.param_groups]


def _auxiliary_tensors(auxiliary: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """All but what is frozen, such as an encoder, whose weights are no part of a run."""
    frozen = {name for name, p in auxiliary.named_parameters() if not p.requires_grad}
    return {name: tensor.contiguous() for name, tensor in auxiliary.state_dict().items() if name not in frozen}


# ------------------------------------------------------------------------------------------------------- loading

@dataclass(frozen=True)
class Resumable:
    """What a run can go on from.

    Args:
        checkpoint: the newest sound one, or None where there is none at all.
        step: its step, or 0.
        damaged: newer ones, each with what is wrong with it.
    """

    checkpoint: Path | None
    step: int
    damaged: dict[Path, str]


def find_resumable(run: Path) -> Resumable:
    """Looks for a checkpoint that is as it was written, from the newest on; reads all of it.

    Raises:
        ValueError: there are checkpoints and none is sound.
    """
    damaged = {}
    for checkpoint in reversed(list_checkpoints(run)):
        if not (problem := _damage(checkpoint)):
            return Resumable(checkpoint, checkpoint_step(checkpoint), damaged)
        damaged[checkpoint] = problem
    if damaged:
        checkpoint, problem = next(iter(damaged.items()))
        raise ValueError(f"no checkpoint of {run} can be resumed from; the newest, {checkpoint}: {problem}. Give "
                         "another --out, or delete them to start this run afresh")
    return Resumable(None, 0, {})


def _damage(checkpoint: Path) -> str | None:
    """What is not as it was written, or None."""
    try:
        content = json.loads((checkpoint / "state.json").read_text())
        step, sums, _ = content["step"], dict(content["sha256"]), content["computed_on"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json is missing or damaged ({_reason(error)})"
    if step != checkpoint_step(checkpoint):
        return f"state.json is missing: the one there is of step {step}"
    if missing := {f"model/{WEIGHTS_FILE}", f"ema/{WEIGHTS_FILE}", "optimizer.safetensors"} - sums.keys():
        return f"state.json is damaged: it knows nothing of {min(missing)}"
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
    """Restores `state` in place; returns what `computed_on` was when it was saved.

    Raises:
        ValueError: the checkpoint is of another model or of other averages.
    """
    from safetensors.torch import load_file

    content = json.loads((checkpoint / "state.json").read_text())
    try:
        state.model.load_state_dict(load_file(checkpoint / "model" / WEIGHTS_FILE))
        for name, (_, model) in state.average_folders().items():
            model.load_state_dict(load_file(checkpoint / name / WEIGHTS_FILE))
        if state.auxiliary is not None:
            held, wanted = load_file(checkpoint / AUXILIARY_FILE), _auxiliary_tensors(state.auxiliary)
            if held.keys() != wanted.keys():
                raise ValueError(f"{AUXILIARY_FILE} holds other tensors than this auxiliary loss has")
            state.auxiliary.load_state_dict(held, strict=False)  # what is frozen is not in it
        _restore_optimizer(state, load_file(checkpoint / "optimizer.safetensors"))
        for group, numbers in zip(state.optimizer.param_groups, content.get("optimizer", ()), strict=False):
            group |= numbers
        if state.scaler:
            state.scaler.load_state_dict(content["scaler"])
    except Exception as error:  # whatever does not fit
        raise ValueError(f"{checkpoint} does not fit this model ({_reason(error)})") from error
    return content["computed_on"]


def _restore_optimizer(state: TrainingState, tensors: "dict[str, torch.Tensor]") -> None:
    moments = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(name, {})[kind] = value
    names = {p: name for name, p in state.parameters().items()}
    ordered = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    by_index = {index: moments[name] for index, name in enumerate(ordered) if name in moments}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that nothing takes it for a sound one."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    with contextlib.suppress(FileNotFoundError):
        _remove(aside)
    os.replace(checkpoint, aside)
    return aside


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
