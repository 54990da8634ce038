"""What must hold before a speed means anything: every form computes the values that it should, gradients included."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from sit_atconv.models.sit import SiT
from sit_atconv.speed import computations
from sit_atconv.speed.forms import find_form

BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of relative errors; rounding stays below 1/2.5 of these
BLOCKS = 2  # of a model are compared, with all that is around them: blocks are alike, and a hybrid's alternate
QUERIES = 64  # of attention are written out


@dataclass(frozen=True)
class Check:
    """What was compared, and `error` = ||a - b|| / ||b||, the largest of several tensors; None if nothing was."""

    what: str
    error: float | None


def check(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Check:
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)]
    errors = torch.stack([(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs])  # two zeros agree
    return Check(what, errors.max().item())  # not a number if one of them is none


def take_form(model: SiT, form: str, *inputs: Tensor, gradients: bool = False) -> Check:
    """Gives every block of a model of the form's preset the form's mixer, and checks the first blocks by its twins.

    Compared are the outputs of a model of these blocks and, where they are wanted, the gradients of its parameters.
    Without a twin nothing is: the check has no error then.
    """
    entry = find_form(form)
    take = getattr(computations, entry.take)
    blocks: nn.ModuleList = model.blocks
    mixers = [block.attn for block in blocks]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def evaluate(change: Callable) -> list[Tensor]:
        for block, mixer in zip(blocks, mixers, strict=True):
            block.attn = change(mixer)
        model.blocks = blocks[:BLOCKS]
        with torch.set_grad_enabled(gradients):
            y = model(*inputs)
        model.blocks = blocks
        if not gradients:
            return [y]
        return [y, *torch.autograd.grad(y, parameters, inputs[0], allow_unused=True, materialize_grads=True)]

    if entry.twin is None:
        evaluate(take)
        return Check(f"{form}, of which there is no second computation", None)
    twin = getattr(computations, entry.twin)
    expected = evaluate(twin)
    found = evaluate(take)  # last, so that its mixers stay
    twins = dict.fromkeys(type(twin(mixer)).__name__ for mixer in mixers[:BLOCKS])
    return check(f"{form} and {' + '.join(twins)} with its weights", found, expected)


def check_operator(form: str, operator: Callable[..., Tensor], definition: Callable[..., Tensor],
                   *inputs: Tensor) -> Check:
    """Values and gradients of an operator against its definition, which may give the first tokens alone."""

    def evaluate(function: Callable[..., Tensor], tokens: int | None = None) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = function(*leaves)[:, :tokens]
        return [y, *torch.autograd.grad(y, leaves, y.detach())]  # any cotangent will do

    expected = evaluate(definition)
    return check(f"{form} and its definition", evaluate(operator, expected[0].shape[1]), expected)


def attention_definition(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out in float32, of the first queries."""
    q, k, v = qkv.float().unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = q[:, :, :QUERIES]
    y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2).to(qkv.dtype)
