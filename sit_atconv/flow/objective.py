"""Contract of training objectives, which users can implement themselves.

accelerate launch sit_atconv/train.py --flow my_module.MyObjective --flow.my_option 3
"""

import abc

import torch
from torch import Tensor

from sit_atconv.flow.interpolants import Interpolant, as_velocity, get_interpolant
from sit_atconv.runtime.tables import Table


class Objective(abc.ABC):
    """Base class of training objectives: random draws, loss, and the trained model as a velocity.

    The constructor's arguments of a subclass are the options of the group `flow`.

    Attributes:
        path: name of the interpolant along which the trained model is sampled.
        prediction: meaning of the model's output: "velocity", "noise", "score" or "data".
        class_dropout_prob: probability that a label is replaced by the null label; 0 leaves the null label untrained.
    """

    path: str = "linear"
    prediction: str = "velocity"
    class_dropout_prob: float = 0.0

    def check(self, net, precision: str) -> None:
        """Raises ValueError if the objective cannot train the model `net` in "fp32", "tf32", "bf16" or "fp16"."""
        if net.null_label is None and self.class_dropout_prob > 0:
            raise ValueError(
                "model.has_null_label is false, so labels cannot be dropped: set flow.class_dropout_prob to 0"
            )

    def at(self, progress: float) -> "Objective":
        """Returns the objective of a step, for one that changes with the progress of the run in [0, 1)."""
        return self

    @property
    def period(self) -> int:
        """Number of rows of a batch after which the kinds of its rows repeat."""
        return 1

    @property
    def trained_cfg(self) -> float:
        """Guidance scale that the weights learn, so that sampling needs no guidance; 1 is none."""
        return 1.0

    @property
    def forwards(self) -> float:
        """Forwards of an image in a step besides the one with gradient, to count the arithmetic."""
        return 0.0

    @property
    def interpolant(self) -> Interpolant:
        return get_interpolant(self.path)

    @abc.abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator):
        """Draws everything random for a batch of shape (B, C, H, W), on the generator's device.

        Returns:
            An object with times `t` (B,) that can be indexed: `draw[rows]` is the draw of these samples.
        """

    @abc.abstractmethod
    def loss(self, model, data: Tensor, y: Tensor, draw, null_label: int | None) -> dict[str, Tensor]:
        """Computes the loss of each sample.

        Args:
            model: (x, t, y) -> its prediction (B, C, H, W); (x, t, y, r) if it has two times. `model.net` is the bare
                module, for what needs no gradient.
            data: images or latents (B, C, H, W).
            y: labels (B,).
            draw: the draw of these samples, from `draw`.
            null_label: label that replaces dropped ones; None if the model has none.

        Returns:
            Terms by name, (B,) each. The first is minimised; the others are only logged.
        """

    def velocity(self, model):
        """Turns the trained model into a callable (x, t, y) -> velocity with the model's `null_label`."""
        return as_velocity(model, self.interpolant, self.prediction)

    @classmethod
    def is_needed_to_sample(cls) -> bool:
        """True if the class overrides `velocity` or `interpolant`, so that sampling needs the class."""
        return (cls.velocity, cls.interpolant) != (Objective.velocity, Objective.interpolant)


OBJECTIVES: Table[type[Objective]] = Table("objective", type, {})


def as_trained(model, recipe):
    """Turns a trained model into a callable (x, t, y) that predicts `recipe.prediction`.

    Args:
        model: the model as trained.
        recipe: recipe of its weights; `objective` holds class path and arguments of an objective needed to sample.

    Raises:
        ValueError: the module of that objective is not imported.
    """
    if recipe.objective is None:
        return model
    return OBJECTIVES.find(recipe.objective["class_path"])(**recipe.objective.get("init_args", {})).velocity(model)
