"""Timed code of each level: the operator, a token mixer, a block, a model, a training step, sampling."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sit_atconv.data.codecs import VAECodec
from sit_atconv.flow import FlowMatching, MeanFlow, Objective
from sit_atconv.flow.auxiliary import HiddenTap
from sit_atconv.flow.step import forward_and_backward, move_averages
from sit_atconv.models.costs import DEFAULTS
from sit_atconv.models.mixers import MIXERS, mixer_names
from sit_atconv.models.sit import SiT
from sit_atconv.ops import dynamic_depthwise_conv2d
from sit_atconv.ops.reference import dynamic_depthwise_conv2d_reference
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.sampling import guided, sample_ode
from sit_atconv.speed.agreement import BOUNDS, Check, attention_definition, check, check_operator, take_form
from sit_atconv.speed.computations import attend, published_conv2d
from sit_atconv.speed.forms import TWO_TIMES
from sit_atconv.speed.options import PRECISIONS, SpeedOptions
from sit_atconv.speed.timing import Rotation

FLOW_STEP = "flow step"
TRAIN_JUMP = {FLOW_STEP: FlowMatching(), "MeanFlow step": MeanFlow()}  # the first is what the others are compared with


@dataclass(frozen=True)
class Case:
    """One resolution in one dtype: draws the inputs, builds the forms and checks that they agree."""

    options: SpeedOptions
    resolution: int
    dtype: str
    device: torch.device
    decoder: Any = None  # diffusers' AutoencoderKL, which is imported on use
    checks: list[Check] = field(default_factory=list)  # checks passed so far

    @property
    def batch_size(self) -> int:
        return self.options.batch_size(self.resolution)

    @property
    def side(self) -> int:
        return self.resolution // self.options.downsample

    @property
    def grid_size(self) -> tuple[int, int]:
        return (self.side // self.options.patch_size,) * 2

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def randn(self, *shape: int, dtype: str | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(torch_dtype(dtype or self.dtype))

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole batch of x, t and y; x stays in fp32, as in sampling."""
        x = self.randn(self.batch_size, self.options.channels, self.side, self.side, dtype="fp32")
        t = torch.rand(self.batch_size, generator=self.generator, device=self.device)
        return x, t, torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)

    def require(self, check: Check) -> None:
        """Records a passed check. Raises ValueError if the error is NaN or above the dtype's bound."""
        if check.error is not None and not check.error <= BOUNDS[self.dtype]:
            raise ValueError(
                f"not timed: {check.what} do not agree at {self.resolution} px in {self.dtype} "
                f"(relative error {check.error:.2g}, at most {BOUNDS[self.dtype]:g} is allowed)"
            )
        self.checks.append(check)

    def build(self, level: str, *, training: bool = False, **overrides) -> dict[str, SiT]:
        """Returns the level's models by form. Raises ValueError if one fails its check."""
        models = {}
        for form in self.options.forms_of(level):
            config = {**self.options.model_config(form, self.resolution), **overrides}
            model = random_model(config, "fp32" if training else self.dtype, self.device).train(training)
            few = [tensor[:2] for tensor in self.inputs]
            self.require(take_form(model, form, *few, gradients=level in ("mixer", "block", "train", "train-jump")))
            models[form] = model
        return models

    @cached_property
    def models(self) -> dict[str, SiT]:
        """Models of the levels "model" and "sampling"."""
        return self.build("model")

    def compiled(self, form: str, module: nn.Module, use: Callable[[Callable], Tensor]) -> Callable:
        """Compiles the module if the options say so. Raises ValueError if that changes `use(module)`."""
        if not self.options.compile:
            return module
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        self.require(check(f"{form} with and without torch.compile", [use(compiled)], [use(module)]))
        return compiled


@dataclass(frozen=True)
class Timed:
    """Runs of one level, each called once a round."""

    runs: Mapping[tuple[str, str], Callable[[], object]]  # by form and quantity
    modules: Mapping[str, nn.Module] = field(default_factory=dict)  # by form
    optimizers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)  # by form
    scale: float = 1.0  # the reported time is this times the time of a run
    # More runs: "decode", whose time is added to every form's, or "copy" of `copied_bytes`.
    extras: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    copied_bytes: int = 0


def prepare_op(case: Case) -> Timed:
    config = {**DEFAULTS, **case.options.model_config(case.options.baseline, case.resolution)}
    grid_size, B = case.grid_size, case.batch_size
    N, D, k, heads = math.prod(grid_size), config["hidden_size"], config["kernel_size"], config["num_heads"]
    rotation = Rotation(case.device, B * N * D * torch_dtype(case.dtype).itemsize)
    runs, sets = {}, range(rotation.num_sets)
    with rotation.preparing():
        x, dy = ([case.randn(B, N, D) for _ in sets] for _ in range(2))
        kernels = [case.randn(B, k * k, D).transpose(1, 2).unflatten(2, (k, k)) for _ in sets]  # ATConv's layout
    both = {"backward": [0, 1], "grad_x": [0], "grad_kernels": [1]}
    definition = partial(dynamic_depthwise_conv2d_reference, grid_size=grid_size)
    # form -> (operator with contiguous output, its inputs, quantity -> inputs that get a gradient, definition)
    operators: dict[
        str,
        tuple[
            Callable[..., Tensor],
            Callable[[], list[tuple[Tensor, ...]]],
            dict[str, list[int]],
            Callable[..., Tensor] | None,
        ],
    ] = {
        "attention": (
            lambda qkv: attend(qkv, heads).contiguous(),
            lambda: [(case.randn(B, N, 3 * D),) for _ in sets],
            {"backward": [0]},
            partial(attention_definition, num_heads=heads),
        ),
        "published": (
            lambda x, kernels: published_conv2d(x, kernels, grid_size).contiguous(),
            lambda: [(a, b.contiguous()) for a, b in zip(x, kernels, strict=True)],  # its own layout
            both,
            definition,
        ),
        "atconv": (
            lambda x, kernels: dynamic_depthwise_conv2d(x, kernels, grid_size).contiguous(),
            lambda: list(zip(x, kernels, strict=True)),
            both,
            definition,
        ),
        "floor": (torch.clone, lambda: list(zip(x)), {}, None),
    }
    for form in case.options.forms_of("op"):
        function, make_inputs, gradients, definition_of_form = operators[form]
        with rotation.preparing():
            inputs = make_inputs()
        if definition_of_form is not None:
            case.require(check_operator(form, function, definition_of_form, *(tensor[:2] for tensor in inputs[0])))
        runs[form, "forward"] = rotation.run([partial(function, *of_set) for of_set in inputs])
        for quantity, wanted in gradients.items():
            with rotation.preparing():
                calls = [gradient(function, *pair, wanted) for pair in zip(inputs, dy, strict=True)]
            runs[form, quantity] = rotation.run(calls)
    # Copy so many bytes that no cache holds them and the clock can measure the time.
    source = torch.zeros(2**31 if case.device.type == "cuda" else 2**28, dtype=torch.uint8, device=case.device)
    copy = partial(torch.empty_like(source).copy_, source)
    return Timed(runs, scale=1 / rotation.calls_per_run, extras={"copy": copy}, copied_bytes=len(source))


def gradient(function: Callable, tensors: Sequence[Tensor], dy: Tensor, wanted: list[int]) -> Callable[[], object]:
    """Returns a repeatable run of the backward only, for the tensors numbered `wanted`."""
    leaves = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
    return partial(torch.autograd.grad, function(*leaves), [leaves[i] for i in wanted], dy, retain_graph=True)


def prepare_part(level: str, case: Case) -> Timed:
    """Prepares the token mixers or the blocks of models with one block."""
    models = case.build(level, depth=1)
    B, N, D = case.batch_size, math.prod(case.grid_size), next(iter(models.values())).config.hidden_size
    path = "blocks.0" if level == "block" else "blocks.0.attn"
    rest = (case.randn(B, D), case.grid_size) if level == "block" else (case.grid_size,)
    modules = {form: model.get_submodule(path) for form, model in models.items()}
    x, dy = (case.randn(B, N, D) for _ in range(2))
    leaf, runs = x.detach().requires_grad_(), {}

    def forward_and_backward(run: Callable, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(leaf, *rest), wanted, dy)

    for form, module in modules.items():
        run = case.compiled(form, module, lambda run: run(leaf, *rest))
        wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        runs[form, "forward"] = torch.no_grad()(partial(run, x, *rest))
        runs[form, "forward+backward"] = partial(forward_and_backward, run, wanted)
    return Timed(runs, modules)


def prepare_model(case: Case) -> Timed:
    def forward(run: Callable) -> Tensor:
        with torch.inference_mode():
            return run(*case.inputs)

    runs = {
        (form, "forward"): partial(forward, case.compiled(form, model, forward)) for form, model in case.models.items()
    }
    return Timed(runs, case.models)


def prepare_sampling(case: Case) -> Timed:
    options, (noise, _, y) = case.options, case.inputs
    # Time few steps, because all steps take the same time: one on a CPU, ten on a GPU to include the gaps between them.
    num_steps = 1 if case.device.type == "cpu" else min(options.steps, 10)

    def sample(run: Callable) -> Tensor:
        with torch.inference_mode():
            return sample_ode(guided(run, y, cfg=options.cfg), noise, num_steps=num_steps)

    runs = {
        (form, "sampling"): partial(sample, case.compiled(form, model, sample)) for form, model in case.models.items()
    }
    return Timed(runs, case.models, scale=options.steps / num_steps, extras=decoding(case))


def prepare_jump(case: Case) -> Timed:
    """Prepares one jump of a MeanFlow model from noise to data."""
    noise, _, y = case.inputs
    models, t = case.build("jump", two_times=True), torch.zeros(case.batch_size, device=case.device)

    def sample(run: Callable) -> Tensor:
        with torch.inference_mode():
            return noise + run(noise, t, y, t + 1)

    runs = {(form, "sampling"): partial(sample, case.compiled(form, model, sample)) for form, model in models.items()}
    return Timed(runs, models, extras=decoding(case))


def decoding(case: Case) -> dict[str, Callable[[], object]]:
    """Returns the run that decodes a batch of samples, if the options say so."""
    if case.decoder is None:
        return {}
    dtype = torch_dtype(case.dtype)
    nn.Module.to(case.decoder, case.device, dtype)  # diffusers' own `to` warns of uncast modules, even of none
    return {"decode": torch.inference_mode()(partial(case.decoder.decode, case.inputs[0].to(dtype)))}


def prepare_train(level: str, case: Case, objectives: Mapping[str, Objective]) -> Timed:
    """Prepares training steps of each objective, by quantity, with one model and optimizer."""
    autocast = partial(torch.autocast, case.device.type, torch_dtype(case.dtype), enabled=case.dtype != "fp32")
    data, _, y = case.inputs
    with autocast():
        models = case.build(level, training=True, **({"two_times": True} if level in TWO_TIMES else {}))

    def forward(run: Callable) -> Tensor:
        with autocast():
            return run(*case.inputs)

    runs: dict[tuple[str, str], Callable[[], object]] = {}
    optimizers = {}
    for form, model in models.items():
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers[form] = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
        # Small enough to overflow nowhere: a step that is skipped is no step.
        scaler = torch.amp.GradScaler(case.device.type, init_scale=2.0**8, enabled=case.dtype == "fp16")
        tapped = HiddenTap(case.compiled(form, model, forward), model)
        averaged, weight = [p.detach().clone() for p in parameters], torch.tensor(1e-4, device=case.device)

        def step(
            objective,
            tapped=tapped,
            null_label=model.null_label,
            optimizer=optimizers[form],
            scaler=scaler,
            parameters=parameters,
            averaged=averaged,
            weight=weight,
        ):
            forward_and_backward(objective, tapped, data, y, case.generator, case.dtype, null_label, scaler)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            move_averages(averaged, parameters, weight)

        runs |= {(form, quantity): partial(step, objective) for quantity, objective in objectives.items()}
    return Timed(runs, models, optimizers)


PREPARE: dict[str, Callable[[Case], Timed]] = {
    "op": prepare_op,
    "mixer": partial(prepare_part, "mixer"),
    "block": partial(prepare_part, "block"),
    "model": prepare_model,
    "train": partial(prepare_train, "train", objectives={"step": FlowMatching()}),
    "sampling": prepare_sampling,
    "jump": prepare_jump,
    "train-jump": partial(prepare_train, "train-jump", objectives=TRAIN_JUMP),
}


# ------------------------------------------------------------------------------------------------ models, decoder


def random_model(config: dict, dtype: str, device: torch.device) -> SiT:
    """Returns SiT(**config) with normally distributed parameters, the same at every call.

    Weights have the variance 1 / fan-in and biases are not small: every part of a block affects its output, so errors
    show. (A freshly initialised SiT outputs zeros, and zeros can also be faster.)
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = SiT(**config)
    for block, name in zip(model.blocks, mixer_names(model.config.mixer, model.config.depth), strict=True):
        if list(block.attn.buffers()):  # constants, which must keep their values
            with device:
                block.attn = MIXERS.find(name).build(model.config.hidden_size, model.config).to(torch_dtype(dtype))

    def draw(tensor: Tensor) -> Tensor:
        values = torch.randn(tensor.shape, generator=generator, device=device)
        return values.mul_(0.3 if tensor.ndim < 2 else (len(tensor) / tensor.numel()) ** 0.5).to(torch_dtype(dtype))

    weights = {name: draw(tensor) for name, tensor in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **weights}, assign=True)
    return model.eval()


def open_decoder(options: SpeedOptions) -> Any:
    """Returns the AutoencoderKL that decodes the samples, or None. Random weights cost as much time.

    Raises:
        ValueError: no VAE can be loaded, or its latents have another shape than the samples.
    """
    if options.decoder == "none" or not {"sampling", "jump"} & {*options.levels}:
        return None
    if options.decoder == "sd-vae":
        from diffusers import AutoencoderKL

        decoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        return decoder.eval().requires_grad_(False)
    codec = VAECodec(options.decoder)
    if (codec.downsample, codec.channels) != (options.downsample, options.channels):
        raise ValueError(
            f"{options.decoder} decodes {codec.channels} channels of 1/{codec.downsample} the resolution, "
            f"not {options.channels} of 1/{options.downsample}: set --channels {codec.channels} and "
            f"--downsample {codec.downsample}"
        )
    return codec.vae


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raises ValueError if the device cannot run a tiny hybrid model in `dtype`."""
    tiny = dict(input_size=4, hidden_size=8, depth=2, num_heads=2, mixer="hybrid", num_classes=1)
    model = random_model(tiny, dtype, device)
    try:
        with torch.inference_mode():
            model(
                torch.zeros(1, 4, 4, 4, device=device),
                torch.zeros(1, device=device),
                torch.zeros(1, device=device, dtype=torch.int64),
            )
    except RuntimeError as error:
        others, reason = " or ".join(name for name in PRECISIONS if name != dtype), str(error).partition("\n")[0]
        raise ValueError(f"{dtype} does not run on this {device.type} ({reason}): use {others}") from None
