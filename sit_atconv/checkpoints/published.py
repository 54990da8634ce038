"""Weights as others publish them: training files of SiT and REPA, and bare state dicts, read without running code.

    {"model": ..., "ema": ..., "opt": ..., "args": Namespace or dict}        or        {"blocks.0. ...": tensor, ...}
"""

import argparse
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

REPA_OPTIONS = {"kernel_act": "silu"}  # of REPA's port of ATConv: no tensor shows it
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
POINTWISE = re.compile(r"blocks\.\d+\.attn\.(kernel_proj|x_proj|proj)\.weight")  # 1x1 convolutions in REPA's port


@dataclass(frozen=True)
class Published:
    """What a file of published weights holds, in our names and our direction of time.

    Args:
        tensors: name -> tensor, on the CPU.
        ema: whether these are the averaged weights or those as trained; None where the file does not say.
        repa: whether they came in REPA's convention, and were converted.
        args: the arguments they were trained with, those of nested groups too; none where the file does not say.
    """

    tensors: dict[str, Tensor]
    ema: bool | None
    repa: bool
    args: dict = field(default_factory=dict)


def read_published(path: Path, ema: bool = True) -> Published:
    """Reads a `.safetensors` file, or anything that `torch.save` wrote (`.pt`, `.pth`, `.ckpt`).

    REPA's weights are recognised by `projectors.*`, by ATConv's projections as 1x1 convolutions, or by the training
    arguments, which call the prediction "v". (A bare state dict of REPA with attention alone, its projectors removed,
    cannot be told from SiT's.)

    Args:
        path: of the file.
        ema: of a training file, the EMA weights where there are any, or those as trained.

    Raises:
        ValueError: there is no such file, it is damaged, it would run code, it does not hold the weights asked for, or
            these are of a DiT.
    """
    content = _read(path)
    keys = list(content) if isinstance(content, dict) else []
    parts = [key for key in ("ema", "model") if key in keys and _is_state_dict(content[key])]
    if not ema and parts == ["ema"]:
        raise ValueError(f"{path} holds the EMA weights alone: leave --no-ema out")
    part = (parts[0] if ema else "model") if parts else None
    tensors = content[part] if part else content
    if not _is_state_dict(tensors):
        held = f"only {', '.join(map(str, keys[:5]))}" if keys else type(content).__name__
        raise ValueError(f"{path} holds no weights ({held}): give a file with 'ema' or 'model' in it, or a state dict")
    args = _flat(content.get("args"))
    _refuse_dit(path, args)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(f"{path} is not loaded: {name} is {tensor.dtype}, {tensor.layout} on {tensor.device}, and "
                             "weights are dense floating-point numbers")
    named = [_unwrapped(name) for name in tensors]
    if len(set(named)) < len(named):
        raise ValueError(f"{path} is not loaded: without {' and '.join(WRAPPERS)} two of its names are the same")
    tensors = dict(zip(named, tensors.values(), strict=True))
    repa = args.get("prediction") == "v" or any(
        name.startswith("projectors.") or _is_pointwise(name, tensor) for name, tensor in tensors.items())
    if repa:
        try:
            tensors = _from_repa(tensors)
        except KeyError as error:
            raise ValueError(f"{path} is of REPA's form but has no {error.args[0]}: give a file of whole "
                             "weights") from error
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"{path} is of REPA's form but for the shapes of its time embedding: give a file of whole "
                             "weights") from error
    return Published(tensors, {"ema": True, "model": False, None: None}[part], repa, args)


def _flat(args: object) -> dict:
    """A Namespace or dict of arguments as a dict, with those of its groups whose name has one value in all of them."""
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        return {}
    flat = {name: value for name, value in args.items() if not isinstance(value, dict | argparse.Namespace)}
    grouped: dict[str, set] = {}
    for group in args.values():
        for name, value in _flat(group).items():
            if isinstance(value, str | int | float):
                grouped.setdefault(name, set()).add(value)
    return {name: values.pop() for name, values in grouped.items() if len(values) == 1} | flat


def _refuse_dit(path: Path, args: dict) -> None:
    """Raises ValueError for a DiT, by its arguments, or by its file's name where they say nothing.

    Its tensors have the names and shapes of a SiT's.
    """
    said = [str(args[key]) for key in ("model", "model_name", "arch", "name") if key in args]
    is_said = bool(said) or "path_type" in args
    name = " ".join(said) if is_said else path.name
    if re.search(r"(?<![a-z])dit(?![a-z])", name, re.IGNORECASE):
        says, remedy = (f"args say {name}", "") if is_said else (
            "file's name says DiT", ", or rename the file if it was trained as a flow")
        raise ValueError(f"{path} is not loaded: its {says}, and a DiT predicts noise, and its variance, on DDPM's "
                         f"discrete steps, which is no flow. Give weights of a SiT{remedy}")


def _read(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # the older format cannot be; the optimizer's state then stays on the disk
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file raises whatever its reader raises
        called = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and called:
            raise ValueError(f"{path} is not loaded: it holds more than tensors and could run code ({called[1]}). Look "
                             "for the weights as .safetensors, or, if you trust the file, save its state dict "
                             "alone") from error
        telling = isinstance(error, (RuntimeError, OSError, SafetensorError)) and str(error)
        reason = str(error).splitlines()[0].split(". ")[0] if telling else "not a pickle of tensors"
        raise ValueError(f"{path} is no checkpoint, or is incomplete or damaged ({reason}): download or copy it "
                         "again") from error


def _is_state_dict(content: object) -> bool:
    return (isinstance(content, dict) and len(content) > 0
            and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()))


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _is_pointwise(name: str, tensor: Tensor) -> bool:
    return bool(POINTWISE.fullmatch(name)) and tensor.shape[2:] == (1, 1)


def _from_repa(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's weights -> ours: linear projections, our direction of time, and no table of positions if it is zero.

    Raises:
        KeyError: a tensor that the reversal of time changes is missing.
    """
    ours = {
        name: tensor.flatten(1) if _is_pointwise(name, tensor) else tensor
        for name, tensor in tensors.items() if not name.startswith("projectors.")
    }
    if "pos_embed" in ours and not ours["pos_embed"].any():
        del ours["pos_embed"]
    return _reverse_time(ours)


def to_repa(tensors: dict[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    """Our weights -> REPA's, to rounding the inverse of reading them. Projectors, which only training needs, have none.

    REPA's models always add a table of positions (1, num_tokens, D): for one that has none, it is zero.
    """
    theirs = {}
    for name, tensor in tensors.items():
        in_atconv = f"{name.rpartition('.attn.')[0]}.attn.kernel_gen.weight" in tensors
        theirs[name] = tensor[:, :, None, None] if in_atconv and POINTWISE.fullmatch(name) else tensor
    width = tensors["t_embedder.mlp.2.bias"]
    theirs.setdefault("pos_embed", width.new_zeros(1, num_tokens, len(width)))
    return _reverse_time(theirs)


def _reverse_time(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of -v(x, 1 - t), given those of v(x, t): between REPA's time, from data to noise, and ours.

    The features of 1 - t are linear in those of t: with the angle f of t = 1, cos(f - ft) = cos f cos ft + sin f sin ft
    and sin(f - ft) = sin f cos ft - cos f sin ft. So the first layer after them takes the reversal up exactly. Done
    twice it undoes itself.
    """
    weight = tensors["t_embedder.mlp.0.weight"]                                     # (D, 2F)
    on_cos, on_sin = weight.double().chunk(2, dim=1)                                # (D, F) each
    num_frequencies = on_cos.shape[1]
    f = 10000.0 ** (-torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
    cos, sin = f.cos(), f.sin()
    reversed_ = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1)
    return {
        **tensors,
        "t_embedder.mlp.0.weight": reversed_.to(weight.dtype),
        **{name: -tensors[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")},
    }
