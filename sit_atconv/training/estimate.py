"""Estimates of a run's memory, micro-batch, time and disk, from a few real steps without side effects."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn

from sit_atconv.checkpoints.training_state import checkpoint_bytes
from sit_atconv.data.order import BatchOrder
from sit_atconv.flow.auxiliary import AuxiliaryInputs, HiddenTap
from sit_atconv.flow.step import forward_and_backward
from sit_atconv.models.costs import multiply_adds
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.devices import synchronize
from sit_atconv.runtime.environment import describe_environment
from sit_atconv.runtime.files import gibibytes, gigabytes
from sit_atconv.runtime.memory import free_bytes, peak_bytes
from sit_atconv.training.config import Config
from sit_atconv.training.ema import Averages
from sit_atconv.training.optimizers import make_optimizer

GIB = 2**30
CARDS = (24, 80)  # memory in GB of the GPUs in the report
KEPT_FREE = 0.08  # share of a GPU's memory kept free for fragmentation and the driver
WORKSPACE = GIB  # a guess: the CUDA context, the libraries' code and their scratch memory
TRIAL_TOKENS = 256  # with so many tokens in a batch, temporary memory for single weights does not matter
ENOUGH_SECONDS = 1.0  # a pass of this length is measured well enough, whatever the number of images
UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def report(net: SiT, config: Config, order: BatchOrder, device: torch.device) -> str:
    """Returns the report of `--dry-run`, one fact a line; `net` may be on any device."""
    train, processes, images = config.train, order.num_processes, order.micro_batch
    if train.activation_checkpointing:
        net.enable_gradient_checkpointing()
    parts, image = fixed_bytes(net, config, processes), image_bytes(net, config, device)
    fixed, share = sum(parts.values()), order.accumulation * images  # images of a process in one step
    seconds, note = time_step(net, config, order, fixed, image, device)
    macs, trained = multiply_adds(net, net.grid_size), sum(p.numel() for p in net.parameters() if p.requires_grad)
    passes = 3 + config.flow.forwards  # forwards, of which a backward counts two; without what checkpointing repeats
    added = config.auxiliary.to(next(net.parameters()).device).multiply_adds(net) if config.auxiliary else 0.0
    flops = 2 * (passes * macs + added) * order.batch_size
    size = checkpoint_bytes(net, len(train.ema_decays), config.auxiliary)
    count = train.checkpoints_at_once
    rows = {
        "model": f"{trained / 1e6:.1f} M trained parameters; "
        f"{macs / 1e9:.2f} G multiply-adds for one forward of an image",
        **describe_auxiliary(config, added, passes * macs),
        "batch": f"{order.batch_size} images a step = {processes} process{'es' * (processes > 1)} x "
        f"{order.accumulation} micro-batch{'es' * (order.accumulation > 1)} of {images}",
        "run": f"{train.steps:,} steps, {order.steps_per_epoch:,} steps an epoch, "
        f"{train.steps / order.steps_per_epoch:.1f} epochs of {order.num_images:,} images",
        "memory": f"{gibibytes(fixed + images * image)} on each device = {gibibytes(fixed)} fixed + {images} x "
        f"{image / 2**20:.1f} MiB an image ({train.precision}, activation checkpointing "
        f"{'on' if train.activation_checkpointing else 'off'})",
        "  fixed": ", ".join(f"{name} {gibibytes(part)}" for name, part in parts.items() if part),
    }
    for card in CARDS:
        fits = int((card * GIB * (1 - KEPT_FREE) - fixed) // image)
        enough = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= fits), None)
        rows[f"  {card} GB GPU"] = (
            f"not even one image fits, with {KEPT_FREE:.0%} kept free"
            if fits < 1
            else (f"up to {fits} images at a time, with {KEPT_FREE:.0%} kept free: accumulation {enough} is enough")
        )
    rows["arithmetic"] = f"{flops / 1e12:.4g} TFLOP a step, forward and backward of the whole batch"
    rows["time"] = note
    if seconds is not None:
        unit = next((name for name, length in UNITS.items() if seconds * train.steps >= 2 * length), "seconds")
        rows["time"] = (
            f"{seconds * train.steps / UNITS[unit]:.1f} {unit} ({seconds:.3g} s a step, "
            f"{flops / processes / seconds / 1e12:.3g} TFLOP/s a device), {note}; without compilation, data "
            "loading, communication, checkpoints and previews"
        )
    rows["disk"] = (
        f"{gigabytes(size * count)} at most: {count} x {gigabytes(size)} of checkpoints, with the one being written"
    )
    if train.evaluate_every is not None and seconds is not None:
        times = math.ceil(train.steps / train.evaluate_every)
        rows["quality"] = describe_quality(config, times, seconds / (share * passes) / processes, parts["weights"])
    if kept := config.snapshots_bytes(net):
        rows["disk"] += f"; {gigabytes(kept)} of snapshots"
    return "\n".join(f"{name:11}  {text}" for name, text in rows.items())


def describe_quality(config: Config, times: int, forward: float, weights: int) -> str:
    """Returns the cost of measuring the quality of samples.

    Args:
        times: how often it is measured.
        forward: seconds that all processes together need for the forward of an image.
        weights: bytes of the weights.
    """
    quality, averages = config.quality, len(config.train.ema_decays)
    seconds = quality.num_samples * averages * quality.forwards * forward
    return (
        f"{times} times {quality.num_samples:,} samples of {averages} average{'s' * (averages > 1)}, "
        f"{quality.forwards} forwards each: {seconds / 60:.3g} minutes each time, without the extractor; "
        f"{gibibytes(weights)} of memory for another copy of the weights"
    )


def fixed_bytes(net: SiT, config: Config, num_processes: int) -> dict[str, int]:
    """Returns an upper bound of the memory in bytes that does not depend on the number of images, by part.

    Encoding images in each step and drawing previews are not included.
    """
    beside = [*config.auxiliary.parameters()] if config.auxiliary else []
    frozen = sum(p.nbytes for p in beside if not p.requires_grad)
    projector = sum(p.nbytes for p in beside if p.requires_grad)
    weights, num_averages = sum(p.nbytes for p in net.parameters()), len(config.train.ema_decays)
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    modules = [*net.modules(), *(config.auxiliary.modules() if config.auxiliary else ())]
    cast = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear | nn.Conv2d))  # cached by autocast
    return {
        "weights": weights,
        "gradients": trained,
        config.optimizer[0].__name__: 2 * trained,  # the moments of AdamW; others have no more
        f"{num_averages} EMA": num_averages * weights,
        "exchanged gradients": trained + projector if num_processes > 1 else 0,
        "parameters of the auxiliary loss": (4 + num_averages) * projector,
        "encoder": frozen,
        f"{config.train.precision} weights": 0 if config.train.precision == "fp32" else 2 * cast,
        "CUDA and its libraries (a guess)": WORKSPACE,
    }


def describe_auxiliary(config: Config, multiply_adds: float, of_model: float) -> dict[str, str]:
    """Returns the row of the auxiliary loss; multiply-adds are those of a step for an image."""
    if config.auxiliary is None:
        return {}
    frozen, trained = (
        sum(p.numel() for p in config.auxiliary.parameters() if p.requires_grad == is_trained) / 1e6
        for is_trained in (False, True)
    )
    name = type(config.auxiliary).__name__
    return {
        "auxiliary": f"{name}: {trained:.2f} M trained parameters, {frozen:.1f} M frozen ones; "
        f"{multiply_adds / 1e9:.2f} G multiply-adds a step and image, {multiply_adds / of_model:.1%} of the model's"
    }


def trial_pass(net: SiT, config: Config, num_images: int, device: torch.device) -> None:
    """Runs forward and backward on random images; gradients are added to existing ones."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_images, net.config.in_channels, net.config.input_size, net.config.input_size)
    data = torch.randn(shape, generator=generator, device=device)
    y = torch.randint(net.config.num_classes, shape[:1], generator=generator, device=device)
    loss = config.auxiliary
    tapped = HiddenTap(net, net)
    tapped.serve(loss)

    def auxiliary(draw):
        labels, hidden = tapped.take()
        return loss(
            AuxiliaryInputs(
                data=data,
                y=labels,
                hidden=hidden,
                objective=config.flow,
                draw=draw,
                random=draw.t,
                average=net,
                **loss.blank_inputs(num_images, device),
            )
        )

    forward_and_backward(
        config.flow,
        tapped,
        data,
        y,
        generator,
        config.train.precision,
        net.null_label,
        auxiliary=auxiliary if loss is not None else None,
    )


def image_bytes(net: SiT, config: Config, device: torch.device) -> float:
    """Measures the bytes that one more image adds at the peak of forward and backward.

    The whole model may not fit. Blocks of one mixer need the same memory, so the last two blocks and one more of each
    mixer are measured.
    """
    device = device if device.type == "cuda" else torch.device("cpu")  # other accelerators do not report their peak
    if config.auxiliary is not None:
        config.auxiliary.to(device)
    blocks, few = net.blocks, config.flow.period * max(1, TRIAL_TOKENS // math.prod(net.grid_size))
    kinds, last = [type(block.attn) for block in blocks[:-2]], [*blocks[-2:]]

    def of_blocks(chosen: list[nn.Module]) -> float:
        net.blocks = nn.ModuleList(chosen)
        run = partial(trial_pass, net.to(device), config, device=device)
        run(config.flow.period)  # allocates the gradients
        low, high = (peak_bytes(partial(run, n), device) for n in (few, 2 * few))
        assert low is not None and high is not None  # both devices report it
        return (high - low) / few

    base = of_blocks(last)
    further = {kind: of_blocks([blocks[kinds.index(kind)], *last]) - base for kind in dict.fromkeys(kinds)}
    net.zero_grad()
    net.blocks = blocks
    return base + sum(further[kind] for kind in kinds)


def time_step(
    net: SiT, config: Config, order: BatchOrder, fixed: float, image: float, device: torch.device
) -> tuple[float | None, str]:
    """Times forward, backward, optimizer and averages without changing the weights.

    The number of images is doubled, up to the micro-batch, until a pass takes ENOUGH_SECONDS.

    Returns:
        Seconds of a whole step, and how they were measured; None and the reason if not even one image fits.
    """
    free, here = free_bytes(device), sum(p.nbytes for p in net.parameters() if p.device.type == device.type)
    limit = min(order.micro_batch, int((free + here - fixed) // image))
    if limit < 1:
        return None, (
            f"not measured: needs {(fixed + image - here) / GIB:.1f} GiB more on {device.type}, "
            f"{free / GIB:.1f} are free"
        )
    loss = config.auxiliary.to(device) if config.auxiliary is not None else None
    averages = Averages(net.to(device), config.train.ema_decays, auxiliary=loss)
    modules: list[nn.Module] = [net] if loss is None else [net, loss]
    optimizer = make_optimizer(config.optimizer[0], modules, 0.0, 0.0, config.optimizer[1])
    updated = torch.ones((), dtype=torch.bool, device=device)

    def seconds_of(task: Callable[[], object]) -> float:
        for _ in range(2):  # the first time is a warm-up
            start = time.perf_counter()
            task()
            synchronize(device)
        return time.perf_counter() - start

    run = partial(trial_pass, net, config, device=device)
    num_images = min(config.flow.period, limit)
    while (seconds := seconds_of(partial(run, num_images))) < ENOUGH_SECONDS and num_images < limit:
        num_images = min(2 * num_images, limit)
    seconds *= order.accumulation * order.micro_batch / num_images
    seconds += seconds_of(optimizer.step) + seconds_of(partial(averages.update, 0, updated))
    for module in modules:
        module.zero_grad()
    return seconds, (
        f"measured on {describe_environment(device)['hardware']}, {config.train.precision}, {num_images} "
        f"of {order.micro_batch} images at a time"
    )
