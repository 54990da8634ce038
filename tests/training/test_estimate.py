"""Estimates compared with the memory and time of real training."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sit_atconv.checkpoints.training_state import checkpoint_bytes
from sit_atconv.data.order import BatchOrder
from sit_atconv.flow import FlowMatching
from sit_atconv.flow.alignment import Alignment
from sit_atconv.models import SiT
from sit_atconv.models.costs import multiply_adds
from sit_atconv.runtime.memory import peak_bytes
from sit_atconv.training import estimate as estimating
from sit_atconv.training.config import TrainConfig
from sit_atconv.training.estimate import GIB, fixed_bytes, image_bytes, report, time_step

CPU = torch.device("cpu")
SHAPE = dict(input_size=16, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=10)


def config(**train) -> SimpleNamespace:
    """Returns the part of a Config that estimates read."""
    train = TrainConfig(**{"precision": "fp32", "steps": 1000, "batch_size": 8, "checkpoint_every": 100, **train})
    return SimpleNamespace(
        train=train,
        flow=FlowMatching(),
        auxiliary=None,
        snapshots_bytes=lambda net: 0,
        optimizer=(torch.optim.AdamW, {}),
    )


def order(batch_size: int = 8, accumulation: int = 2, **options) -> BatchOrder:
    return BatchOrder(1024, batch_size, seed=0, accumulation=accumulation, **options)


def rows(text: str) -> dict[str, str]:
    """Returns the lines of the report by name."""
    return {name: said.strip() for name, said in (line.strip().split("  ", 1) for line in text.splitlines())}


def peak_of_training(net: SiT, num_images: int, precision: str) -> int:
    """Returns the bytes of forward and backward, without weights and gradients."""
    size = net.config.input_size
    x, t = torch.randn(num_images, net.config.in_channels, size, size), torch.rand(num_images)
    y = torch.zeros(num_images, dtype=torch.long)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            v = net(x, t, y)
        v.float().square().mean().backward()

    run()  # allocates the gradients and the tables
    return peak_bytes(run, CPU)


@pytest.mark.parametrize(
    ("mixer", "precision", "checkpointing"),
    [
        ("atconv", "fp32", False),
        ("attention", "fp32", True),
        (["attention"] * 3 + ["atconv"] * 3, "fp32", False),
        pytest.param("hybrid", "bf16", False, marks=pytest.mark.slow),
        pytest.param("hybrid", "bf16", True, marks=pytest.mark.slow),
    ],
)
def test_memory_of_an_image_agrees_with_training(mixer, precision, checkpointing):
    """Training has all six blocks; the estimate runs the last two and one more of each mixer."""
    net = SiT(**{**SHAPE, "depth": 6}, mixer=mixer)
    if checkpointing:
        net.enable_gradient_checkpointing()
    low, high = (peak_of_training(net, n, precision) for n in (8, 16))
    assert image_bytes(net, config(precision=precision), CPU) == pytest.approx((high - low) / 8, rel=0.05)


@pytest.mark.parametrize("depth", [1, 3])
def test_memory_of_an_image_in_a_model_of_few_blocks(depth):
    net = SiT(**{**SHAPE, "depth": depth})
    low, high = (peak_of_training(net, n, "fp32") for n in (4, 8))
    assert image_bytes(net, config(), CPU) == pytest.approx((high - low) / 4, rel=0.05)


def test_trials_have_no_side_effects():
    net = SiT(**{**SHAPE, "depth": 5})
    inputs, state = (torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([1, 2])), torch.get_rng_state()
    before = net(*inputs)
    image_bytes(net, config(), CPU)
    assert torch.equal(net(*inputs), before) and torch.equal(torch.get_rng_state(), state)
    assert len(net.blocks) == 5 and all(p.grad is None for p in net.parameters())


def test_bytes_that_do_not_depend_on_images():
    with torch.device("meta"):
        net = SiT(**SHAPE, mixer="hybrid")
    parameters, constants = sum(p.numel() for p in net.parameters()), net.pos_embed.numel()
    trained = 4 * (parameters - constants)
    parts = fixed_bytes(net, config(ema_decay=[0.9, 0.99, 0.999], precision="bf16"), num_processes=2)
    assert (parts["weights"], parts["gradients"], parts["AdamW"]) == (4 * parameters, trained, 2 * trained)
    assert (parts["3 EMA"], parts["exchanged gradients"]) == (12 * parameters, trained)
    single = fixed_bytes(net, config(), num_processes=1)
    assert (single["exchanged gradients"], single["fp32 weights"], single["1 EMA"]) == (0, 0, 4 * parameters)
    assert sum(single.values()) == 8 * parameters + 3 * trained + estimating.WORKSPACE


def test_copies_of_the_weights_in_autocast_are_counted():
    """With many weights and few tokens, the copies dominate the memory of bf16."""
    net = SiT(**{**SHAPE, "hidden_size": 256, "input_size": 2, "mixer": "attention"})
    peaks = [peak_of_training(net, n, "bf16") for n in (1, 2)]
    counted = fixed_bytes(net, config(precision="bf16"), 1)["bf16 weights"]
    assert counted == pytest.approx(2 * peaks[0] - peaks[1], rel=0.25)


def test_a_step_is_timed_without_changing_the_model(monkeypatch):
    monkeypatch.setattr(estimating, "ENOUGH_SECONDS", float("inf"))  # however slow the machine is
    torch.manual_seed(0)
    net = SiT(**SHAPE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seconds, note = time_step(net, config(), order(), 0, 1, CPU)
    assert seconds > 0 and "4 of 4 images" in note
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_time_of_a_step_is_that_of_its_passes_and_its_update(monkeypatch):
    """A pass takes half a second for each image, an update seven seconds."""
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
    seconds, note = time_step(net, config(), order(96, 3, num_processes=2), 0, 1, CPU)
    assert seconds == 3 * 16 / 2 + 7
    assert "2 of 16 images" in note  # a second is enough


def test_what_does_not_fit_is_not_run(monkeypatch):
    """Weights that are on the device already do not count as memory that is needed."""
    net, here = SiT(**SHAPE), sum(p.nbytes for p in SiT(**SHAPE).parameters())
    fixed = 2 * GIB + here
    monkeypatch.setattr(estimating, "free_bytes", lambda device: 3 * GIB)
    assert "1 of 4 images at a time" in time_step(net, config(), order(), fixed, GIB, CPU)[1]
    monkeypatch.setattr(estimating, "free_bytes", lambda device: 2.9 * GIB)
    monkeypatch.setattr(FlowMatching, "loss", None)
    refused = time_step(net, config(), order(), fixed, GIB, CPU)
    assert refused == (None, "not measured: needs 3.0 GiB more on cpu, 2.9 are free")


def test_a_model_that_does_not_fit_is_estimated_from_few_blocks(monkeypatch):
    net, depths, loss = SiT(**{**SHAPE, "depth": 9}), [], FlowMatching.loss
    monkeypatch.setattr(estimating, "free_bytes", lambda device: GIB / 2)
    monkeypatch.setattr(
        FlowMatching,
        "loss",
        lambda self, model, *rest: (depths.append(len(model.net.blocks)), loss(self, model, *rest))[1],
    )
    lines = rows(report(net, config(), order(), CPU))
    assert lines["time"].startswith("not measured: needs ") and set(depths) == {2, 3}
    assert "MiB an image" in lines["memory"] and "up to " in lines["24 GB GPU"]


def test_the_report_has_a_line_for_each_fact(monkeypatch):
    with torch.device("meta"):
        net = SiT.from_preset("SiT-ATConv-S/8", depth=2)
    ask = partial(
        report,
        net,
        config(
            steps=400_000,
            batch_size=256,
            accumulation=2,
            precision="bf16",
            checkpoint_every=50_000,
        ),
        order(256, 2, num_processes=4),
        CPU,
    )
    monkeypatch.setattr(estimating, "image_bytes", lambda *_: 2.0**20)
    monkeypatch.setattr(estimating, "time_step", lambda *_: (0.5, "measured on a machine"))
    lines = rows(ask())
    assert "= 4 processes x 2 micro-batches of 32" in lines["batch"]
    assert lines["run"] == "400,000 steps, 4 steps an epoch, 100000.0 epochs of 1,024 images"
    assert "+ 32 x 1.0 MiB an image (bf16, activation checkpointing off)" in lines["memory"]
    assert "2.3 days (0.5 s a step" in lines["time"] and "measured on a machine; without compilation" in lines["time"]
    assert "exchanged gradients" in lines["fixed"] and "a guess" in lines["fixed"]
    assert f": 3 x {checkpoint_bytes(net, 1) / 1e6:.1f} MB of checkpoints" in lines["disk"]
    assert "accumulation 1 is enough" in lines["24 GB GPU"]
    macs = float(lines["model"].split("; ")[1].split()[0]) * 1e9
    assert float(lines["arithmetic"].split()[0]) * 1e12 == pytest.approx(6 * 256 * macs, rel=0.1)
    monkeypatch.setattr(estimating, "time_step", lambda *_: (None, "not measured: why"))
    assert rows(ask())["time"] == "not measured: why"

    monkeypatch.setattr(estimating, "fixed_bytes", lambda *_: {"weights": 21 * GIB})
    monkeypatch.setattr(estimating, "image_bytes", lambda *_: 2 * GIB)  # of 24 and 80 GB, 22.08 and 73.6 are used
    lines = rows(ask())
    assert "not even one image fits" in lines["24 GB GPU"]
    assert "up to 26 images" in lines["80 GB GPU"]
    assert "accumulation 4 is enough" in lines["80 GB GPU"]  # of the 64 images of a process: 32 would be too many


def test_alignment_is_counted():
    net = SiT(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=4)
    plain, aligned = config(), config()
    aligned.auxiliary = Alignment(encoder="digits", projector="conv")
    aligned.auxiliary.image_shape = (3, 16, 16)
    aligned.auxiliary.check(net, None)
    aligned.auxiliary.build(net)
    projector = sum(p.nbytes for p in aligned.auxiliary.projectors.parameters())
    encoder = sum(p.nbytes for p in aligned.auxiliary.encoders.parameters())
    parts = fixed_bytes(net, aligned, 1)
    assert (parts["parameters of the auxiliary loss"], parts["encoder"]) == (5 * projector, encoder)
    assert sum(parts.values()) == sum(fixed_bytes(net, plain, 1).values()) + 5 * projector + encoder
    said = rows(report(net, aligned, order(), CPU))
    added = aligned.auxiliary.multiply_adds(net)
    assert said["auxiliary"].startswith(
        f"Alignment: {projector / 4e6:.2f} M trained parameters, {encoder / 4e6:.1f} M frozen"
    )
    assert f"{added / 3 / multiply_adds(net, net.grid_size):.1%} of the model's" in said["auxiliary"]
    assert all(p.grad is None for p in aligned.auxiliary.parameters())
