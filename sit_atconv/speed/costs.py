"""How much arithmetic and memory traffic the compared forms need, counted from shapes alone."""

import inspect
from dataclasses import dataclass

from sit_atconv.models.sit import SiT, mixer_names

TIME_FEATURES = 256  # cosines and sines that describe a time
DEFAULTS = {
    name: argument.default
    for name, argument in inspect.signature(SiT.__init__).parameters.items()
    if argument.default is not argument.empty
}  # of SiT's constructor


@dataclass(frozen=True)
class Cost:
    """What a computation cannot do without.

    Args:
        multiply_adds: in linears, convolutions and attention's two products, as published figures count them.
        bytes: each input and weight read once, each output written once, nothing between them.
    """

    multiply_adds: int
    bytes: int


def cost(
    level: str,
    form: str,
    config: dict,
    grid_size: tuple[int, int],
    *,
    quantity: str = "forward",
    batch_size: int = 1,
    element_size: int = 4,
) -> Cost:
    """The cost of one forward, or of the operator's gradients.

    Args:
        level: "op" (tokens to tokens between the projections), "mixer", "block" (with its adaLN) or "model".
        form: a name in `forms.FORMS`; "hybrid" at the level "model" only.
        config: arguments of SiT's constructor; what is missing has its default.
        grid_size: (H, W) in tokens.
        quantity: "forward"; at the level "op" also "backward" (all gradients) and, of the convolution, "grad_x" and
            "grad_kernels".
        batch_size: samples at a time.
        element_size: bytes of a number.
    """
    config = {**DEFAULTS, **config}
    N, D = grid_size[0] * grid_size[1], config["hidden_size"]
    if level != "op" and quantity != "forward":
        raise ValueError(f"only the forward of a {level} is counted, not {quantity!r}")
    if level == "op":
        macs, numbers = _op(form, config, N)[quantity]
        weights = 0
    elif level == "model":
        macs, weights = _model(form, config, N)
        pixels = N * config["patch_size"] ** 2 * config["in_channels"]
        numbers = D + 2 * pixels  # a row of the label table, the image in and out
    else:
        macs, weights = {"mixer": _mixer, "block": _block}[level](form, config, N)
        numbers = 2 * N * D + (D if level == "block" else 0)  # tokens in and out, a block's condition
    return Cost(batch_size * macs, (weights + batch_size * numbers) * element_size)


def _op(form: str, config: dict, N: int) -> dict[str, tuple[int, int]]:
    """Multiply-adds, and numbers read and written, of one sample; by quantity."""
    D, taps = config["hidden_size"], config["kernel_size"] ** 2
    tokens, kernels = N * D, taps * D
    if form in ("attention", "timm"):  # q k^T and its product with v; each has two gradients of its own size
        return {"forward": (2 * N * tokens, 4 * tokens), "backward": (4 * N * tokens, 7 * tokens)}
    if form == "floor":
        return {"forward": (0, 2 * tokens)}
    macs = taps * tokens
    return {
        "forward": (macs, 2 * tokens + kernels),           # reads x and kernels, writes y
        "grad_x": (macs, 2 * tokens + kernels),            # reads dy and kernels, writes dx
        "grad_kernels": (macs, 2 * tokens + kernels),      # reads dy and x, writes dkernels
        "backward": (2 * macs, 3 * tokens + 2 * kernels),  # reads dy, x and kernels, writes dx and dkernels
    }


# ------------------------------------------------- multiply-adds of one sample, and weights (with biases)

def _linear(N: int, inputs: int, outputs: int) -> tuple[int, int]:
    return N * inputs * outputs, (inputs + 1) * outputs


def _sum(*parts: tuple[int, int]) -> tuple[int, int]:
    return tuple(map(sum, zip(*parts, strict=True)))


def _mixer(form: str, config: dict, N: int) -> tuple[int, int]:
    D, taps = config["hidden_size"], config["kernel_size"] ** 2
    op, projection = (_op(form, config, N)["forward"][0], 0), _linear(N, D, D)
    if form in ("attention", "timm"):
        norms = 4 * D // config["num_heads"] if config["qk_norm"] else 0
        return _sum(op, *[projection] * 4, (0, norms))
    if form == "floor":
        return _sum(op, *[projection] * 2)
    kernel_proj = _linear(N if form == "published" else taps, D, D)
    pooling = (0 if form == "published" else taps * N * D, 0)  # ours is a product with the bins' members
    kernel_gen = (D * taps * taps, (taps + 1) * taps)  # for every channel, with shared weights
    return _sum(op, *[projection] * 2, pooling, kernel_proj, kernel_gen, (0, D))


def _block(form: str, config: dict, N: int) -> tuple[int, int]:
    D = config["hidden_size"]
    M = int(D * config["mlp_ratio"])
    return _sum(_mixer(form, config, N), _linear(N, D, M), _linear(N, M, D), _linear(1, D, 6 * D))


def _model(form: str, config: dict, N: int) -> tuple[int, int]:
    D, values = config["hidden_size"], config["patch_size"] ** 2 * config["in_channels"]  # of a patch
    names = mixer_names(config["mixer"], config["depth"])
    positions = "attention" in names if config["use_pos_embed"] is None else config["use_pos_embed"]
    return _sum(
        _linear(N, values, D),
        _linear(1, TIME_FEATURES, D),
        _linear(1, D, D),
        *(_block(form if name == "atconv" and form in ("published", "floor") else name, config, N) for name in names),
        _linear(1, D, 2 * D),
        _linear(N, D, values * (2 if config["learn_sigma"] else 1)),
        (0, N * D if positions else 0),
    )
