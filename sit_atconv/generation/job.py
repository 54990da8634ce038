"""The sampling job of `sample/generate.py`: its options, checked before anything is drawn."""

import hashlib
import json
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.checkpoints.class_names import changed_names, labels_there
from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import Codec, open_codec
from sit_atconv.data.pixels import UINT8_RULE
from sit_atconv.flow import as_trained
from sit_atconv.generation.folder import SamplesFolder
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
class SampleJob:
    """A checked job: everything that drawing needs."""

    options: GenerateOptions
    sampler: Sampler  # settled
    weights: Weights
    weak: Weights | None  # for autoguidance
    codec: Codec
    given: list[int]  # labels, repeated in turn; empty if the stream draws them
    shape: tuple[int, int, int]  # (C, h, w) of the noise
    settings: dict  # everything that the images depend on
    folder: SamplesFolder
    missing: list[int]  # indices of samples that the folder lacked at the start
    notes: list[str]  # lines to print for the user

    def labels(self, stream: SampleStream) -> Tensor:
        """Returns the labels (B,) of the stream's samples."""
        if self.given:
            return torch.tensor([self.given[i % len(self.given)] for i in stream.indices])
        recipe = self.weights.recipe
        return stream.labels(len(recipe.class_names), self.options.labels, recipe.empty_classes)


def prepare(options: GenerateOptions) -> SampleJob:
    """Loads weights and codec, and checks everything that can be checked before drawing.

    Raises:
        ValueError: weights or codec cannot be loaded, settings do not fit them, labels are out of range, the folder
            holds other files, or the disk is too small.
    """
    # Load the models.
    weights = load_weights(options.ckpt, options.ema, model=options.model, vae=options.vae)
    recipe, config = weights.recipe, weights.model.config
    as_trained(weights.model, recipe)  # raises an error now if the module of its objective is not imported
    weak = _load_weak(options.weak, weights, options.vae)

    # Check the settings.
    sampler = options.sampler.settled(recipe.interpolant, weak=weak is not None, **weights.traits)
    sampler.check(recipe.interpolant, recipe.prediction, weak=weak is not None, **weights.traits)
    if weak is not None and SOLVERS.find(sampler.solver).jumps and not weak.traits["two_times"]:
        raise ValueError(f"--solver {sampler.solver} needs two times of the weak model, too: give --solver unipc")
    codec = open_codec(recipe.codec, precision="fp32" if options.dtype == "fp32" else "tf32")
    if sampler.cfg_channels and sampler.cfg_channels > codec.channels:
        raise ValueError(
            f"--cfg-channels {sampler.cfg_channels} is more than the model's {codec.channels} channels: give fewer"
        )
    given, labels = _given_labels(options, recipe.class_names)
    height, width = _image_size(options.size, codec, config)
    shape = (codec.channels, height // codec.downsample, width // codec.downsample)
    settings = {
        **sampler.settings(),
        "labels": labels,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "size": (height, width),
        "dtype": options.dtype,
        "compile": options.compile,
        "weights": weights.identity(),
        "model": {
            name: value
            for name, value in config.items()
            if not name.startswith("_") and (name not in LATER_OPTIONS or value != LATER_OPTIONS[name])
        },
        "path": recipe.interpolant,
        "prediction": recipe.prediction,
        "weak": weak.identity() if weak else None,
        "codec": codec.identity(),
        "uint8_rule": UINT8_RULE,
        **({"empty_classes": recipe.empty_classes} if recipe.empty_classes else {}),
    }
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in a manifest that is read

    # Choose the folder, and see what is missing there.
    is_trained_size = shape[1:] == (config.input_size, config.input_size)
    name = _folder_name(options, sampler, settings, recipe.step, is_trained_size)
    folder = SamplesFolder(options.out if options.out is not None else Path(weights.home, "samples", name))
    folder.check(settings)
    latent_bytes = 4 * math.prod(shape) if options.latents else 0
    folder.check_room(options.num_samples, 3 * height * width, options.npz, latent_bytes)
    missing = folder.missing(options.num_samples, options.latents)

    # Collect notes for the user.
    untrained = sorted({*given} & {*recipe.empty_classes})
    notes = [
        *weights.notes,
        *(f"label {label} ({recipe.class_names[label]!r}) had no training images" for label in untrained),
    ]
    if options.sampler.cfg is None and sampler.cfg == 1:
        if recipe.trained_cfg != 1:
            notes.append(
                f"samples need no guidance: the weights have learned the scale {recipe.trained_cfg:g} (--cfg 1)"
            )
        elif weights.null_label is None:
            why = "has no null label" if weights.model.null_label is None else "was trained without label dropout"
            notes.append(f"samples are not guided (--cfg 1): the model {why}")
        else:
            notes.append(f"samples are not guided: with solver {sampler.solver}, --cfg takes two forwards a step")
    if options.out is None and not folder.folder.exists() and (fewer := folder.with_fewer(settings)):
        notes.append(f"{fewer} holds some of these samples: add --out {shlex.quote(str(fewer))} to draw the rest")
    return SampleJob(options, sampler, weights, weak, codec, given, shape, settings, folder, missing, notes)


def _load_weak(ckpt: str | None, weights: Weights, vae: str | None) -> Weights | None:
    """Loads the weak model and orders its labels as the model's. ValueError: it is of another kind."""
    if ckpt is None:
        return None
    if Path(ckpt).is_file():
        raise ValueError(f"--weak {ckpt} is a file: make a folder of it, python -m sit_atconv.convert {ckpt} OUT")
    weak = load_weights(ckpt, vae=vae)
    here, there = (
        {
            "interpolant": w.recipe.interpolant,
            "prediction": w.recipe.prediction,
            "classes": w.model.config.num_classes,
            "channels": w.model.config.in_channels,
            "codec": {key: value for key, value in w.recipe.codec.items() if key != "source"},
        }
        for w in (weights, weak)
    )
    for name, value in here.items():
        if there[name] != value:
            raise ValueError(
                f"the weak model has {name} {there[name]}, and the model {value}: autoguidance needs a "
                "smaller or less trained model of the same kind"
            )
    class_names = weak.recipe.class_names, weights.recipe.class_names
    if (order := labels_there(*class_names)) is not None:
        table = weak.model.y_embedder.embedding_table.weight.data
        table[: len(order)] = table[order]
    elif [*map(str, range(len(class_names[0])))] not in class_names:  # both name their classes
        raise ValueError(
            f"the weak model has other classes: {changed_names(*class_names)}. Autoguidance needs a "
            "model with the same classes"
        )
    return weak


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
    for side in size:
        if side % unit:
            raise ValueError(
                f"size {side} is not divisible by {unit} (patch size {config.patch_size} x codec "
                f"downsampling {codec.downsample}): give {side // unit * unit or unit}"
            )
    size = size or (config.input_size * codec.downsample,)
    return size[0], size[-1]


def _folder_name(options: GenerateOptions, sampler: Sampler, settings: dict, step: int, is_trained_size: bool) -> str:
    """Returns a folder name with every setting, so that different settings never share a folder."""
    solver, ema = SOLVERS.find(sampler.solver), options.ema
    grid = "_".join(f"{t:g}" for t in sampler.times) if sampler.times else str(sampler.steps)
    parts = [
        f"step{step:07d}",
        "" if ema is True else f"ema{ema:g}" if ema is not False else "online",
        settings.get("guidance", ""),
        f"cfg{sampler.cfg:g}" + (f"on{sampler.cfg_channels}" if sampler.cfg_channels else ""),
        sampler.cfg_schedule if sampler.cfg_schedule != "constant" else "",
        "{:g}to{:g}".format(*sampler.cfg_interval) if sampler.cfg_interval != (0.0, 1.0) else "",
        f"weak{settings['weak'][:8]}" if settings["weak"] else "",
        sampler.solver + ("" if solver.is_adaptive else grid),
        f"shift{sampler.shift:g}" if sampler.shift != 1 else "",
        *(
            (sampler.diffusion_form, f"{sampler.diffusion_norm:g}", sampler.last_step, f"{sampler.last_step_size:g}")
            if solver.is_sde
            else ()
        ),
        settings["labels"],
        f"seed{options.seed}",
        f"n{options.num_samples}",
        "x".join(map(str, settings["size"])) if not is_trained_size else "",
        options.dtype if options.dtype != "fp32" else "",
        "compiled" if options.compile else "",
    ]
    short = (part if len(part) < 40 else hashlib.sha256(part.encode()).hexdigest()[:12] for part in parts if part)
    return "-".join(short)
