"""Training that starts from weights there are: what fits the new model is kept, and all else is said aloud."""

import itertools
from dataclasses import dataclass, field

from torch import Tensor

from sit_atconv.checkpoints.class_names import changed_names, labels_there
from sit_atconv.checkpoints.exported import load_model
from sit_atconv.checkpoints.published import REPA_OPTIONS, read_published
from sit_atconv.checkpoints.published_models import null_label_trained, said_flow, said_names
from sit_atconv.checkpoints.tensors import LABELS, LISTED, OUTPUT, POSITIONS, Kind, list_differences, mixer_kinds
from sit_atconv.checkpoints.weights import is_without_recipe, load_weights, locate_weights
from sit_atconv.models.mixers import MIXERS
from sit_atconv.models.sit import SiT, sincos_pos_embed

LEARNED = 4e-3  # a position table further than this from sines and cosines was trained, not just rounded to bf16


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    Args:
        tensors: name -> tensor, on the CPU.
        kind: which weights they are, for the user.
        config: the options of their model, as far as known.
        flow: their interpolant and prediction, as far as known.
        codec: of their latents, as `Codec.describe()` has it; empty where it is not known.
        class_names: None where they are not known.
        null_label_trained: as in `Recipe`.
        lines: what reading them has to say.
    """

    tensors: dict[str, Tensor]
    kind: list[str]
    config: dict
    flow: dict[str, str] = field(default_factory=dict)
    codec: dict = field(default_factory=dict)
    class_names: list[str] | None = None
    null_label_trained: bool | None = None
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """What a warm start did.

    Args:
        lines: for the user: what was kept, what starts afresh and what is different from the training of the weights.
        null_label_trained: whether the model has a null label whose row it kept and was trained; None where the row was
            kept and nobody knows.
    """

    lines: list[str]
    null_label_trained: bool | None


@dataclass(frozen=True)
class Special:
    """Tensors that are not simply copied.

    Args:
        names: theirs, in the weights and in the model.
        values: name -> what the model gets; those without stay as they were initialised.
        lines: what to tell the user.
    """

    names: set[str] = field(default_factory=set)
    values: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def start_from(
    net: SiT, ckpt: str, flow_path: str, prediction: str, codec: dict, *, class_names: list[str] | None = None,
    objective: dict | None = None,
) -> Start:
    """Copies into `net` what can be kept of the weights that `ckpt` names; the rest stays as it was initialised.

    Kept is what has the same name and shape. Never in the way are another class count, another resolution, other
    mixers and `learn_sigma` on one side only; whatever else differs is an error.

    Args:
        net: changed in place, all or nothing.
        ckpt: what `load_weights` takes (of a run, the EMA weights).
        flow_path: the interpolant that training will use.
        prediction: what the model's output will stand for.
        codec: what `Codec.describe()` returns.
        class_names: of the data to train on: rows of the label table follow the names where both have the same ones.
            None leaves them uncompared.
        objective: class path and arguments of an objective that is needed to sample, as `Recipe` has it.

    Raises:
        ValueError: the weights cannot be read, or are of a model of another width, depth, patch or channels.
    """
    source = _open(ckpt)
    here = net.state_dict()  # shares its memory with the model
    specials = [
        _position_table(net, source.tensors),
        _mixers(net, here, source),
        _label_table(net, here, source, class_names),
        _output_layer(net, here, source.tensors),
    ]
    settled = set().union(*(special.names for special in specials))
    plain = {name: tensor for name, tensor in source.tensors.items() if name not in settled}
    _check_same(plain, {name: tensor for name, tensor in here.items() if name not in settled}, ckpt)

    values = plain | {name: value for special in specials for name, value in special.values.items()}
    for name, value in values.items():
        here[name].copy_(value)
    wanted = values.keys() | here.keys() - {POSITIONS}  # the table is computed, not wanted
    kind = f" ({', '.join(source.kind)})" if source.kind else ""
    lines = [
        f"started from {ckpt}{kind}: {len(values)} of {len(wanted)} tensors kept",
        *source.lines,
        *(line for special in specials for line in special.lines),
        *_silent_options(net, here, source),
        *_training_differences(
            source, {"interpolant": flow_path, "prediction": prediction, "objective": _class_path(objective)}, codec),
        *_class_name_differences(net, source, class_names),
    ]
    return Start(lines, source.null_label_trained if _keeps_null_label(net, source) else False)


def _open(ckpt: str) -> Source:
    path = locate_weights(ckpt)
    if path.is_file():
        published = read_published(path)
        args, lines = published.args, []
        config = dict(REPA_OPTIONS) if published.repa else {}
        if published.repa:
            lines = ["these are REPA's weights: their direction of time was turned"]
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
            lines=lines,
        )
    if is_without_recipe(path):
        model = load_model(path)
        return Source(model.state_dict(), [], dict(model.config))
    weights = load_weights(ckpt)
    recipe = weights.recipe
    return Source(
        weights.model.state_dict(),
        [*([recipe.average] if recipe.average else []), *([f"step {recipe.step}"] if recipe.step else [])],
        dict(weights.model.config),
        {"interpolant": recipe.interpolant, "prediction": recipe.prediction,
         "objective": _class_path(recipe.objective)},
        recipe.codec,
        recipe.class_names,
        recipe.null_label_trained,
        list(weights.notes),
    )


def _class_path(objective: dict | None) -> str:
    return objective["class_path"] if objective else "one that path and prediction describe"


def _position_table(net: SiT, there: dict[str, Tensor]) -> Special:
    """The table follows from the resolution, so it is not copied, unless somebody has trained it."""
    table = there.get(POSITIONS)
    if net.pos_embed is None:
        lines = [] if table is None else ["position embedding left out: this model has none"]
        return Special({POSITIONS}, lines=lines)
    if table is None:
        return Special({POSITIONS}, lines=["position embedding added: the weights have none"])
    computed = sincos_pos_embed(net.config.hidden_size, net.grid_size).to(table.dtype)  # rounded as theirs
    if table.shape != computed.shape or (table.double() - computed.double()).abs().max() <= LEARNED:
        return Special({POSITIONS})
    return Special({POSITIONS}, {POSITIONS: table}, ["position embedding copied: theirs is learned (frozen here)"])


def _mixers(net: SiT, here: dict[str, Tensor], source: Source) -> Special:
    """Blocks with another mixer keep none of it: projections of the same name and shape mean something else there."""
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
    return Special(names, lines=[f"mixers of {' and of '.join(groups)} start afresh"])


def _blocks(blocks: list[int], depth: int) -> str:
    """[0, 1, 2, 5] -> "blocks 0-2, 5"; [1, 3, 5, 7] -> "blocks 1, 3, ..., 7"."""
    if len(blocks) == depth:
        return f"all {depth} blocks"
    steps = {b - a for a, b in itertools.pairwise(blocks)}
    if len(blocks) > 3 and len(steps) == 1 and steps != {1}:
        return f"blocks {blocks[0]}, {blocks[1]}, ..., {blocks[-1]}"
    runs: list[list[int]] = []
    for i in blocks:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    spoken = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {spoken}"


def _label_table(net: SiT, here: dict[str, Tensor], source: Source, class_names: list[str] | None) -> Special:
    """Rows follow the names of their classes. Those of other classes are of no use; a null label more or less leaves
    those of the classes as they are."""
    fresh, table, classes = here[LABELS], source.tensors.get(LABELS), net.config.num_classes
    if table is None or table.shape[1:] != fresh.shape[1:]:
        return Special()  # an error like any other
    if _num_classes(source, classes) != classes:
        there = f"{source.config['num_classes']} classes" if "num_classes" in source.config else f"{len(table)} rows"
        null = " and the null label" if net.config.has_null_label else ""
        return Special({LABELS}, lines=[f"the label table starts afresh: {there} there, {classes} classes{null} here"])
    value, lines = fresh.clone(), []
    order = labels_there(source.class_names, class_names) if source.class_names and class_names else None
    value[:classes] = table[:classes] if order is None else table[order]
    if order not in (None, list(range(classes))):
        lines.append("the label table's rows follow the class names, whose order differs: "
                     f"{changed_names(source.class_names, class_names)}")
    if len(table) > len(fresh):
        lines.append("the null label's row is left out: this model has none (has_null_label is false)")
    elif len(table) < len(fresh):
        lines.append("the null label's row starts afresh: the weights have none (guidance needs it trained)")
    else:
        value[classes:] = table[classes:]
    return Special({LABELS}, {LABELS: value}, lines)


def _keeps_null_label(net: SiT, source: Source) -> bool:
    """Whether the row of the null label is the weights' own."""
    classes = net.config.num_classes
    return net.config.has_null_label and _num_classes(source, classes) == classes < len(source.tensors[LABELS])


def _num_classes(source: Source, expected: int) -> int | None:
    """How many classes the weights know. Published ones do not say: as many as expected, if their rows allow it."""
    if "num_classes" in source.config:
        return source.config["num_classes"]
    return expected if len(source.tensors[LABELS]) - expected in (0, 1) else None


def _output_layer(net: SiT, here: dict[str, Tensor], there: dict[str, Tensor]) -> Special:
    """With `learn_sigma` on one side only, the channels that both have: of rows (p, q, c), the first of c."""
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
        line = f"of the output layer, the {channels} channels of learn_sigma start afresh: the weights have none"
    else:
        line = f"of the output layer, the {channels} channels of learn_sigma are left out: this model has none"
    return Special(set(OUTPUT), values, [line])


def _check_same(there: dict[str, Tensor], here: dict[str, Tensor], ckpt: str) -> None:
    if wrong := list_differences(there, here):
        raise ValueError(f"the weights of {ckpt} are of another model: {wrong}. Give the --preset that they have, or "
                         "their model.hidden_size, depth, patch_size, in_channels, mlp_ratio")


def _silent_options(net: SiT, here: dict[str, Tensor], source: Source) -> list[str]:
    """Options that no tensor's shape shows, where mixers that they concern are kept."""
    there = mixer_kinds(source.tensors, source.config)
    kept = {kind.name for i, kind in mixer_kinds(here, net.config).items() if there[i] == kind}
    silent = sorted({option for name in kept for option in MIXERS.find(name).silent})
    return [
        f"model.{name} is {source.config[name]} there, {net.config[name]} here: mixers that are kept know the former"
        for name in silent if source.config.get(name, net.config[name]) != net.config[name]
    ]


def _training_differences(source: Source, flow: dict[str, str], codec: dict) -> list[str]:
    lines = [
        f"the {what} is {source.flow[what]} there, {here} here"
        for what, here in flow.items() if source.flow.get(what, here) != here
    ]
    changes = [
        f"{key} {str(source.codec[key])[:12]} there, {str(value)[:12]} here"  # enough of a checksum
        for key, value in codec.items() if key != "source" and source.codec.get(key, value) != value
    ]
    return lines + ([f"the codec is another: {'; '.join(changes)}"] if changes else [])


def _class_name_differences(net: SiT, source: Source, class_names: list[str] | None) -> list[str]:
    """Rows of the label table go by number where the names are not the same: a class may start as a stranger."""
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
