"""Checks that a form computes the right values and gradients, made before it is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from sit_atconv.models.sit import SiT
from sit_atconv.speed import computations
from sit_atconv.speed.forms import find_form

BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of relative errors; rounding stays below 1/2.5 of these
BLOCKS = 2  # compared blocks of a model: all blocks are alike, or alternate between two mixers
QUERIES = 64  # compared queries of attention


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    what: str  # what was compared
    error: float | None  # ||a - b|| / ||b||, the largest of several tensors; None if nothing was compared


def check(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Check:
    """Compares tensors pairwise; the error is NaN if one of them holds NaN."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)]
    errors = torch.stack([(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs])  # two zeros agree
    return Check(what, errors.max().item())


def take_form(model: SiT, form: str, *inputs: Tensor, gradients: bool = False) -> Check:
    """Replaces the mixer of every block by the form's, and checks it against a second computation.

    The check compares the outputs of the model cut down to its first blocks and, with `gradients`, the gradients of
    its parameters. Its error is None if the form has no second computation.
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
        return Check(f"{form}, which has no second computation", None)
    twin = getattr(computations, entry.twin)
    expected = evaluate(twin)
    found = evaluate(take)  # the last call decides which mixers the model keeps
    twins = dict.fromkeys(type(twin(mixer)).__name__ for mixer in mixers[:BLOCKS])
    return check(f"{form} and {' + '.join(twins)} with the same weights", found, expected)


def check_operator(
    form: str, operator: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor
) -> Check:
    """Checks values and gradients of an operator against its definition.

    If the definition returns the first tokens only, these are compared.
    """

    def evaluate(function: Callable[..., Tensor], tokens: int | None = None) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = function(*leaves)[:, :tokens]
        return [y, *torch.autograd.grad(y, leaves, y.detach())]  # y serves as the cotangent

    expected = evaluate(definition)
    return check(f"{form} and its definition", evaluate(operator, expected[0].shape[1]), expected)


def attention_definition(qkv: Tensor, num_heads: int) -> Tensor:
    """Returns softmax(q k^T / sqrt(d)) v of the first queries, written out in float32."""
    q, k, v = qkv.float().unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = q[:, :, :QUERIES]
    y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2).to(qkv.dtype)
