"""MeanFlow: the golden values, the derivative of whole models, its draws, and what it refuses."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open

from sit_atconv.flow import MeanFlow
from sit_atconv.flow.auxiliary import HiddenTap
from sit_atconv.flow.mean_flow import IntervalDraw
from sit_atconv.models import SiT
from sit_atconv.sampling import Sampler
from tests.conftest import GOLDEN, relative_error

with safe_open(GOLDEN / "meanflow_loss.safetensors", "pt") as file:
    CASES = json.loads(file.metadata()["cases"])


def golden_net(weights, x, t, y, r):
    """The network of the golden file."""
    h = torch.cat([x.flatten(1), t[:, None], (r - t)[:, None]], 1) @ weights["w1"].T
    h = torch.tanh(h + weights["b1"] + weights["table"][y])
    h = torch.tanh(h @ weights["w2"].T + weights["b2"] + torch.sin(3 * r)[:, None])
    return (h @ weights["w3"].T + weights["b3"]).reshape(x.shape)


def draw_of(noise, t, r, dropped=None, jump_every=1):
    jumps = torch.arange(len(t)) % jump_every == 0
    dropped = torch.zeros(len(t), dtype=torch.bool) if dropped is None else dropped
    return IntervalDraw(noise, t, r, dropped, jumps, jumps.double().mean().item())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_golden_losses_targets_and_gradients(golden, case, dtype, bound):
    tensors, _ = golden("meanflow_loss")
    of_case = {name.removeprefix(f"{case}/"): value for name, value in tensors.items() if name.startswith(f"{case}/")}
    given = {
        name.partition("/")[2]: value.to(dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith(("inputs/", "weights/"))
    }
    weights = {name: given[name].clone().requires_grad_() for name in ("w1", "b1", "w2", "b2", "w3", "b3", "table")}
    options = CASES[case]
    flow = MeanFlow(
        jump_every=1,
        power=options["p"],
        floor=options["c"],
        guidance=options["guidance"],
        guidance_interval=tuple(options["interval"]),
        tangent=options["tangent"],
    )
    null_label, seen = len(weights["table"]) - 1, []

    def net(*inputs):
        return golden_net(weights, *inputs)

    class Watched(MeanFlow):
        def target(self, *args):
            seen.append(super().target(*args))
            return seen[-1]

    flow = Watched(**vars(flow))
    draw = draw_of(given["noise"], given["t"], given["r"], given["dropped"].bool())
    terms = flow.loss(HiddenTap(net, net), given["data"], given["y"], draw, null_label)
    terms["loss"].mean().backward()
    assert relative_error(seen[0], of_case["target"]) < bound
    assert relative_error(terms["loss"], of_case["loss_per_sample"]) < bound
    assert relative_error(terms["error_of_jumps"], of_case["error"]) < bound
    for name, weight in weights.items():
        assert relative_error(weight.grad, of_case[f"gradients/{name}"]) < bound, name


def test_the_identity_and_the_jump_in_closed_form(golden):
    """Data are Gaussian, so that velocity and average velocity are known."""
    tensors, _ = golden("meanflow_loss")
    of = {name.removeprefix("gaussian/"): value for name, value in tensors.items() if name.startswith("gaussian/")}
    mu, s, t, r = of["mu"], of["s"], of["t"], of["r"]

    def spread(t):
        return (t[:, None].square() * s.square() + (1 - t[:, None]).square()).sqrt()

    def u(x, t, y, r):
        interval = (r - t)[:, None]
        return mu + (spread(r) - spread(t)) / (interval * spread(t)) * (x - t[:, None] * mu)

    flow, draw = MeanFlow(jump_every=1, class_dropout_prob=0.0), draw_of(torch.zeros_like(of["x"]), t, r)
    target = flow.target(u, of["x"], of["v"], t.long(), of["u"], draw, None)
    assert relative_error(target, of["u"]) < 1e-12

    class Model:
        null_label = None

        def __call__(self, x, t, y, r):
            return u(x.double(), t.double(), y, r.double()).float()

    x = torch.randn(4, 18, dtype=torch.float64)
    end = x / spread(torch.zeros(1, dtype=torch.float64)) * s + mu  # noise to data
    for steps in (1, 3):
        sampled = Sampler(solver="jump", steps=steps, cfg=1.0)(Model(), x, torch.zeros(4, dtype=torch.long))
        assert relative_error(sampled, end) < 1e-6


def lively(mixer, dtype=torch.float64):
    """A small model with two times, all of whose parts matter."""
    torch.manual_seed(0)
    net = SiT(
        input_size=8,
        patch_size=2,
        in_channels=2,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
        mixer=mixer,
        two_times=True,
    )
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return nn.Module.to(net, dtype)  # diffusers' own `to` warns of casting no module at all


@pytest.mark.parametrize("mixer", ["atconv", "attention", "hybrid"])
def test_derivative_of_whole_models(mixer):
    """In float32 and bfloat16, against central differences in float64."""
    net, flow = lively(mixer), MeanFlow(jump_every=1, class_dropout_prob=0.0)
    x, v = torch.randn(2, 4, 2, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    r, step = t + torch.tensor([0.3, 0.6, 0.2, 0.1], dtype=torch.float64), 1e-4
    x, v, t, r = (tensor.float().double() for tensor in (x, v, t, r))

    def u_at(s):
        with torch.no_grad():
            return net(x + s * v, t + s, y, r)

    expected = (u_at(step) - u_at(-step)) / (2 * step)
    single = lively(mixer, torch.float32)
    tensors = [tensor.float() for tensor in (x, v)]
    draw = draw_of(tensors[0], t.float(), r.float())
    for bound, autocast in ((1e-6, False), (2e-2, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            target = flow.target(single, *tensors, y, tensors[0], draw, 3)
        found = (target - tensors[1]).double() / (r - t)[:, None, None, None]
        assert relative_error(found, expected) < bound


def test_draws_are_intervals_on_the_chosen_rows_only():
    flow = MeanFlow(jump_every=4)
    draw = flow.draw((4000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert draw.jumps.tolist() == [i % 4 == 0 for i in range(4000)] and draw.share == 0.25
    assert torch.equal(draw.r > draw.t, draw.jumps) and torch.equal(draw.r[1::4], draw.t[1::4])
    assert abs(draw.t[~draw.jumps].logit().mean() - 0.4) < 0.06 and abs(draw.t[~draw.jumps].logit().std() - 1) < 0.06
    both = torch.cat([draw.t[::4], draw.r[::4]]).logit()  # the smaller and the larger of two draws
    assert abs(both.mean() - 0.4) < 0.08 and abs(both.std() - 1) < 0.08
    assert 0.08 < draw.dropped.double().mean() < 0.12
    part = draw[slice(6, 10)]
    assert part.jumps.tolist() == [False, False, True, False] and torch.equal(part.t, draw.t[6:10])

    ends = MeanFlow(jump_every=1, logit_mean=0.6, logit_std=1.6, end_logit_mean=4.0, end_logit_std=1.6)
    draw = ends.draw((4000, 1, 1, 1), torch.Generator().manual_seed(0))
    assert (draw.r >= draw.t).all() and abs(draw.t.logit().mean() - 0.6) < 0.1
    assert abs(draw.r.logit(eps=1e-6).median() - 4) < 0.3  # the smaller draw is seldom above it


def loss_of(flow, net):
    data = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    draw, y = flow.draw(data.shape, torch.Generator().manual_seed(0)), torch.arange(8) % 3
    return draw, flow.loss(HiddenTap(net, net), data, y, draw, 3)


def test_errors_of_either_kind_of_row_are_means_over_their_rows():
    net = lively("atconv", torch.float32)
    draw, terms = loss_of(MeanFlow(power=0.0), net)
    errors, jumps = terms["loss"], draw.jumps
    assert terms["error_of_jumps"].mean().item() == pytest.approx(errors[jumps].mean().item())
    assert terms["error_of_flow"].mean().item() == pytest.approx(errors[~jumps].mean().item())
    _, weighted = loss_of(MeanFlow(power=0.5, floor=0.1), net)
    torch.testing.assert_close(weighted["loss"], errors / (errors.detach() + 0.1).sqrt())
    assert not weighted["error_of_flow"].requires_grad
    assert set(loss_of(MeanFlow(jump_every=1), net)[1]) == {"loss", "error_of_jumps"}


def test_small_differences_agree_with_the_derivative():
    """u = share v + (1 - share) u(x_s, s, r) is the same target for a share that goes to 0."""
    net = lively("atconv")
    torch.manual_seed(2)
    x, v = torch.randn(2, 4, 2, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    draw = draw_of(x, t, t + 0.25)
    with torch.no_grad():
        u = net(x, t, y, t + 0.25)
    for tangent in ("velocity", "model"):
        flow = MeanFlow(derivative="difference", shares=(1e-4, 1e-5), tangent=tangent)
        assert flow.at(0.0).shares == (1e-4, 1e-4) and flow.at(0.5).shares[0] == pytest.approx(10**-4.5)
        exact = MeanFlow(tangent=tangent).target(net, x, v, y, u, draw, 3)
        assert relative_error(flow.at(0.0).target(net, x, v, y, u, draw, 3), exact) < 1e-3
    whole = MeanFlow(derivative="difference", shares=(1.0, 1.0)).target(net, x, v, y, u, draw, 3)
    assert torch.equal(whole, v)  # a share of 1 is flow matching
    assert MeanFlow().at(0.5) == MeanFlow()


def test_the_derivative_needs_no_memory_for_a_backward():
    """The target has no graph, also where gradients are enabled."""
    net = lively("atconv", torch.float32)
    _, terms = loss_of(MeanFlow(), net)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.nbytes) or tensor, lambda x: x):
        loss_of(MeanFlow(), net)
        mean_flow, seen[:] = sum(seen), []
        loss_of(MeanFlow(jump_every=9), net)  # one jump in the first row
        few = sum(seen)
    assert terms["loss"].requires_grad and mean_flow == pytest.approx(few, rel=0.02)


def test_arithmetic_is_counted():
    assert MeanFlow().forwards == 0.5 and MeanFlow(guidance=2.0).forwards == 2.5
    assert MeanFlow(tangent="model", jump_every=1).forwards == 3 and MeanFlow(derivative="difference").forwards == 0.25


@pytest.mark.parametrize("mixer", ["atconv", "attention", "hybrid"])
def test_a_whole_loss_has_gradients_for_every_parameter(mixer):
    net = lively(mixer, torch.float32)
    _, terms = loss_of(MeanFlow(guidance=2.0, tangent="model"), net)
    terms["loss"].mean().backward()
    without = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.slow
def test_the_derivative_compiles_as_one_graph():
    net = lively("atconv", torch.float32).requires_grad_(False)
    x, v = torch.randn(2, 4, 2, 8, 8)
    t, y = torch.tensor([0.1, 0.3, 0.5, 0.7]), torch.tensor([0, 1, 2, 3])

    def tangent(x, v, t, r, y):
        return torch.func.jvp(lambda x, t: net(x, t, y, r), (x, t), (v, torch.ones_like(t)))[1]

    with torch.no_grad():
        found = torch.compile(tangent, fullgraph=True)(x, v, t, t + 0.2, y)
        assert relative_error(found, tangent(x, v, t, t + 0.2, y)) < 1e-5
