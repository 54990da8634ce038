"""Dynamic depthwise convolution as Triton kernels in token layout, for CUDA and ROCm.

Tokens (B, N, C) are read and written in place: channels are contiguous, so a shift of the grid is an offset of whole
rows and nothing is transposed. Tokens that are a view of NCHW images, whose columns are contiguous instead, are read
and written in place, too: strides are arguments, and a stride of 1 is a constant in the compiled kernel.

A program holds a tile of a few columns and channels in registers, loads each input row once for each column of taps,
and adds it to all output rows that it contributes to. Neighbouring tiles read the same row from the cache.

Sums are in float32, or in float64 if an input is float64. `dynamic_depthwise_conv2d` imports this module at first use;
with TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

ROWS = 4  # output rows of a tile: more rows share loads, fewer rows leave more programs in flight
SPLIT = 16  # rows of the grid that one program sums for the gradient of the kernels


def dynamic_depthwise_conv2d_triton(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Cross-correlates tokens (B, N, C) with one kernel for each sample and channel (B, C, k, k).

    Raises:
        ValueError: a sample has 2^31 or more elements, beyond 32-bit offsets.
    """
    if x.shape[1] * x.shape[2] >= 2**31:
        raise ValueError(
            f"impl 'triton' takes samples of fewer than 2^31 elements, not {x.shape[1]} x {x.shape[2]}: "
            "give impl 'channels_last'"
        )
    # Forward mode: torch has no rule for a custom operator, and Dynamo drops that of an autograd.Function. The operator
    # is linear in each input, so its tangent is two more calls.
    x, dx = forward_ad.unpack_dual(x)
    kernels, dkernels = forward_ad.unpack_dual(kernels)
    y = convolve(x, kernels, *grid_size, False)
    if dx is None and dkernels is None:
        return y
    parts = [convolve(dx, kernels, *grid_size, False)] if dx is not None else []
    parts += [convolve(x, dkernels, *grid_size, False)] if dkernels is not None else []
    return forward_ad.make_dual(y, sum(parts[1:], start=parts[0]))


# ------------------------------------------------------------------------------------------------------ operators


@custom_op("sit_atconv::convolve", mutates_args=())
def convolve(x: Tensor, kernels: Tensor, height: int, width: int, flip: bool) -> Tensor:
    """Computes the convolution in the dtype of x.

        y[b, h, w, c] = sum_ij kernels[b, c, i, j] * x[b, h + i - k // 2, w + j - k // 2, c]

    `flip` rotates each kernel by 180 degrees, which turns the gradient of y into the gradient of x.
    """
    (B, _, C), k = x.shape, kernels.shape[-1]
    x, taps = _dense(x), _taps(kernels)
    y = torch.empty_like(x)
    columns, channels = _tile(C, width, k)
    grid = (triton.cdiv(height, ROWS) * triton.cdiv(width, columns), triton.cdiv(C, channels), B)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _convolve[grid](
            x, taps, y, height, width, C, *x.stride()[1:],
            k, flip, _accumulator(x, kernels), ROWS, columns, channels, num_warps=4,
        )  # fmt: skip
    return y


@custom_op("sit_atconv::correlate", mutates_args=())
def correlate(gradient: Tensor, x: Tensor, height: int, width: int, k: int, dtype: torch.dtype) -> Tensor:
    """Computes the gradient of the kernels (B, C, k, k).

        kernels'[b, c, i, j] = sum_hw gradient[b, h, w, c] * x[b, h + i - k // 2, w + j - k // 2, c]

    Each program sums one part of the grid, and the parts are added afterwards, so that the order is deterministic.
    """
    B, _, C = x.shape
    gradient, x = _dense(gradient), _dense(x)
    columns, channels = _tile(C, width, k)
    parts = triton.cdiv(height, SPLIT) * triton.cdiv(width, columns)
    accumulator = tl.float64 if dtype == torch.float64 else _accumulator(x, gradient)
    sums = torch.empty(B, parts, k * k, C, device=x.device, dtype=dtype if parts == 1 else ACCUMULATORS[accumulator])
    grid = (parts, triton.cdiv(C, channels), B)
    with torch.cuda.device_of(x):
        _correlate[grid](
            gradient, x, sums, height, width, C, *gradient.stride()[1:], *x.stride()[1:],
            k, accumulator, SPLIT, columns, channels, num_warps=4,
        )  # fmt: skip
    sums = sums[:, 0] if parts == 1 else sums.sum(1).to(dtype)
    return sums.transpose(1, 2).unflatten(2, (k, k))


@convolve.register_fake
def _(x, kernels, height, width, flip):
    return torch.empty_like(_dense(x))


@correlate.register_fake
def _(gradient, x, height, width, k, dtype):
    B, _, C = x.shape
    return x.new_empty(B, k * k, C, dtype=dtype).transpose(1, 2).unflatten(2, (k, k))


def _save_for_backward(ctx, inputs, output):
    x, kernels, ctx.height, ctx.width, ctx.flip = inputs
    ctx.save_for_backward(x, kernels)


def _backward(ctx, gradient):
    x, kernels = ctx.saved_tensors
    wants_x, wants_kernels, *_ = ctx.needs_input_grad
    grad_x = convolve(gradient, kernels, ctx.height, ctx.width, not ctx.flip) if wants_x else None
    grad_kernels = None
    if wants_kernels:
        grad_kernels = correlate(gradient, x, ctx.height, ctx.width, kernels.shape[-1], kernels.dtype)
        grad_kernels = grad_kernels.flip(2, 3) if ctx.flip else grad_kernels
    return grad_x, grad_kernels, None, None, None


convolve.register_autograd(_backward, setup_context=_save_for_backward)

ACCUMULATORS = {tl.float32: torch.float32, tl.float64: torch.float64}


def _accumulator(*tensors: Tensor) -> tl.dtype:
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def _dense(x: Tensor) -> Tensor:
    """Returns tokens whose channels or whose columns are contiguous; a copy only if neither are."""
    return x if x.transpose(1, 2).is_contiguous() else x.contiguous()


def _taps(kernels: Tensor) -> Tensor:
    """Returns kernels as (B, k*k, C) with contiguous channels; no copy for kernels as ATConv makes them."""
    return kernels.flatten(2).transpose(1, 2).contiguous()


def _tile(C: int, width: int, k: int) -> tuple[int, int]:
    """Returns columns and channels of a tile: rows fill a cache line, and sums fit the registers."""
    channels = min(64, max(16, triton.next_power_of_2(C)))
    elements = {3: 1024, 5: 512}.get(k, 256)
    return min(elements // channels, triton.next_power_of_2(width)), channels


# -------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _cast(value, dtype: tl.constexpr):
    """Casts by way of float32, as there is no direct cast between bfloat16 and float64."""
    if value.dtype == tl.bfloat16 or dtype == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def _convolve(
    x, taps, y, H, W, C, step_n, step_c,
    k: tl.constexpr, FLIP: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(W, COLUMNS)
    top = tl.program_id(0) // tiles_across * ROWS + tl.arange(0, 1)  # a vector: the interpreter needs one for masks
    w = tl.program_id(0) % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    x += b * H * W * C
    y += b * H * W * C
    taps += b * k * k * C

    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.full((COLUMNS, CHANNELS), 0.0, ACC),)
    for j in tl.static_range(k):
        column = w + j - k // 2
        inside = ((column >= 0) & (column < W))[:, None] & (c < C)[None, :]
        offsets = column[:, None] * step_n + c[None, :] * step_c
        kernel = ()  # taps of this column, from the top
        for i in tl.static_range(k):
            tap = (k * k - 1 - i * k - j) if FLIP else i * k + j
            kernel = kernel + (_cast(tl.load(taps + tap * C + c, mask=c < C, other=0.0), ACC)[None, :],)
        for r in tl.static_range(ROWS + k - 1):
            h = (top + r - k // 2)[:, None]
            row = _cast(tl.load(x + h * W * step_n + offsets, mask=inside & (h >= 0) & (h < H), other=0.0), ACC)
            updated = ()
            for o in tl.static_range(ROWS):
                if r - o >= 0 and r - o < k:
                    updated = updated + (tl.fma(kernel[r - o], row, sums[o]),)
                else:
                    updated = updated + (sums[o],)
            sums = updated
    inside = (w < W)[:, None] & (c < C)[None, :]
    offsets = w[:, None] * step_n + c[None, :] * step_c
    for o in tl.static_range(ROWS):
        h = (top + o)[:, None]
        tl.store(y + h * W * step_n + offsets, _cast(sums[o], y.dtype.element_ty), mask=inside & (h < H))


@triton.jit
def _correlate(
    gradient, x, sums, H, W, C, gradient_n, gradient_c, x_n, x_c,
    k: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles_across = tl.cdiv(W, COLUMNS)
    top = tl.program_id(0) // tiles_across * SPLIT
    w = tl.program_id(0) % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    x += b * H * W * C
    gradient += b * H * W * C
    sums += (b * tl.num_programs(0) + tl.program_id(0)) * k * k * C

    inside = (w < W)[:, None] & (c < C)[None, :]
    offsets = w[:, None] * gradient_n + c[None, :] * gradient_c
    partial = ()
    for _ in tl.static_range(k * k):
        partial = partial + (tl.full((COLUMNS, CHANNELS), 0.0, ACC),)
    rows = ()  # rows of the gradient that the current row of x contributes to, from the lowest
    for _ in tl.static_range(k):
        rows = rows + (tl.full((COLUMNS, CHANNELS), 0.0, ACC),)

    bottom = tl.minimum(top + SPLIT, H)
    for number in range(top - k // 2, bottom + k // 2):
        h = number + tl.arange(0, 1)[:, None]  # row h of x meets rows h + k // 2 - i of the gradient
        entering = h + k // 2
        there = inside & (entering < bottom)
        row = _cast(tl.load(gradient + entering * W * gradient_n + offsets, mask=there, other=0.0), ACC)
        shifted = (row,)
        for i in tl.static_range(k - 1):
            shifted = shifted + (rows[i],)
        rows = shifted
        updated = ()
        values = ()
        for j in tl.static_range(k):
            column = w + j - k // 2
            there = ((column >= 0) & (column < W))[:, None] & (c < C)[None, :] & (h >= 0) & (h < H)
            value = tl.load(x + (h * W + column[:, None]) * x_n + c[None, :] * x_c, mask=there, other=0.0)
            values = values + (_cast(value, ACC),)
        for i in tl.static_range(k):
            for j in tl.static_range(k):
                updated = updated + (tl.fma(rows[i], values[j], partial[i * k + j]),)
        partial = updated
    for tap in tl.static_range(k * k):
        tl.store(sums + tap * C + c, _cast(tl.sum(partial[tap], 0), sums.dtype.element_ty), mask=c < C)
