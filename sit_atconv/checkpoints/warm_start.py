"""Warm starts: training from existing weights. All that fits the model is kept, the rest is reported."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sit_atconv.checkpoints.class_names import changed_names, labels_there
from sit_atconv.checkpoints.exported import load_model
from sit_atconv.checkpoints.published import REPA_OPTIONS, read_published
from sit_atconv.checkpoints.published_models import null_label_trained, said_flow, said_names
from sit_atconv.checkpoints.tensors import (
    LABELS,
    LISTED,
    OUTPUT,
    POSITIONS,
    SECOND_TIME,
    Kind,
    list_differences,
    mixer_kinds,
)
from sit_atconv.checkpoints.training_state import AUXILIARY_FILE
from sit_atconv.checkpoints.weights import is_without_recipe, load_weights, locate_weights
from sit_atconv.models.mixers import MIXERS
from sit_atconv.models.sit import SiT, sincos_pos_embed
from sit_atconv.runtime.settings import differences, flatten

BIAS_OF_TIME = "t_embedder.mlp.2.bias"
LEARNED = 4e-3  # a position embedding further than this from sines and cosines was trained, not just rounded to bf16


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    Args:
        tensors: name -> tensor, on the CPU.
        kind: words for the user: "EMA" or "as trained", and the step.
        config: the known options of their model.
        training: the known ones of interpolant, prediction, objective and codec (as in `Codec.describe()`).
        class_names: names of labels 0, 1, ..., or None if not known.
        null_label_trained: as in `Recipe`.
        lines: notes for the user.
        auxiliary: trained tensors of their auxiliary loss, such as projectors.
    """

    tensors: dict[str, Tensor]
    kind: list[str]
    config: dict
    training: dict = field(default_factory=dict)
    class_names: list[str] | None = None
    null_label_trained: bool | None = None
    lines: list[str] = field(default_factory=list)
    auxiliary: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """Result of a warm start.

    Args:
        lines: for the user: what was kept, what starts from scratch, and which settings differ.
        null_label_trained: True if the model kept the row of a null label that was trained, None if it kept a row of
            which this is not known.
    """

    lines: list[str]
    null_label_trained: bool | None


@dataclass(frozen=True)
class Special:
    """Tensors that are not simply copied.

    Args:
        names: their names, in the weights or in the model.
        values: name -> new value; tensors without one stay as they were initialised.
        lines: notes for the user.
    """

    names: set[str] = field(default_factory=set)
    values: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def start_from(
    net: SiT,
    ckpt: str,
    flow_path: str,
    prediction: str,
    codec: dict,
    *,
    class_names: list[str] | None = None,
    objective: dict | None = None,
    auxiliary: nn.Module | None = None,
) -> Start:
    """Copies into `net` the tensors of `ckpt` that have the same name and shape.

    The other tensors keep their initial values. The models may differ in class count, resolution, mixers and
    `learn_sigma`; any other difference is an error.

    Args:
        net: the model, changed in place, completely or not at all.
        ckpt: as for `load_weights`; the EMA weights of a run are used.
        flow_path: the interpolant of the training to come.
        prediction: the meaning of the model's output in that training.
        codec: what `Codec.describe()` returns for that training.
        class_names: class names of the data. If the weights have the same names, the rows of the label table follow
            them. None compares no names.
        objective: class path and arguments of an objective that is needed to sample, as in `Recipe`.
        auxiliary: the auxiliary loss, whose trained parameters are copied too if all of them fit.

    Raises:
        ValueError: the weights cannot be read, or their model has another width, depth, patch or number of channels.
    """
    source = _open(ckpt)
    here = net.state_dict()  # shares its memory with the model
    specials = [
        _position_table(net, source.tensors),
        _mixers(net, here, source),
        _label_table(net, here[LABELS], source, class_names),
        _output_layer(net, here, source.tensors),
        _second_time(net, source.tensors),
    ]
    settled = set().union(*(special.names for special in specials))
    plain = {name: tensor for name, tensor in source.tensors.items() if name not in settled}
    if wrong := list_differences(plain, {name: tensor for name, tensor in here.items() if name not in settled}):
        raise ValueError(
            f"the weights of {ckpt} are of another model: {wrong}. Give the --preset that they have, or "
            "their model.hidden_size, depth, patch_size, in_channels, mlp_ratio"
        )

    values = plain | {name: value for special in specials for name, value in special.values.items()}
    for name, value in values.items():
        here[name].copy_(value)
    wanted = values.keys() | here.keys() - {POSITIONS}  # the position embedding is computed
    kind = f" ({', '.join(source.kind)})" if source.kind else ""
    lines = [
        f"started from {ckpt}{kind}: {len(values)} of {len(wanted)} tensors kept",
        *source.lines,
        *(line for special in specials for line in special.lines),
        *_start_auxiliary(auxiliary, source),
        *_silent_options(net, here, source),
        *_training_differences(source, _training(flow_path, prediction, objective, codec)),
        *_class_name_differences(net, source, class_names),
    ]
    classes = net.config.num_classes
    kept = net.config.has_null_label and _num_classes(source, classes) == classes < len(source.tensors[LABELS])
    return Start(lines, source.null_label_trained if kept else False)


def _open(ckpt: str) -> Source:
    path = locate_weights(ckpt)
    if path.is_file():
        published = read_published(path)
        args = published.args
        config: dict = {**REPA_OPTIONS} if published.repa else {}
        if type(args.get("num_classes")) is int:
            config["num_classes"] = args["num_classes"]
        rows = len(published.tensors.get(LABELS, ()))
        return Source(
            published.tensors,
            {True: ["EMA"], False: ["as trained"], None: []}[published.ema],
            config,
            said_flow(path, published),
            class_names=said_names(args, config.get("num_classes", rows - 1)),
            null_label_trained=null_label_trained(True, args),
            lines=["these are REPA's weights: their direction of time was reversed"] if published.repa else [],
            auxiliary=published.projectors,
        )
    if is_without_recipe(path):
        model = load_model(path)
        return Source(model.state_dict(), [], dict(model.config))
    weights = load_weights(ckpt)
    recipe = weights.recipe
    learned = [f"these weights have learned the guidance scale {recipe.trained_cfg:g}"]
    return Source(
        weights.model.state_dict(),
        [*([recipe.average] if recipe.average else []), *([f"step {recipe.step}"] if recipe.step else [])],
        dict(weights.model.config),
        _training(recipe.interpolant, recipe.prediction, recipe.objective, recipe.codec),
        recipe.class_names,
        recipe.null_label_trained,
        [*weights.notes, *(learned if recipe.trained_cfg != 1 else [])],
        _auxiliary_beside(path),
    )


def _auxiliary_beside(weights: Path) -> dict[str, Tensor]:
    """Returns the tensors of the auxiliary loss that belong to a folder of weights in a checkpoint.

    ValueError: their file is damaged.
    """
    file = weights.parent / AUXILIARY_FILE
    try:
        tensors = load_file(file) if file.exists() else {}
    except Exception as error:  # safetensors has a type of its own
        raise ValueError(f"{file} is damaged: take another checkpoint") from error
    prefix = f"{weights.name}/"
    averaged = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return averaged or {name: tensor for name, tensor in tensors.items() if "/" not in name}  # as trained


def _start_auxiliary(auxiliary: nn.Module | None, source: Source) -> list[str]:
    """Copies the trained parameters of the auxiliary loss if all of them fit, and says so."""
    there = source.auxiliary
    here = {} if auxiliary is None else {name: p for name, p in auxiliary.named_parameters() if p.requires_grad}
    if not there:
        return ["the parameters of the auxiliary loss start from scratch: the weights have none"] if here else []
    if not here:
        return [f"{len(there)} tensors of projectors are left out: this run trains none"]
    if wrong := list_differences(there, here):
        return [f"the parameters of the auxiliary loss start from scratch: {wrong}"]
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(there[name])
    return [f"{len(here)} tensors of the auxiliary loss kept, which fit only the encoder that they were trained with"]


def _training(interpolant: str, prediction: str, objective: dict | None, codec: dict) -> dict:
    class_path = objective["class_path"] if objective else "path and prediction alone"
    return {"interpolant": interpolant, "prediction": prediction, "objective": class_path, "codec": codec}


def _position_table(net: SiT, there: dict[str, Tensor]) -> Special:
    """Copies the position embedding only if it was trained; otherwise it follows from the resolution."""
    table = there.get(POSITIONS)
    if net.pos_embed is None:
        lines = [] if table is None else ["position embedding left out: this model has none"]
        return Special({POSITIONS}, lines=lines)
    if table is None:
        return Special({POSITIONS}, lines=["position embedding added: the weights have none"])
    computed = sincos_pos_embed(net.config.hidden_size, net.grid_size).to(table.dtype)  # rounded as theirs
    if table.shape != computed.shape or (table.double() - computed.double()).abs().max() <= LEARNED:
        return Special({POSITIONS})
    return Special({POSITIONS}, {POSITIONS: table}, ["position embedding copied: it was trained (frozen here)"])


def _mixers(net: SiT, here: dict[str, Tensor], source: Source) -> Special:
    """Skips the mixers of another kind: their projections of the same name and shape mean something else."""
    kinds, kinds_there = mixer_kinds(here, net.config), mixer_kinds(source.tensors, source.config)
    fresh: dict[tuple[Kind, Kind], list[int]] = {}
    for i, kind in kinds.items():
        if kinds_there.get(i, kind) != kind:
            fresh.setdefault((kinds_there[i], kind), []).append(i)
    if not fresh:
        return Special()
    prefixes = tuple(f"blocks.{i}.attn." for blocks in fresh.values() for i in blocks)
    names = {name for name in itertools.chain(here, source.tensors) if name.startswith(prefixes)}
    groups = [f"{_blocks(blocks, len(kinds))} ({a} there, {b} here)" for (a, b), blocks in fresh.items()]
    return Special(names, lines=[f"mixers of {' and of '.join(groups)} start from scratch"])


def _blocks(blocks: list[int], depth: int) -> str:
    """Names blocks: [0, 1, 2, 5] -> "blocks 0-2, 5"; [1, 3, 5, 7] -> "blocks 1, 3, ..., 7"."""
    if len(blocks) == depth:
        return f"all {depth} blocks"
    steps = {b - a for a, b in itertools.pairwise(blocks)}
    if len(blocks) > 3 and len(steps) == 1 and steps != {1}:
        return f"blocks {blocks[0]}, {blocks[1]}, ..., {blocks[-1]}"
    numbered = itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])  # consecutive blocks share this
    runs = [[i for _, i in run] for _, run in numbered]
    spoken = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {spoken}"


def _label_table(net: SiT, fresh: Tensor, source: Source, class_names: list[str] | None) -> Special:
    """Copies the label table, its rows in the order of the class names, if the class count is the same."""
    table, classes = source.tensors.get(LABELS), net.config.num_classes
    if table is None or table.shape[1:] != fresh.shape[1:]:
        return Special()  # the error is that of any other tensor
    if _num_classes(source, classes) != classes:
        there = f"{source.config['num_classes']} classes" if "num_classes" in source.config else f"{len(table)} rows"
        here = f"{classes} classes{' and the null label' if net.config.has_null_label else ''}"
        return Special({LABELS}, lines=[f"the label table starts from scratch: {there} there, {here} here"])
    value, lines, order = fresh.clone(), [], None
    if source.class_names and class_names:
        order = labels_there(source.class_names, class_names)
        if order not in (None, list(range(classes))):
            lines.append(
                "the label table's rows follow the class names, whose order differs: "
                f"{changed_names(source.class_names, class_names)}"
            )
    value[:classes] = table[:classes] if order is None else table[order]
    if len(table) > len(fresh):
        lines.append("the null label's row is left out: this model has none (has_null_label is false)")
    elif len(table) < len(fresh):
        lines.append("the null label's row starts from scratch: the weights have none (guidance needs it trained)")
    else:
        value[classes:] = table[classes:]
    return Special({LABELS}, {LABELS: value}, lines)


def _num_classes(source: Source, expected: int) -> int | None:
    """Returns the weights' number of classes: recorded, or `expected` if their rows allow it, or None."""
    if "num_classes" in source.config:
        return source.config["num_classes"]
    return expected if len(source.tensors[LABELS]) - expected in (0, 1) else None


def _output_layer(net: SiT, here: dict[str, Tensor], there: dict[str, Tensor]) -> Special:
    """Copies the shared output channels, the first c of rows (p, q, c), if only one has `learn_sigma`."""
    p, channels, ours = net.config.patch_size, net.config.in_channels, len(here[OUTPUT[1]])
    theirs = p * p * channels * (1 if net.config.learn_sigma else 2)
    if any(name not in there or there[name].shape != (theirs, *here[name].shape[1:]) for name in OUTPUT):
        return Special()
    values = {}
    for name in OUTPUT:
        values[name] = here[name].clone()
        shared = [t.unflatten(0, (p * p, -1))[:, :channels] for t in (values[name], there[name])]
        shared[0].copy_(shared[1])
    if ours > theirs:
        line = f"the {channels} learn_sigma channels of the output layer start from scratch: the weights have none"
    else:
        line = f"the {channels} learn_sigma channels of the output layer are left out: this model has none"
    return Special(set(OUTPUT), values, [line])


def _second_time(net: SiT, there: dict[str, Tensor]) -> Special:
    """Adds the embedding of r - t, which starts as zero, or leaves it out, and keeps its value for r = t."""
    names = {name for name in there if name.startswith(SECOND_TIME)}
    if net.config.get("two_times") and not names:
        return Special(
            {name for name in net.state_dict() if name.startswith(SECOND_TIME)},
            lines=["the embedding of the second time starts as zero: the model first samples as these weights do"],
        )
    if names and not net.config.get("two_times"):
        parts = [f"{SECOND_TIME}mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
        if {*parts, BIAS_OF_TIME} - there.keys():
            return Special()  # the error is that of any other tensor
        w0, b0, w2, b2 = (there[name] for name in parts)
        cosines = w0[:, : w0.shape[1] // 2].sum(1)  # at r - t = 0 the cosines are 1, and the sines 0
        value = there[BIAS_OF_TIME] + w2 @ F.silu(cosines + b0) + b2
        line = "the embedding of the second time is left out: this model computes what that one did for r = t"
        return Special({*names, BIAS_OF_TIME}, {BIAS_OF_TIME: value}, [line])
    return Special()


def _silent_options(net: SiT, here: dict[str, Tensor], source: Source) -> list[str]:
    """Describes differing options that no tensor shows, if mixers that use them are kept."""
    there = mixer_kinds(source.tensors, source.config)
    kept = {kind.name for i, kind in mixer_kinds(here, net.config).items() if there[i] == kind}
    silent = sorted({option for name in kept for option in MIXERS.find(name).silent})
    return [
        f"model.{name} is {source.config[name]} there, "
        f"{net.config[name]} here: the mixers kept were trained with the former"
        for name in silent
        if source.config.get(name, net.config[name]) != net.config[name]
    ]


def _training_differences(source: Source, training: dict) -> list[str]:
    there, here = flatten(source.training), flatten(training)
    known = {name: there.get(name, value) for name, value in here.items()}
    changes = differences(known, here, ignored=["codec.source"])
    return [f"the weights were trained with other settings: {', '.join(changes)}"] if changes else []


def _class_name_differences(net: SiT, source: Source, class_names: list[str] | None) -> list[str]:
    """Describes class names that differ although the rows of the label table are kept by number."""
    if not class_names or _num_classes(source, net.config.num_classes) != net.config.num_classes:
        return []
    if source.class_names is None:
        becomes = [f"label {label} becomes {name!r}" for label, name in enumerate(class_names[:LISTED])]
        more = ", ..." if len(class_names) > LISTED else ""
        return [f"the weights do not name their classes: {', '.join(becomes)}{more}"]
    changed = changed_names(source.class_names, class_names)
    if not changed or labels_there(source.class_names, class_names):
        return []
    return [f"class names differ, and the label table is kept: {changed}"]
