"""Published weights: training files of SiT and REPA, and bare state dicts, read without running code.

{"model": ..., "ema": ..., "opt": ..., "args": Namespace or dict}        or        {"blocks.0. ...": tensor, ...}
"""

import argparse
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

REPA_OPTIONS = {"kernel_act": "silu"}  # of REPA's port of ATConv: no tensor shows it
PROJECTORS = "projectors."  # prefix
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # prefixes that DistributedDataParallel and torch.compile add
POINTWISE = re.compile(r"blocks\.\d+\.attn\.(kernel_proj|x_proj|proj)\.weight")  # 1x1 convolutions in REPA's port


@dataclass(frozen=True)
class Published:
    """Weights of a published file, with our names and our direction of time.

    Args:
        tensors: name -> tensor, on the CPU.
        ema: True for EMA weights, False for the weights as trained, None if the file does not say.
        repa: True if the file had REPA's convention and was converted.
        args: training arguments with those of nested groups; empty if the file has none.
        projectors: REPA's projectors, which the model does without, as name -> tensor.
    """

    tensors: dict[str, Tensor]
    ema: bool | None
    repa: bool
    args: dict = field(default_factory=dict)
    projectors: dict[str, Tensor] = field(default_factory=dict)


def read_published(path: Path, ema: bool = True) -> Published:
    """Reads a `.safetensors` file, or anything that `torch.save` wrote (`.pt`, `.pth`, `.ckpt`).

    REPA's weights are recognised by `projectors.*`, by ATConv's projections as 1x1 convolutions, or by the prediction
    "v" in the training arguments. (A bare state dict of REPA with only attention and without projectors looks like
    SiT's.)

    Args:
        path: the file.
        ema: True takes the EMA weights of a training file if it has any, False those as trained.

    Raises:
        ValueError: the file is missing or damaged, would run code, lacks the weights asked for, or is a DiT's.
    """
    content = _read(path)
    held = content if isinstance(content, dict) else {}
    parts = [key for key in ("ema", "model") if _is_state_dict(held.get(key))]
    if not ema and parts == ["ema"]:
        raise ValueError(f"{path} holds only EMA weights: leave out --no-ema")
    part = (parts[0] if ema else "model") if parts else None
    tensors = held[part] if part else content
    if not _is_state_dict(tensors):
        kind = f"only {', '.join(map(str, [*held][:5]))}" if held else type(content).__name__
        raise ValueError(f"{path} holds no weights ({kind}): give a file with 'ema' or 'model' in it, or a state dict")
    args = _flat(held.get("args"))
    _refuse_dit(path, args)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(
                f"{path} cannot be used: {name} is {tensor.dtype}, {tensor.layout} on {tensor.device}: "
                "weights must be dense floating-point numbers"
            )
    named = [WRAPPERS.sub("", name) for name in tensors]
    if len(set(named)) < len(named):
        raise ValueError(f"{path} cannot be used: without module. and _orig_mod. two of its names are the same")
    tensors = dict(zip(named, tensors.values(), strict=True))
    projectors = {name: tensor for name, tensor in tensors.items() if name.startswith(PROJECTORS)}
    repa = args.get("prediction") == "v" or any(
        name in projectors or _is_pointwise(name, tensor) for name, tensor in tensors.items()
    )
    if repa:
        try:
            tensors = _from_repa(tensors)
        except (KeyError, IndexError, RuntimeError) as error:
            fault = f"no {error.args[0]}" if isinstance(error, KeyError) else "a time embedding of another shape"
            raise ValueError(f"{path} has REPA's form but {fault}: give a file with all weights") from error
    return Published(tensors, {"ema": True, "model": False, None: None}[part], repa, args, projectors)


def _flat(args: object) -> dict:
    """Returns arguments as a dict, with those of nested groups that have the same value in all groups."""
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
    """Raises ValueError if the arguments, or without any the file's name, say DiT.

    A DiT's tensors have the names and shapes of a SiT's.
    """
    said = " ".join(str(args[key]) for key in ("model", "model_name", "arch", "name") if key in args)
    is_said = bool(said) or "path_type" in args
    if re.search(r"(?<![a-z])dit(?![a-z])", said if is_said else path.name, re.IGNORECASE):
        source, remedy = (
            (f"args say {said}", "")
            if is_said
            else ("file name says DiT", ", or rename the file if it was trained as a flow")
        )
        raise ValueError(
            f"{path} cannot be used: its {source}, and a DiT predicts noise and variance on the discrete "
            f"steps of DDPM, not a flow. Give weights of a SiT{remedy}"
        )


def _read(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # so that the optimizer's state is not read; the older format cannot be
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file raises errors of many types
        called = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and called:
            raise ValueError(
                f"{path} cannot be used: it holds more than tensors and could run code ({called[1]}). "
                "Look for a .safetensors file of the weights, or, if you trust this file, save only its "
                "state dict"
            ) from error
        telling = isinstance(error, (RuntimeError, OSError, SafetensorError)) and str(error)
        reason = str(error).splitlines()[0].split(". ")[0] if telling else "not a pickle of tensors"
        raise ValueError(
            f"{path} is not a checkpoint, or is incomplete or damaged ({reason}): download or copy it again"
        ) from error


def _is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _is_pointwise(name: str, tensor: Tensor) -> bool:
    return bool(POINTWISE.fullmatch(name)) and tensor.shape[2:] == (1, 1)


def _from_repa(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts REPA's weights to ours: linear layers, our time, no position embedding if it is zero.

    Raises:
        KeyError: a tensor that the reversal of time changes is missing.
    """
    ours = {
        name: tensor.flatten(1) if _is_pointwise(name, tensor) else tensor
        for name, tensor in tensors.items()
        if not name.startswith(PROJECTORS)
    }
    if "pos_embed" in ours and not ours["pos_embed"].any():
        del ours["pos_embed"]
    return _reverse_time(ours)


def to_repa(tensors: dict[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    """Converts our weights to REPA's: up to rounding the inverse of reading them, but without projectors.

    REPA's models always add a position embedding (1, num_tokens, D): it is zero for a model without one.
    """
    theirs = {}
    for name, tensor in tensors.items():
        in_atconv = f"{name.rpartition('.attn.')[0]}.attn.kernel_gen.weight" in tensors
        theirs[name] = tensor[:, :, None, None] if in_atconv and POINTWISE.fullmatch(name) else tensor
    width = tensors["t_embedder.mlp.2.bias"]
    theirs.setdefault("pos_embed", width.new_zeros(1, num_tokens, len(width)))
    return _reverse_time(theirs)


def _reverse_time(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turns the weights of v(x, t) into those of -v(x, 1 - t): from REPA's time to ours and back.

    The features of 1 - t are linear in those of t: with the angle f of t = 1, cos(f - ft) = cos f cos ft + sin f sin ft
    and sin(f - ft) = sin f cos ft - cos f sin ft. So changing the first layer after them is exact, and doing it twice
    restores the weights.
    """
    weight = tensors["t_embedder.mlp.0.weight"]  # (D, 2F)
    on_cos, on_sin = weight.double().chunk(2, dim=1)  # (D, F) each
    num_frequencies = on_cos.shape[1]
    f = 10000.0 ** (-torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
    cos, sin = f.cos(), f.sin()
    reversed_ = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1)
    return {
        **tensors,
        "t_embedder.mlp.0.weight": reversed_.to(weight.dtype),
        **{name: -tensors[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")},
    }
