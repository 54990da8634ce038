"""What the names and shapes of tensors show of the model they belong to."""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from sit_atconv.models.sit import PRESETS, mixer_names

PATCHES = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
HIDDEN = "blocks.0.mlp.fc1.weight"
LISTED = 3  # of the tensors that do not fit


def mixer_kinds(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Block -> its mixer, for the user, of those blocks that show one."""
    kinds = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"blocks\.(\d+)\.attn\.(qkv|kernel_gen)\.weight", name)
        if found and found[2] == "qkv":
            normed = f"blocks.{found[1]}.attn.q_norm.weight" in tensors
            kinds[int(found[1])] = "attention with qk_norm" if normed else "attention"
        elif found:
            k = math.isqrt(math.isqrt(tensor.numel()))  # of k^2 taps to k^2 taps
            kinds[int(found[1])] = f"{k}x{k} ATConv"
    return dict(sorted(kinds.items()))


def shown_options(tensors: Mapping[str, Tensor]) -> dict:
    """The options of `SiT` that tensors show: all but heads, activation, pooling, classes and input size.

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
    mixers = ["atconv" if "ATConv" in kinds.get(i, "") else "attention" for i in range(depth)]
    named = (name for name in ("attention", "atconv", "hybrid") if mixer_names(name, depth) == mixers)
    options = {
        "hidden_size": hidden_size,
        "depth": depth,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "mixer": next(named, mixers),
        "mlp_ratio": len(tensors[HIDDEN]) / hidden_size,
        "learn_sigma": len(tensors[OUTPUT[0]]) == 2 * patch_size**2 * in_channels,
        "use_pos_embed": POSITIONS in tensors,
        "qk_norm": any("qk_norm" in kind for kind in kinds.values()),
    }
    if "atconv" in mixers:
        options["kernel_size"] = int(kinds[mixers.index("atconv")].split("x")[0])
    return options


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
