"""What training asks of an objective, so that users can bring one of their own.

    accelerate launch sit_atconv/train.py --flow my_module.MyObjective --flow.my_option 3
"""

import abc

import torch
from torch import Tensor

from sit_atconv.flow.interpolants import Interpolant, as_velocity, get_interpolant
from sit_atconv.runtime.tables import Table


class Objective(abc.ABC):
    """What is drawn in a step, what is regressed, and how the trained model becomes a velocity.

    The arguments of a subclass's constructor are the options of the group `flow`.

    Attributes:
        path: name of the interpolant along which the trained model is sampled.
        prediction: what the model's output stands for: "velocity", "noise", "score" or "data".
        class_dropout_prob: probability that a label is replaced by the null label; 0 leaves the null label untrained.
    """

    path: str = "linear"
    prediction: str = "velocity"
    class_dropout_prob: float = 0.0

    @property
    def interpolant(self) -> Interpolant:
        return get_interpolant(self.path)

    @abc.abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator):
        """Draws all that chance decides for a batch (B, C, H, W), on the generator's device.

        Returns:
            A value with times `t` (B,), which `draw[rows]` cuts to some of the samples.
        """

    @abc.abstractmethod
    def loss(self, model, data: Tensor, y: Tensor, draw, null_label: int | None) -> dict[str, Tensor]:
        """Computes the loss of each sample.

        Args:
            model: (x, t, y) -> its prediction (B, C, H, W).
            data: images or latents (B, C, H, W).
            y: labels (B,).
            draw: what `draw` returned for these samples.
            null_label: label that replaces dropped ones; None if the model has none.

        Returns:
            Terms by name, (B,) each. The first is minimised; the others are only logged.
        """

    def velocity(self, model):
        """Turns the trained model into a callable (x, t, y) -> velocity with the model's `null_label`."""
        return as_velocity(model, self.interpolant, self.prediction)

    @classmethod
    def is_needed_to_sample(cls) -> bool:
        """True if path and prediction do not say how to sample: `velocity` or `interpolant` is the class's own."""
        return (cls.velocity, cls.interpolant) != (Objective.velocity, Objective.interpolant)


OBJECTIVES = Table("objective", type, {})


def as_trained(model, recipe):
    """Turns a model into a callable (x, t, y) whose output is what `recipe.prediction` says.

    Args:
        model: what training left.
        recipe: of its weights; `objective` holds class path and arguments of an objective that is needed to sample.

    Raises:
        ValueError: the module of its objective is not imported.
    """
    if recipe.objective is None:
        return model
    return OBJECTIVES.find(recipe.objective["class_path"])(**recipe.objective.get("init_args", {})).velocity(model)
