"""Arithmetic and memory traffic of the compared forms, counted from shapes alone."""

from sit_atconv.models.costs import DEFAULTS, block_multiply_adds, mixer_multiply_adds, multiply_adds
from sit_atconv.models.mixers import mixer_names
from sit_atconv.speed.forms import find_form


def form_multiply_adds(level: str, form: str, config: dict, grid_size: tuple[int, int]) -> int:
    """Returns the multiply-adds of one forward of one sample.

    Args:
        level: "mixer" and "block" (with its adaLN) count one of these, other levels the whole model.
        form: a name that `find_form` knows.
        config: arguments of SiT's constructor; missing ones have their defaults.
        grid_size: (H, W) in tokens.
    """
    config = {**DEFAULTS, **config}
    count = find_form(form).multiply_adds

    def of_mixer(name: str) -> int:
        return count(config, grid_size) if count else mixer_multiply_adds(name, config, grid_size)

    if level not in ("mixer", "block"):
        return multiply_adds(config, grid_size, of_mixer)
    (mixer,) = set(mixer_names(config["mixer"], config["depth"]))
    return of_mixer(mixer) + (block_multiply_adds(config, grid_size) if level == "block" else 0)


def operator_cost(form: str, config: dict, grid_size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Returns quantity -> (multiply-adds, numbers read and written) of the operator, for one sample.

    Each input is read once and each output is written once. Quantities are "forward", "backward" (all gradients) and,
    for the convolution, "grad_x" and "grad_kernels". Arguments are those of `form_multiply_adds`.
    """
    config = {**DEFAULTS, **config}
    N, D, taps = grid_size[0] * grid_size[1], config["hidden_size"], config["kernel_size"] ** 2
    tokens, kernels = N * D, taps * D
    convolution = {
        "forward": (taps * tokens, 2 * tokens + kernels),  # reads x and kernels, writes y
        "grad_x": (taps * tokens, 2 * tokens + kernels),  # reads dy and kernels, writes dx
        "grad_kernels": (taps * tokens, 2 * tokens + kernels),  # reads dy and x, writes dkernels
        "backward": (2 * taps * tokens, 3 * tokens + 2 * kernels),  # reads dy, x and kernels, writes dx and dkernels
    }
    return {
        # q k^T and its product with v; the backward of each is two products of the same size
        "attention": {"forward": (2 * N * tokens, 4 * tokens), "backward": (4 * N * tokens, 7 * tokens)},
        "published": convolution,
        "atconv": convolution,
        "floor": {"forward": (0, 2 * tokens)},
    }[form]
