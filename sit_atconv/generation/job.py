"""The sampling job of `sample/generate.py`: checked before anything is drawn."""

import hashlib
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from sit_atconv.checkpoints.class_names import changed_names, labels_there
from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import open_codec
from sit_atconv.generation.drawing import Drawing, GenerateOptions, check_drawing
from sit_atconv.generation.folder import SamplesFolder
from sit_atconv.sampling import SOLVERS


@dataclass(frozen=True)
class SampleJob:
    """A drawing into a folder.

    Args:
        drawing: what is drawn.
        settings: everything that the images depend on.
        folder: the folder.
        missing: indices of samples that the folder lacked at the start.
        notes: lines to print for the user.
    """

    drawing: Drawing
    settings: dict
    folder: SamplesFolder
    missing: list[int]
    notes: list[str]


def prepare(options: GenerateOptions) -> SampleJob:
    """Loads weights and codec, and checks everything that can be checked before drawing.

    Raises:
        ValueError: weights or codec cannot be loaded, settings do not fit them, labels are out of range, the folder
            holds other files, or the disk is too small.
    """
    weights = load_weights(options.ckpt, options.ema, model=options.model, vae=options.vae)
    weak = _load_weak(options.weak, weights, options.vae)
    codec = open_codec(weights.recipe.codec, precision="fp32" if options.dtype == "fp32" else "tf32")
    drawing = check_drawing(options, weights, codec, weak)
    settings = json.loads(json.dumps(drawing.settings()))  # tuples become lists, as in a manifest that is read

    # Choose the folder, and see what is missing there.
    name = _folder_name(drawing, settings)
    folder = SamplesFolder(options.out if options.out is not None else Path(weights.home, "samples", name))
    folder.check(settings)
    latent_bytes = 4 * math.prod(drawing.shape) if options.latents else 0
    folder.check_room(options.num_samples, 3 * math.prod(drawing.size), options.npz, latent_bytes)
    missing = folder.missing(options.num_samples, options.latents)
    notes = notes_on(drawing)
    if options.out is None and not folder.folder.exists() and (fewer := folder.with_fewer(settings)):
        notes.append(f"{fewer} holds some of these samples: add --out {shlex.quote(str(fewer))} to draw the rest")
    return SampleJob(drawing, settings, folder, missing, notes)


def notes_on(drawing: Drawing) -> list[str]:
    """Returns lines for the user about weights, labels and guidance."""
    weights, sampler, recipe = drawing.weights, drawing.sampler, drawing.weights.recipe
    untrained = sorted({*drawing.given} & {*recipe.empty_classes})
    notes = [
        *weights.notes,
        *(f"label {label} ({recipe.class_names[label]!r}) had no training images" for label in untrained),
    ]
    if drawing.options.sampler.cfg is None and sampler.cfg == 1:
        if recipe.trained_cfg != 1:
            notes.append(
                f"samples need no guidance: the weights have learned the scale {recipe.trained_cfg:g} (--cfg 1)"
            )
        elif weights.null_label is None:
            why = "has no null label" if weights.model.null_label is None else "was trained without label dropout"
            notes.append(f"samples are not guided (--cfg 1): the model {why}")
        else:
            notes.append(f"samples are not guided: with solver {sampler.solver}, --cfg takes two forwards a step")
    return notes


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


def _folder_name(drawing: Drawing, settings: dict) -> str:
    """Returns a folder name with every setting, so that different settings never share a folder."""
    options, sampler = drawing.options, drawing.sampler
    solver, ema = SOLVERS.find(sampler.solver), options.ema
    grid = "_".join(f"{t:g}" for t in sampler.times) if sampler.times else str(sampler.steps)
    parts = [
        f"step{drawing.weights.recipe.step:07d}",
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
        drawing.label_rule,
        f"seed{options.seed}",
        f"n{options.num_samples}",
        "x".join(map(str, drawing.size)) if not drawing.has_trained_size else "",
        options.dtype if options.dtype != "fp32" else "",
        "compiled" if options.compile else "",
    ]
    short = (part if len(part) < 40 else hashlib.sha256(part.encode()).hexdigest()[:12] for part in parts if part)
    return "-".join(short)
