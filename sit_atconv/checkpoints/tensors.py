"""What the names and shapes of tensors show of the model they belong to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from sit_atconv.models.mixers import MIXERS, PATTERNS, mixer_names, recognise_mixer
from sit_atconv.models.presets import PRESETS

PATCHES = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
HIDDEN = "blocks.0.mlp.fc1.weight"
LISTED = 3  # of the tensors that do not fit


@dataclass(frozen=True)
class Kind:
    """The mixer of a block, as far as weights show it.

    Args:
        name: in `MIXERS`.
        spoken: as messages call it: "3x3 ATConv".
        options: the options of `SiT` that its tensors show.
    """

    name: str
    spoken: str
    options: dict = field(compare=False)

    def __str__(self) -> str:
        return self.spoken


def mixer_kinds(tensors: Mapping[str, Tensor], config: Mapping = MappingProxyType({})) -> dict[int, Kind]:
    """Returns the mixer of each block, as far as config or tensors tell it.

    Args:
        tensors: weights of a SiT.
        config: the options of their model, as far as known. Without its mixers, the names of tensors tell them.

    Raises:
        ValueError: tensors are of no mixer in the table.
    """
    mixers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.attn\.(.+)", name):
            mixers.setdefault(int(found[1]), {})[found[2]] = tensor
    if "mixer" in config:
        names = dict(enumerate(mixer_names(config["mixer"], config["depth"])))
    else:
        names = {i: recognise_mixer(mixer) for i, mixer in sorted(mixers.items())}
    kinds = {}
    for i, name in names.items():
        mixer = mixers.get(i, {})
        if name is None:
            for entry in MIXERS.values():
                if entry.parameters and mixer.keys() < set(entry.parameters):
                    raise ValueError(f"no weights of a SiT: blocks.{i}.attn.{entry.parameters[0]} is missing")
            known = {parameter for entry in MIXERS.values() for parameter in entry.parameters}
            unknown = [f"blocks.{i}.attn.{parameter}" for parameter in (mixer.keys() - known or mixer)]
            raise ValueError(f"a token mixer that is not known here ({', '.join(sorted(unknown)[:LISTED])}): give "
                             "--import MODULE, a module that registers it")
        entry = MIXERS.find(name)
        options = entry.shown(mixer)
        kinds[i] = Kind(name, entry.spoken(options) if entry.spoken else name, options)
    return kinds


def shown_options(tensors: Mapping[str, Tensor]) -> dict:
    """The options of `SiT` that tensors show: all but classes, input size and what mixers keep silent.

    Raises:
        ValueError: they are not those of a SiT; the message names the first that is missing.
    """
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    depth = len(blocks)
    for name, ndim in ((PATCHES, 4), (LABELS, 2), (HIDDEN, 2), (OUTPUT[0], 2), (POSITIONS, 3)):
        is_there = name in tensors and tensors[name].ndim == ndim and tensors[name].numel() > 0
        if not is_there and (name in tensors or name != POSITIONS):
            raise ValueError(f"no weights of a SiT: {name} is missing or of another shape")
    if blocks != set(range(depth)):
        raise ValueError(f"no weights of a SiT: its blocks are not 0 ... {depth - 1}, but go up to {max(blocks)}")
    hidden_size, in_channels, patch_size, _ = tensors[PATCHES].shape
    kinds = mixer_kinds(tensors)
    if missing := sorted(blocks - kinds.keys()):
        raise ValueError(f"no weights of a SiT: blocks.{missing[0]}.attn is missing")
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
    """The preset that these options do not contradict, by whatever they say of it."""
    for name, preset in PRESETS.items():
        if all(options.get(key, value) == value for key, value in preset.items()):
            return name
    return None


def list_differences(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    """The tensors that are missing, of another shape or too many in the weights `there`: the first, and how many more.

    Empty where names and shapes are the same.
    """
    wrong = [
        f"{name} {tuple(there[name].shape)} there, {tuple(tensor.shape)} here" if name in there
        else f"{name} missing there, {tuple(tensor.shape)} here"
        for name, tensor in here.items() if name not in there or there[name].shape != tensor.shape
    ]
    wrong += [f"{name} {tuple(tensor.shape)} there, none here" for name, tensor in there.items() if name not in here]
    more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
    return "; ".join(wrong[:LISTED]) + more
