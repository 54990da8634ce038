"""Snapshots of a run's averages, from which averages of other widths are made after training.

RUN/snapshots/step-*.safetensors      WIDTH/NAME -> the trained tensors of the average of that width
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.checkpoints.run_folder import delete_after
from sit_atconv.runtime.files import write_aside

if TYPE_CHECKING:  # importing torch takes seconds
    import torch


@dataclass(frozen=True)
class Snapshot:
    """One average in a file of snapshots: its step, its width, and the names of its tensors."""

    path: Path
    step: int
    std: float
    names: frozenset[str]

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Reads the tensors by name."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(f"{self.std}/{name}") for name in self.names}


def snapshot_path(run: Path, step: int) -> Path:
    return run / "snapshots" / f"step-{step:07d}.safetensors"


def save_snapshot(
    run: Path, step: int, averages: "Mapping[float, Mapping[str, torch.Tensor]]", dtype: "torch.dtype"
) -> None:
    """Writes the averages of a step atomically. OSError: the disk is full, ..."""
    from safetensors.torch import save

    tensors = {
        f"{std}/{name}": tensor.detach().to("cpu", dtype).contiguous()
        for std, named in averages.items()
        for name, tensor in named.items()
    }
    path = snapshot_path(run, step)
    path.parent.mkdir(exist_ok=True)
    write_aside(path, save(tensors), durable=True)


def rewind_snapshots(run: Path, step: int) -> None:
    """Deletes snapshots and averages made from them after the step that a run resumes from; all at step 0.

    They may be of a former run in the same folder, which had other options.
    """
    delete_after([*run.glob("snapshots/step-*"), *run.glob("averages/step-*")], step)


def list_snapshots(run: Path) -> list[Snapshot]:
    """Returns all averages in the snapshots of a run, by step. ValueError: a file is damaged."""
    from safetensors import safe_open

    found = []
    for path in sorted(run.glob("snapshots/step-*.safetensors")):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match is None:
            continue
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
            keys = [name.split("/", 1) for name in names]
        except Exception as error:  # safetensors has a type of its own
            raise ValueError(f"{path} is damaged: delete it; averages can be made without it") from error
        for std in sorted({std for std, _ in keys}):
            names = frozenset(name for width, name in keys if width == std)
            found.append(Snapshot(path, int(match[1]), float(std), names))
    return found
