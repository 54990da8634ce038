"""What a training run will need: memory, the micro-batch that fits, time and disk, before anything is written.

    plan = Plan.of(config.train, order)
    found = estimate(net, plan)                                # seconds; the model may lie on the device "meta"
    time = time_step(net, flow, plan, found.memory, device)    # runs a few real steps
    print(report(found, time))
"""

import contextlib
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sit_atconv.data.order import BatchOrder
from sit_atconv.flow import FlowMatching
from sit_atconv.models.costs import DEFAULTS, multiply_adds
from sit_atconv.models.mixers import mixer_names
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.devices import has_fused_optimizers, synchronize
from sit_atconv.runtime.environment import describe_environment
from sit_atconv.runtime.files import gigabytes

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT32 = 4  # bytes
GIB = 2**30
CARDS = (24, 80)  # GB of the GPUs that the report looks at
KEPT_FREE = 0.08  # of a card: blocks that the allocator cuts and cannot fill, and what the driver holds
WORKSPACE = GIB  # a guess: the CUDA context, the libraries' code and their scratch memory
TOKENS_OF_A_TRIAL = 4096  # so many tokens of a batch outweigh the memory that passes through for single weights
ENOUGH_SECONDS = 1.0  # a pass as long as this is measured well, whatever the number of images


@dataclass(frozen=True)
class Plan:
    """What is asked of a run, as far as it costs something.

    Args:
        steps: optimizer steps in all.
        batch_size: images in one step, over all processes and micro-batches.
        accumulation: micro-batches in one step.
        num_processes: processes, each with a device of its own.
        precision: "fp32", "bf16" or "fp16", of forward and backward; weights stay in fp32.
        activation_checkpointing: whether blocks are computed again in the backward.
        num_averages: EMAs of the weights.
        num_images: size of the data set.
        steps_per_epoch: steps from one permutation of the images to the next.
        checkpoint_every: steps between two checkpoints; the last step makes one, too.
        keep_checkpoints: how many of the newest are kept.
        keep_every: checkpoints of steps divisible by this are kept for ever; None: none are.
    """

    steps: int
    batch_size: int
    accumulation: int
    num_processes: int
    precision: str
    activation_checkpointing: bool
    num_averages: int
    num_images: int
    steps_per_epoch: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int | None = None

    @classmethod
    def of(cls, train, order: BatchOrder) -> "Plan":
        """What a `TrainConfig` and the order of the data ask."""
        return cls(
            steps=train.steps,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            num_processes=order.num_processes,
            precision=train.precision,
            activation_checkpointing=train.activation_checkpointing,
            num_averages=len(train.ema_decays),
            num_images=order.num_images,
            steps_per_epoch=order.steps_per_epoch,
            checkpoint_every=train.checkpoint_every,
            keep_checkpoints=train.keep_checkpoints,
            keep_every=train.keep_every,
        )

    @property
    def micro_batch(self) -> int:
        """Images that a device sees at a time."""
        return self.batch_size // (self.accumulation * self.num_processes)


@dataclass(frozen=True)
class Memory:
    """What training has alive on one device at most, in bytes.

    Args:
        weights: the parameters in float32.
        gradients: of the trained ones, in float32.
        moments: AdamW's two.
        averages: the EMAs, each as large as the weights.
        buckets: the copy of the gradients that several processes exchange; 0 for one process.
        casts: the copies in low precision that autocast keeps of weights during a pass; 0 in fp32.
        workspace: a guess at what lies outside of tensors on a GPU.
        image: what one more image adds at the peak of forward and backward.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    buckets: int
    casts: int
    workspace: int
    image: float

    @property
    def fixed(self) -> int:
        """All of it but the images."""
        return (self.weights + self.gradients + self.moments + self.averages + self.buckets + self.casts
                + self.workspace)

    def total(self, micro_batch: int) -> float:
        return self.fixed + micro_batch * self.image

    def images_in(self, available: float) -> int:
        """The images at a time that this many bytes are enough for; 0 where not even one fits."""
        return max(0, math.floor((available - self.fixed) / self.image))

    def largest_micro_batch(self, gigabytes: float) -> int:
        """The images at a time that a card sold as one of so many GB holds; 0 where not even one fits.

        These are binary gigabytes (2^30 bytes), and KEPT_FREE of them stay free.
        """
        return self.images_in(gigabytes * GIB * (1 - KEPT_FREE))


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Args:
        plan: what was asked.
        num_trained: the model's parameters, but for constants.
        multiply_adds: of one forward of one image.
        memory: of one device.
        checkpoint: bytes of one checkpoint.
        num_checkpoints: how many of them lie on the disk at one time, at most.
    """

    plan: Plan
    num_trained: int
    multiply_adds: int
    memory: Memory
    checkpoint: int
    num_checkpoints: int

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints at the time when most of them lie there."""
        return self.checkpoint * self.num_checkpoints

    @property
    def flops(self) -> int:
        """Of one step over all processes: two for a multiply-add, three forwards for forward and backward.

        What activation checkpointing computes twice is not counted twice, as is usual.
        """
        return 2 * 3 * self.multiply_adds * self.plan.batch_size


@dataclass(frozen=True)
class StepTime:
    """How long an optimizer step takes.

    Args:
        seconds: of one step; None where it was not measured.
        note: on what it was measured, or why it was not.
    """

    seconds: float | None
    note: str


def estimate(net: SiT, plan: Plan) -> Estimate:
    """What training `net` as planned needs. The model may lie on any device, "meta" included; takes seconds."""
    return Estimate(
        plan=plan,
        num_trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        multiply_adds=multiply_adds(net, net.grid_size),
        memory=memory(net, plan),
        checkpoint=checkpoint_bytes(net, plan.num_averages),
        num_checkpoints=checkpoints_at_once(plan),
    )


# -------------------------------------------------------------------------------------------------------- memory

def memory(net: SiT, plan: Plan) -> Memory:
    """What training has alive on one device at most.

    An upper bound: gradients and casts count in full beside the activations, though the last gradients are made when
    most activations are gone, and with activation checkpointing the backward holds the casts of one block at a time.
    Encoding images on the fly and drawing previews are left out.
    """
    weights = FLOAT32 * sum(p.numel() for p in net.parameters())
    trained = FLOAT32 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    return Memory(
        weights=weights,
        gradients=trained,
        moments=2 * trained,
        averages=plan.num_averages * weights,
        buckets=trained if plan.num_processes > 1 else 0,
        casts=cast_bytes(net, precision=plan.precision),
        workspace=WORKSPACE,
        image=activation_bytes(
            {name: net.config[name] for name in DEFAULTS},
            size=net.config.input_size,
            precision=plan.precision,
            activation_checkpointing=plan.activation_checkpointing,
        ),
    )


def cast_bytes(net: SiT, *, precision: str) -> int:
    """The weights that autocast casts, those of linears and convolutions: one copy each, kept for the backward."""
    if precision not in LOW_PRECISION:
        return 0
    cast = (module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return LOW_PRECISION[precision].itemsize * sum(module.weight.numel() for module in cast)


def activation_bytes(config: dict, *, size: int, precision: str, activation_checkpointing: bool) -> float:
    """What one more image of the batch adds to what forward and backward have alive at their peak, in bytes.

    That is what autograd keeps, and a little that comes and goes in the backward. It is found by running both on
    tensors without data. The sum is linear in the number of blocks, so models of the last two blocks and of one more
    stand for the whole. These are the operators of a CPU: a GPU's attention keeps what the CPU's does (queries, keys,
    values, output), and ATConv's Triton kernels keep x and the kernels, as here. A compiled model needs less.

    Args:
        config: arguments of SiT's constructor; what is missing has its default.
        size: side of the input (in latents).
        precision: "fp32", "bf16" or "fp16".
        activation_checkpointing: whether blocks are computed again in the backward.
    """
    config = {**DEFAULTS, **config}
    names = mixer_names(config["mixer"], config["depth"])

    def of_blocks(names: list[str]) -> float:
        shape = {**config, "mixer": names, "depth": len(names), "input_size": size}
        num_images = max(2, TOKENS_OF_A_TRIAL // (size // config["patch_size"]) ** 2)
        low, high = _peak_bytes(shape, (num_images, 2 * num_images), precision, activation_checkpointing)
        return (high - low) / num_images

    rest, last = names[:-2], names[-2:]
    base = of_blocks(last)
    return base + sum((of_blocks([name, *last]) - base) * rest.count(name) for name in sorted(set(rest)))


def _peak_bytes(config: dict, batches: Iterable[int], precision: str, activation_checkpointing: bool) -> list[int]:
    """What forward and backward have alive at most, beyond weights, gradients and inputs; for each number of images."""
    peaks = []
    with FakeTensorMode():
        net = SiT(**config)
        if activation_checkpointing:
            net.enable_gradient_checkpointing()
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        lasting = [*net.parameters(), *(p.grad for p in net.parameters() if p.requires_grad)]
        for num_images in batches:
            x = torch.empty(num_images, net.config.in_channels, net.config.input_size, net.config.input_size)
            t, y = torch.empty(num_images), torch.empty(num_images, dtype=torch.long)
            with _LiveBytes([*lasting, x, t, y]) as live:
                with _autocast("cpu", precision):
                    v = net(x, t, y)
                v.float().square().mean().backward()
            peaks.append(live.peak)
    return peaks


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live; those of the `known` tensors are not."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.seen:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.seen[storage] = None
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def _autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager:
    if precision not in LOW_PRECISION:
        return contextlib.nullcontext()
    return torch.autocast(device_type, LOW_PRECISION[precision])


# ---------------------------------------------------------------------------------------------------------- disk

def checkpoint_bytes(net: SiT, num_averages: int) -> int:
    """Of one checkpoint: the model, its averages and AdamW's two moments, in float32."""
    num_trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return FLOAT32 * ((1 + num_averages) * sum(p.numel() for p in net.parameters()) + 2 * num_trained)


def checkpoints_at_once(plan: Plan) -> int:
    """How many lie on the disk at most: while the last is written, the newest before it and those kept for ever."""
    made = [*range(plan.checkpoint_every, plan.steps, plan.checkpoint_every), plan.steps]
    older = made[: -plan.keep_checkpoints - 1]
    kept = [step for step in older if plan.keep_every and step % plan.keep_every == 0]
    return len(made) - len(older) + len(kept)


# ---------------------------------------------------------------------------------------------------------- time

def time_step(
    net: SiT, flow: FlowMatching, plan: Plan, memory: Memory, device: torch.device, free: float | None = None
) -> StepTime:
    """Measures forward, backward, AdamW and the averages on random images, and scales them to a whole step.

    Doubles the number of images, up to the micro-batch, until a pass takes ENOUGH_SECONDS. The weights stay as they
    are, for the learning rate is 0; gradients are gone afterwards. Loading of data and what processes tell each other
    are not measured.

    Args:
        net: on `device`, with activation checkpointing as planned.
        flow: the objective.
        plan: what is asked of the run.
        memory: what `estimate` found; no more is used than is free.
        device: where training shall run.
        free: bytes that are free there; asked of the system if not given.
    """
    free = free_bytes(device) if free is None else free
    limit = min(plan.micro_batch, memory.images_in(free + memory.weights))  # the weights lie there already
    if limit < 1:
        needed = (memory.total(1) - memory.weights) / GIB
        return StepTime(None, f"not measured: needs {needed:.1f} GiB more on {device.type}, {free / GIB:.1f} are free")

    parameters = [p for p in net.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]  # one stands for all
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=has_fused_optimizers(device))
    generator = torch.Generator(device).manual_seed(0)

    def forward_and_backward(num_images: int) -> None:
        size = net.config.input_size
        data = torch.randn(num_images, net.config.in_channels, size, size, generator=generator, device=device)
        y = torch.randint(net.config.num_classes, (num_images,), generator=generator, device=device)
        optimizer.zero_grad()
        with _autocast(device.type, plan.precision):
            loss = flow.loss(net, data, y, flow.draw(data.shape, generator), net.null_label)["loss"].mean()
        loss.backward()

    def update() -> None:
        optimizer.step()
        with torch.no_grad():
            for _ in range(plan.num_averages):
                torch._foreach_lerp_(average, parameters, 0.5)

    num_images = 1
    seconds = _seconds(functools.partial(forward_and_backward, num_images), device)
    while seconds < ENOUGH_SECONDS and num_images < limit:
        num_images = min(2 * num_images, limit)
        seconds = _seconds(functools.partial(forward_and_backward, num_images), device)
    seconds *= plan.accumulation * plan.micro_batch / num_images
    seconds += _seconds(update, device)
    optimizer.zero_grad()
    where = f"{describe_environment(device)['hardware']}, {plan.precision}, {num_images} of {plan.micro_batch} images"
    return StepTime(seconds, f"measured on {where} at a time")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the second run: the first one warms up."""
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; one that shares the machine's has the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


# -------------------------------------------------------------------------------------------------------- report

def report(found: Estimate, time: StepTime) -> str:
    """What was found, for a person to read: one line a fact."""
    plan, memory = found.plan, found.memory
    rows = [
        ("model", f"{found.num_trained / 1e6:.1f} M trained parameters; "
                  f"{found.multiply_adds / 1e9:.2f} G multiply-adds for one forward of an image"),
        ("batch", _batch(plan)),
        ("run", f"{plan.steps:,} steps, {plan.steps_per_epoch:,} steps an epoch, "
                f"{plan.steps / plan.steps_per_epoch:.1f} epochs of {plan.num_images:,} images"),
        ("memory", f"{_gib(memory.total(plan.micro_batch))} on each device = {_gib(memory.fixed)} fixed "
                   f"+ {plan.micro_batch} x {memory.image / 2**20:.1f} MiB an image ({_kind(plan)})"),
        ("  fixed", _fixed(memory, plan)),
        *((f"  {card} GB GPU", _fit(found, card)) for card in CARDS),
        ("arithmetic", f"{found.flops / 1e12:.4g} TFLOP a step, forward and backward of the whole batch"),
        ("time", _time(found, time)),
        ("disk", f"{gigabytes(found.disk)} at most: {found.num_checkpoints} x {gigabytes(found.checkpoint)} of "
                 f"checkpoints, with the one being written"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _batch(plan: Plan) -> str:
    processes = f"{plan.num_processes} process{'es' if plan.num_processes > 1 else ''}"
    micro_batches = f"{plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''}"
    return f"{plan.batch_size} images a step = {processes} x {micro_batches} of {plan.micro_batch}"


def _kind(plan: Plan) -> str:
    return f"{plan.precision}, activation checkpointing {'on' if plan.activation_checkpointing else 'off'}"


def _fixed(memory: Memory, plan: Plan) -> str:
    parts = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("AdamW", memory.moments),
        (f"{plan.num_averages} EMA", memory.averages),
        ("exchanged gradients", memory.buckets),
        (f"{plan.precision} weights", memory.casts),
        ("CUDA and its libraries (a guess)", memory.workspace),
    ]
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts if size)


def _fit(found: Estimate, card: int) -> str:
    plan, fits = found.plan, found.memory.largest_micro_batch(card)
    share = plan.batch_size // plan.num_processes  # of a process in one step
    if not fits:
        return f"not even one image fits, with {KEPT_FREE:.0%} kept free"
    accumulation = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= fits)
    return f"up to {fits} images at a time, with {KEPT_FREE:.0%} kept free: accumulation {accumulation} is enough"


def _time(found: Estimate, time: StepTime) -> str:
    if time.seconds is None:
        return time.note
    rate = found.flops / found.plan.num_processes / time.seconds / 1e12
    return (f"{_duration(time.seconds * found.plan.steps)} ({time.seconds:.3g} s a step, {rate:.3g} TFLOP/s a device), "
            f"{time.note}; without compilation, data loading, communication, checkpoints and previews")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
