"""A drawing: checked settings, and the models that draw with them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.checkpoints.exported import Weights
from sit_atconv.data.codecs import Codec
from sit_atconv.data.pixels import UINT8_RULE
from sit_atconv.flow import as_trained
from sit_atconv.generation.labels import read_labels, typed_label
from sit_atconv.models.sit import LATER_OPTIONS
from sit_atconv.runtime.files import sha256_of
from sit_atconv.sampling import SOLVERS, Sampler, SampleStream


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `sample/generate.py`, whose `--help` explains them."""

    ckpt: str
    sampler: Sampler = field(default_factory=Sampler)
    model: str | None = None
    vae: str | None = None
    ema: bool | float = True
    weak: str | None = None
    classes: tuple[str, ...] = ()
    labels: str = "random"
    num_samples: int = 100
    seed: int = 0
    size: tuple[int, ...] = ()
    dtype: str = "fp32"
    batch_size: int = 64
    compile: bool = False
    latents: bool = False
    npz: bool = True
    out: str | None = None


@dataclass(frozen=True)
class Drawing:
    """Checked settings and the models that draw with them.

    Args:
        options: the options as given.
        sampler: the sampling settings, settled.
        weights: the model.
        weak: a weaker model, for autoguidance.
        codec: decodes the latents.
        given: labels that are repeated in turn; empty if the stream draws them.
        label_rule: where the labels come from: "random", "balanced", or a name for the given ones.
        shape: (C, h, w) of the noise.
    """

    options: GenerateOptions
    sampler: Sampler
    weights: Weights
    weak: Weights | None
    codec: Codec
    given: list[int]
    label_rule: str
    shape: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.shape[1] * self.codec.downsample, self.shape[2] * self.codec.downsample

    @property
    def has_trained_size(self) -> bool:
        side = self.weights.model.config.input_size
        return self.shape[1:] == (side, side)

    def labels(self, stream: SampleStream) -> Tensor:
        """Returns the labels (B,) of the stream's samples."""
        if self.given:
            return torch.tensor([self.given[i % len(self.given)] for i in stream.indices])
        recipe = self.weights.recipe
        return stream.labels(len(recipe.class_names), self.options.labels, recipe.empty_classes)

    def settings(self) -> dict:
        """Returns everything that the images depend on, for a manifest; reads the files of the weights."""
        options, recipe = self.options, self.weights.recipe
        return {
            **self.sampler.settings(),
            "labels": self.label_rule,
            "num_samples": options.num_samples,
            "seed": options.seed,
            "size": self.size,
            "dtype": options.dtype,
            "compile": options.compile,
            "weights": self.weights.identity(),
            "model": {
                name: value
                for name, value in self.weights.model.config.items()
                if not name.startswith("_") and (name not in LATER_OPTIONS or value != LATER_OPTIONS[name])
            },
            "path": recipe.interpolant,
            "prediction": recipe.prediction,
            "weak": self.weak.identity() if self.weak else None,
            "codec": self.codec.identity(),
            "uint8_rule": UINT8_RULE,
            **({"empty_classes": recipe.empty_classes} if recipe.empty_classes else {}),
        }


def check_drawing(options: GenerateOptions, weights: Weights, codec: Codec, weak: Weights | None = None) -> Drawing:
    """Settles the options for loaded models.

    Raises:
        ValueError: options do not fit each other or the models, or labels are out of range.
    """
    recipe, config = weights.recipe, weights.model.config
    as_trained(weights.model, recipe)  # raises an error now if the module of its objective is not imported
    sampler = options.sampler.settled(recipe.interpolant, weak=weak is not None, **weights.traits)
    sampler.check(recipe.interpolant, recipe.prediction, weak=weak is not None, **weights.traits)
    if weak is not None and SOLVERS.find(sampler.solver).jumps and not weak.traits["two_times"]:
        raise ValueError(f"--solver {sampler.solver} needs two times of the weak model, too: give --solver unipc")
    if sampler.cfg_channels and sampler.cfg_channels > codec.channels:
        raise ValueError(
            f"--cfg-channels {sampler.cfg_channels} is more than the model's {codec.channels} channels: give fewer"
        )
    given, rule = _given_labels(options, recipe.class_names)
    height, width = _image_size(options.size, codec, config)
    shape = (codec.channels, height // codec.downsample, width // codec.downsample)
    return Drawing(options, sampler, weights, weak, codec, given, rule, shape)


def _given_labels(options: GenerateOptions, class_names: list[str]) -> tuple[list[int], str]:
    """Returns labels to repeat in turn, or [] if the stream draws them, and a name for these labels."""
    if options.classes:
        if options.labels != "random":
            raise ValueError(f"--classes and --labels {options.labels} contradict each other: give one of them")
        labels = [typed_label(given, class_names) for given in options.classes]
        return labels, "classes" + "_".join(map(str, labels))
    if options.labels in ("random", "balanced"):
        return [], options.labels
    labels = read_labels(Path(options.labels), class_names)
    if len(labels) < options.num_samples:
        raise ValueError(
            f"{options.labels} has {len(labels)} labels, and --num-samples is {options.num_samples}: "
            "give at least as many labels"
        )
    return labels, "labels" + sha256_of(Path(options.labels))[:12]


def _image_size(size: tuple[int, ...], codec: Codec, config) -> tuple[int, int]:
    """Returns height and width in pixels; `size` has both, one side, or nothing for the training size."""
    if len(size) > 2:
        raise ValueError(f"size takes one side or two, not {len(size)}")
    unit = codec.downsample * config.patch_size
    names = ("height", "width") if len(size) == 2 else ("size",) * len(size)
    for name, side in zip(names, size, strict=True):
        if side % unit:
            raise ValueError(
                f"{name} {side} is not divisible by {unit} (patch size {config.patch_size} x codec "
                f"downsampling {codec.downsample}): give {side // unit * unit or unit}"
            )
    size = size or (config.input_size * codec.downsample,)
    return size[0], size[-1]
