"""Options of a model, inferred from the names and shapes of its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sit_atconv.models.mixers import MIXERS, PATTERNS, mixer_names, recognise_mixer
from sit_atconv.models.presets import PRESETS

PATCHES = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
SECOND_TIME = "r_embedder."  # prefix
HIDDEN = "blocks.0.mlp.fc1.weight"
LISTED = 3  # names in a message, at most


@dataclass(frozen=True)
class Kind:
    """The mixer of a block, as its weights show it.

    Args:
        name: its name in `MIXERS`.
        spoken: its name in messages: "3x3 ATConv".
        options: the options of `SiT` that its tensors show.
    """

    name: str
    spoken: str
    options: dict = field(compare=False)

    def __str__(self) -> str:
        return self.spoken


def mixer_kinds(tensors: Mapping[str, Tensor], config: Mapping | None = None) -> dict[int, Kind]:
    """Returns the mixer of each block.

    Args:
        tensors: weights of a SiT.
        config: the known options of the model. If "mixer" is not among them, the names of tensors tell the mixers.

    Raises:
        ValueError: the tensors of a block belong to no known mixer.
    """
    mixers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.attn\.(.+)", name):
            mixers.setdefault(int(found[1]), {})[found[2]] = tensor
    names: dict[int, str | None] = {i: recognise_mixer(mixer) for i, mixer in sorted(mixers.items())}
    if config and "mixer" in config:
        names = dict(enumerate(mixer_names(config["mixer"], config["depth"])))
    kinds = {}
    for i, mixer_name in names.items():
        mixer = mixers.get(i, {})
        if mixer_name is None:
            for entry in MIXERS.values():
                if entry.parameters and mixer.keys() < set(entry.parameters):
                    raise ValueError(f"weights that are not a SiT's: blocks.{i}.attn.{entry.parameters[0]} is missing")
            known = {parameter for entry in MIXERS.values() for parameter in entry.parameters}
            unknown = [f"blocks.{i}.attn.{parameter}" for parameter in (mixer.keys() - known or mixer)]
            raise ValueError(
                f"a token mixer that is not known here ({', '.join(sorted(unknown)[:LISTED])}): give "
                "--import MODULE, a module that registers it"
            )
        entry = MIXERS.find(mixer_name)
        options = entry.shown(mixer)
        kinds[i] = Kind(mixer_name, entry.spoken(options) if entry.spoken else mixer_name, options)
    return kinds


def shown_options(tensors: Mapping[str, Tensor]) -> dict:
    """Returns the options of `SiT` that tensors show: not the classes, the input size and `Mixer.silent`.

    Raises:
        ValueError: the tensors are not a SiT's; the message names the first that is missing.
    """
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    depth = len(blocks)
    for name, ndim in ((PATCHES, 4), (LABELS, 2), (HIDDEN, 2), (OUTPUT[0], 2), (POSITIONS, 3)):
        is_there = name in tensors and tensors[name].ndim == ndim and tensors[name].numel() > 0
        if not is_there and (name in tensors or name != POSITIONS):
            raise ValueError(f"weights that are not a SiT's: {name} is missing or of another shape")
    if blocks != set(range(depth)):
        raise ValueError(f"weights that are not a SiT's: its {depth} blocks are numbered up to {max(blocks)}")
    hidden_size, in_channels, patch_size, _ = tensors[PATCHES].shape
    kinds = mixer_kinds(tensors)
    if missing := sorted(blocks - kinds.keys()):
        raise ValueError(f"weights that are not a SiT's: blocks.{missing[0]}.attn is missing")
    mixers = [kinds[i].name for i in range(depth)]
    named = (name for name in (*MIXERS, *PATTERNS) if mixer_names(name, depth) == mixers)
    return {
        "hidden_size": hidden_size,
        "depth": depth,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "mixer": next(named, mixers),
        "mlp_ratio": len(tensors[HIDDEN]) / hidden_size,
        "learn_sigma": len(tensors[OUTPUT[0]]) == 2 * patch_size**2 * in_channels,
        "use_pos_embed": POSITIONS in tensors,
        **{name: value for kind in kinds.values() for name, value in kind.options.items()},
    }


def fitting_preset(options: dict) -> str | None:
    """Returns the first preset that these options, of which some may be missing, do not contradict."""
    fitting = (
        name
        for name, preset in PRESETS.items()
        if all(options.get(key, value) == value for key, value in preset.items())
    )
    return next(fitting, None)


def list_differences(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    """Lists the first tensors whose name or shape differs; returns "" if there are none."""
    wrong = [
        f"{name} {tuple(there[name].shape)} there, {tuple(tensor.shape)} here"
        if name in there
        else f"{name} missing there, {tuple(tensor.shape)} here"
        for name, tensor in here.items()
        if name not in there or there[name].shape != tensor.shape
    ]
    wrong += [f"{name} {tuple(tensor.shape)} there, none here" for name, tensor in there.items() if name not in here]
    more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
    return "; ".join(wrong[:LISTED]) + more
