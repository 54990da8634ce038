"""The recipe: the settings that sampling needs besides the model. It is saved with the weights."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv import __version__

if TYPE_CHECKING:
    from sit_atconv.models import SiT


def versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"sit_atconv": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


@dataclass(frozen=True)
class Recipe:
    """The settings that sampling needs besides the model.

    Args:
        interpolant: "linear", "gvp" or "vp".
        prediction: meaning of the model's output: "velocity", "noise", "score" or "data".
        codec: what `Codec.describe()` returned.
        class_names: names of labels 0, 1, ...
        step: optimizer steps that these weights were trained for.
        ema_decay: EMA decay of these weights; None for the weights as trained.
        null_label_trained: True if labels were dropped in training, so that guidance works. None if not known (weights
            older than this field), which counts as True.
        empty_classes: labels without any training image; they are drawn only if asked for.
        ema_known: False if it is not known whether these are EMA weights; `ema_decay` is then None.
        versions: versions of the libraries that wrote the weights.
        objective: class path and options of an objective other than `FlowMatching`; None for that one.
        backbone: class path of a model other than `SiT`; None for that one.
        trained_cfg: guidance scale that the weights have learned, as MeanFlow can train it; 1 is none.
    """

    interpolant: str
    prediction: str
    codec: dict
    class_names: list[str]
    step: int
    ema_decay: float | None = None
    null_label_trained: bool | None = None
    empty_classes: list[int] = field(default_factory=list)
    ema_known: bool = True
    versions: dict[str, str] = field(default_factory=versions)
    objective: dict | None = None
    backbone: str | None = None
    trained_cfg: float = 1.0

    def null_label_of(self, model: "SiT") -> int | None:
        """Returns the label that guidance uses as "no class"; None if there is none or it was never trained."""
        return None if self.null_label_trained is False else model.null_label

    @property
    def average(self) -> str | None:
        """Kind of the weights: "EMA", "as trained", or None if not known."""
        if not self.ema_known:
            return None
        return "as trained" if self.ema_decay is None else "EMA"

    def save(self, folder: Path) -> None:
        """Writes recipe.json; newer fields are left out at their default, so that earlier versions read it."""
        newer = {"objective": None, "backbone": None, "trained_cfg": 1.0}
        content = {
            name: value for name, value in dataclasses.asdict(self).items() if name not in newer or value != newer[name]
        }
        (folder / "recipe.json").write_text(json.dumps(content, indent=1))


def check_fields(content: dict, known: Iterable[str], file: Path) -> None:
    """Raises ValueError if the content of a file has fields that only a later version knows."""
    if unknown := sorted(content.keys() - set(known)):
        raise later_version(file, f"has {', '.join(unknown)}, which sit_atconv {__version__} does not know", content)


def later_version(file: Path, fault: str, content: dict) -> ValueError:
    """Returns the error for a file of a later version; `content` may record which version wrote it."""
    wrote = (content.get("versions") or {}).get("sit_atconv", "a later one")
    return ValueError(f"{file} {fault}: it was written by {wrote}; install that version or a later one")
