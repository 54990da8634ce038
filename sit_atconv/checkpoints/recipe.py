"""The recipe: what sampling must know beside the model. It travels with the weights, so that no flag is remembered."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from sit_atconv import __version__


@dataclass(frozen=True)
class Recipe:
    """All that sampling must know beside the model itself.

    Args:
        interpolant: "linear", "gvp" or "vp".
        prediction: what the model's output stands for.
        codec: what `Codec.describe()` returned.
        class_names: names of labels 0, 1, ...
        step: optimizer steps behind these weights.
        ema_decay: decay of the average that these weights are; None for the weights as trained.
        null_label_trained: whether labels were ever dropped, so that guidance has something to guide with; None where
            that is not known (weights older than this field), which is taken for yes.
        empty_classes: labels of which no image was trained on; they are drawn only where they are asked for.
        ema_known: False where nobody says whether these weights are averaged; `ema_decay` is None then.
        versions: of what wrote them.
        objective: class path and options of an objective other than `FlowMatching`; None for that one.
        backbone: class path of a model other than `SiT`; None for that one.
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
    versions: dict[str, str] = field(default_factory=lambda: versions())
    objective: dict | None = None
    backbone: str | None = None

    def null_label_of(self, model) -> int | None:
        """The label that guidance takes for no class; None where there is none, or none that was trained."""
        return None if self.null_label_trained is False else model.null_label

    @property
    def average(self) -> str | None:
        """What the weights are called: "EMA", or "as trained"; None where that is not known."""
        if not self.ema_known:
            return None
        return "as trained" if self.ema_decay is None else "EMA"

    def save(self, folder: Path) -> None:
        """Writes recipe.json. Fields of later versions are left out at their default, so that earlier ones read it."""
        later = {"objective", "backbone"}
        content = {name: value for name, value in dataclasses.asdict(self).items() if name not in later or value}
        (folder / "recipe.json").write_text(json.dumps(content, indent=1))


def versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"sit_atconv": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
