"""Estimates against what real training allocates, writes and takes."""

import dataclasses
import itertools

import pytest
import torch

from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.training_state import TrainingState, save_checkpoint
from sit_atconv.flow import FlowMatching
from sit_atconv.models import SiT
from sit_atconv.speed.timing import peak_bytes
from sit_atconv.training import estimate as estimating
from sit_atconv.training.estimate import (
    GIB,
    Memory,
    Plan,
    StepTime,
    activation_bytes,
    cast_bytes,
    checkpoint_bytes,
    checkpoints_at_once,
    estimate,
    report,
    time_step,
)

CPU = torch.device("cpu")
ROOMY = Memory(weights=0, gradients=0, moments=0, averages=0, buckets=0, casts=0, workspace=0, image=1)
SHAPE = dict(input_size=16, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=10)
PLAN = Plan(
    steps=1000, batch_size=8, accumulation=2, num_processes=1, precision="fp32", activation_checkpointing=False,
    num_averages=1, num_images=84, steps_per_epoch=10, checkpoint_every=100, keep_checkpoints=2,
)


def peak_of_training(net: SiT, num_images: int, precision: str) -> int:
    """Bytes of forward and backward, beyond weights and gradients."""
    size = net.config.input_size
    x, t = torch.randn(num_images, net.config.in_channels, size, size), torch.rand(num_images)
    y = torch.zeros(num_images, dtype=torch.long)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            v = net(x, t, y)
        v.float().square().mean().backward()

    run()  # makes the gradients and the tables
    return peak_bytes(run, CPU)


@pytest.mark.parametrize(
    ("mixer", "precision", "checkpointing", "tolerance"),
    [
        ("atconv", "fp32", False, 0.05),
        ("attention", "fp32", True, 0.05),
        pytest.param("hybrid", "bf16", False, 0.05, marks=pytest.mark.slow),
        # A CPU's products in bf16 need scratch memory.
        pytest.param("hybrid", "bf16", True, 0.25, marks=pytest.mark.slow),
    ],
)
def test_an_image_more_needs_what_training_measures(mixer, precision, checkpointing, tolerance):
    net = SiT(**SHAPE, mixer=mixer)
    if checkpointing:
        net.enable_gradient_checkpointing()
    low, high = (peak_of_training(net, n, precision) for n in (16, 32))
    found = activation_bytes(net.config, size=16, precision=precision, activation_checkpointing=checkpointing)
    assert found == pytest.approx((high - low) / 16, rel=tolerance)


def test_trials_leave_no_trace():
    """Of tables that a forward makes on tensors without data, none is kept; and they meet none that were kept."""
    net = SiT(**{**SHAPE, "depth": 1, "input_size": 20})
    inputs, state = (torch.randn(2, 4, 20, 20), torch.rand(2), torch.tensor([1, 2])), torch.get_rng_state()
    for _ in range(2):
        activation_bytes(net.config, size=20, precision="fp32", activation_checkpointing=False)
        assert type(net(*inputs)) is torch.Tensor
    assert torch.equal(torch.get_rng_state(), state)


def test_bytes_of_everything_else(monkeypatch):
    monkeypatch.setattr(estimating, "activation_bytes", lambda *_, **__: 1000.0)
    with torch.device("meta"):
        net = SiT(**SHAPE, mixer="hybrid")
    parameters, constants = sum(p.numel() for p in net.parameters()), net.pos_embed.numel()
    memory = estimate(net, dataclasses.replace(PLAN, precision="bf16", num_averages=3, num_processes=2)).memory
    trained = 4 * (parameters - constants)
    assert (memory.weights, memory.gradients, memory.moments) == (4 * parameters, trained, 2 * trained)
    assert (memory.averages, memory.buckets) == (12 * parameters, trained)
    single = estimate(net, PLAN).memory
    assert (single.buckets, single.casts, single.averages) == (0, 0, 4 * parameters)
    assert single.total(5) == 8 * parameters + 3 * trained + estimating.WORKSPACE + 5000


def test_autocast_keeps_a_copy_of_the_weights_that_are_counted():
    """With many weights and few tokens, the copies are what bf16 has alive."""
    net = SiT(**{**SHAPE, "hidden_size": 256, "input_size": 2, "mixer": "attention"})
    peaks = [peak_of_training(net, n, "bf16") for n in (1, 2)]
    assert cast_bytes(net, precision="bf16") == pytest.approx(2 * peaks[0] - peaks[1], rel=0.25)
    assert cast_bytes(net, precision="fp32") == 0


def test_the_largest_micro_batch_leaves_a_margin():
    memory = dataclasses.replace(ROOMY, weights=GIB, moments=GIB, workspace=GIB, image=GIB / 2)
    assert memory.largest_micro_batch(10) == 12  # (9.2 - 3) * 2 = 12.4
    assert memory.total(12) <= 0.92 * 10 * GIB < memory.total(13)
    assert (memory.largest_micro_batch(3.7), memory.largest_micro_batch(2)) == (0, 0)


def test_a_checkpoint_is_as_large_as_the_files(tmp_path):
    net = SiT(**SHAPE, mixer="hybrid")
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    codec = {"kind": "identity", "channels": 4, "downsample": 1}
    recipe = Recipe("linear", "velocity", codec, ["a"] * 10, 1)
    folder = save_checkpoint(tmp_path, TrainingState(net, {0.9: net}, optimizer), recipe, keep=1)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert checkpoint_bytes(net, 1) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("steps", [90, 100, 250, 1000])
@pytest.mark.parametrize(("keep", "keep_every"), itertools.product([1, 3], [None, 100, 200]))
def test_checkpoints_at_once_are_those_of_a_run(steps, keep, keep_every):
    plan = dataclasses.replace(PLAN, steps=steps, keep_checkpoints=keep, keep_every=keep_every)
    kept, most = [], 0
    for step in [*range(100, steps, 100), steps]:
        most = max(most, len(kept) + 1)
        kept.append(step)
        kept = [s for s in kept if s in kept[-keep:] or (keep_every and s % keep_every == 0)]
    assert checkpoints_at_once(plan) == most


def test_a_step_is_timed_without_changing_the_model():
    torch.manual_seed(0)
    net = SiT(**SHAPE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    timed = time_step(net, FlowMatching(), PLAN, ROOMY, CPU)
    assert timed.seconds > 0 and "4 of 4 images" in timed.note
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_step_is_as_long_as_its_passes_and_its_update(monkeypatch):
    """A pass takes half a second for each image, an update seven."""
    now, net = [0.0], SiT(**SHAPE)
    loss, step = FlowMatching.loss, torch.optim.AdamW.step

    def slow_loss(self, model, data, *rest):
        now[0] += len(data) / 2
        return loss(self, model, data, *rest)

    def slow_step(self):
        now[0] += 7
        step(self)

    monkeypatch.setattr(estimating.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(FlowMatching, "loss", slow_loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    plan = dataclasses.replace(PLAN, batch_size=96, accumulation=3, num_processes=2)
    timed = time_step(net, FlowMatching(), plan, ROOMY, CPU)
    assert timed.seconds == 3 * 16 / 2 + 7
    assert "2 of 16 images" in timed.note  # a second is enough


def test_what_does_not_fit_is_not_run():
    net = SiT(**SHAPE)
    memory = dataclasses.replace(ROOMY, weights=9 * GIB, moments=2 * GIB, image=GIB)  # the weights are there already
    assert "1 of 4 images at a time" in time_step(net, FlowMatching(), PLAN, memory, CPU, free=3 * GIB).note
    refused = time_step(net, FlowMatching(), PLAN, memory, CPU, free=2.9 * GIB)
    assert refused == StepTime(None, "not measured: needs 3.0 GiB more on cpu, 2.9 are free")
    assert all(p.grad is None for p in net.parameters())


def test_the_report_says_each_fact_in_a_line():
    with torch.device("meta"):
        net = SiT.from_preset("SiT-ATConv-S/8", depth=2)
    plan = dataclasses.replace(PLAN, steps=400_000, batch_size=256, num_processes=4, precision="bf16",
                               checkpoint_every=50_000, num_images=1000, steps_per_epoch=3)
    found = estimate(net, plan)
    assert found.flops == 6 * 256 * found.multiply_adds
    text = report(found, StepTime(0.5, "measured on a machine"))
    lines = dict(line.strip().split("  ", 1) for line in text.splitlines())
    assert "= 4 processes x 2 micro-batches of 32" in lines["batch"]
    assert "2.3 days (0.5 s a step" in lines["time"] and "measured on a machine; without compilation" in lines["time"]
    assert "exchanged gradients" in lines["fixed"] and "a guess" in lines["fixed"]
    assert f": 3 x {found.checkpoint / 1e6:.1f} MB of checkpoints" in lines["disk"]
    assert "accumulation 1 is enough" in lines["24 GB GPU"]
    assert report(found, StepTime(None, "not measured: why")).splitlines()[-2].endswith("  not measured: why")

    tight = dataclasses.replace(ROOMY, weights=21 * GIB, image=2 * GIB)  # of 24 and 80 GB, 22.08 and 73.6 are used
    lines = report(dataclasses.replace(found, memory=tight), StepTime(None, "")).splitlines()
    assert "not even one image fits" in next(line for line in lines if "24 GB GPU" in line)
    assert "up to 26 images" in (line := next(line for line in lines if "80 GB GPU" in line))
    assert "accumulation 4 is enough" in line  # of the 64 images of a process: 32 would be too many
