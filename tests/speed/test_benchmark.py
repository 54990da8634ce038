import dataclasses
import itertools
import json

import pytest
import torch

from sit_atconv.speed import benchmark
from sit_atconv.speed.benchmark import compare, measure, resident_bytes
from sit_atconv.speed.computations import PublishedATConv, published_conv2d
from sit_atconv.speed.forms import LEVELS
from sit_atconv.speed.levels import Case
from sit_atconv.speed.options import SpeedOptions
from sit_atconv.speed.results import DEFINITIONS

CPU = torch.device("cpu")
TINY = SpeedOptions("Tiny/2", depth=2, resolutions=(32, 64), batch_sizes=(4, 2), rounds=2, device="cpu")


def ticking(seconds=0.5):
    ticks = itertools.count(0, seconds)  # duration of every run
    return lambda: next(ticks)


def by_key(measurements):
    return {(m.form, m.quantity): m for m in measurements}


def test_times_rates_and_ratios_follow_from_the_clock():
    """Run number n takes n squared seconds."""

    def times():
        now = 0.0
        for n in itertools.count():
            yield now
            now += n**2
            yield now

    options = dataclasses.replace(TINY, rounds=2, warmup=1, resolutions=(32,), batch_sizes=(4,))
    found = by_key(measure(Case(options, 32, "fp32", CPU), "model", clock=times().__next__))
    places = {form: k for k, form in enumerate(TINY.forms_of("model"))}
    assert list(found) == [(form, "forward") for form in places]
    seconds = {form: ((5 + k) ** 2, (10 + k) ** 2) for form, k in places.items()}
    for (form, _), m in found.items():
        assert m.milliseconds.rounds == pytest.approx([1000 * s for s in seconds[form]])
        assert m.images_per_second.rounds == pytest.approx([4 / s for s in seconds[form]])
        assert m.ms_per_image.median == pytest.approx(sum(seconds[form]) / 2 * 1000 / 4)
        if form == "attention":
            assert m.speedup is None
        else:
            ratios = [a / b for a, b in zip(seconds["attention"], seconds[form], strict=True)]
            assert m.speedup.rounds == pytest.approx(ratios)
        if form == "floor":
            assert m.over_floor is None
        else:
            ratios = [a / b for a, b in zip(seconds[form], seconds["floor"], strict=True)]
            assert m.over_floor.rounds == pytest.approx(ratios)


def test_a_step_is_multiplied_by_the_steps_and_decoding_is_added_once():
    options = dataclasses.replace(TINY, steps=10, levels=("sampling",), decoder="sd-vae")
    decoder = torch.nn.Identity()
    decoder.decode = lambda z: z
    found = by_key(measure(Case(options, 32, "fp32", CPU, decoder), "sampling", clock=ticking(0.5)))
    assert found["decoder", "decode"].milliseconds.median == 500
    assert found["atconv", "sampling"].milliseconds.rounds == (5500, 5500)  # ten steps and the decoder
    assert found["atconv", "sampling"].images_per_second.median == pytest.approx(4 / 5.5)


def test_the_operator_is_compared_with_the_bandwidth_of_a_copy():
    options = dataclasses.replace(TINY, levels=("op",))
    found = by_key(measure(Case(options, 64, "bf16", CPU), "op", clock=ticking(2.0)))
    N, D, B = 16, 128, 2
    moved = B * (2 * N * D + 9 * D) * 2
    bandwidth = 2 * 2**28 / 2.0
    assert found["atconv", "grad_kernels"].over_byte_floor.median == pytest.approx(2.0 / (moved / bandwidth))
    assert found["floor", "forward"].over_byte_floor.median == pytest.approx(2.0 / (2 * B * N * D * 2 / bandwidth))
    assert found["atconv", "backward"].multiply_adds == 2 * found["atconv", "forward"].multiply_adds == 2 * N * D * 9


def test_resident_bytes_count_weights_and_optimizer_state():
    module = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    assert resident_bytes(module, optimizer) == resident_bytes(module, None) == 400
    module(torch.ones(10)).sum().backward()
    optimizer.step()
    assert resident_bytes(module, optimizer) == 1200 + 4  # plus the step counter


def test_peak_memory_of_training_includes_gradients_and_moments():
    options = dataclasses.replace(TINY, forms=("attention", "atconv"), levels=("train",), rounds=1)
    for m in measure(Case(options, 32, "fp32", CPU), "train", clock=ticking()):
        assert 4 * 4 * m.parameters < m.peak_memory_bytes < 6 * 4 * m.parameters  # weights, two moments, gradients


def test_a_form_with_wrong_values_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        "sit_atconv.speed.levels.dynamic_depthwise_conv2d",
        lambda x, kernels, grid_size: published_conv2d(x, kernels.flip(-1), grid_size),
    )
    with pytest.raises(ValueError, match="not timed: atconv and its definition do not agree at 32 px in fp32"):
        compare(dataclasses.replace(TINY, levels=("op",)))
    monkeypatch.setattr(PublishedATConv, "forward", lambda self, x, grid_size: self.proj(self.x_proj(x)))
    timed = []
    monkeypatch.setattr(benchmark, "time_interleaved", lambda *args, **kwargs: timed.append(args))
    with pytest.raises(ValueError, match="published and ATConv with the same weights do not agree"):
        compare(TINY)
    assert timed == []


def test_the_comparison_is_complete_and_can_be_written_as_json():
    options = dataclasses.replace(TINY, dtypes=("fp32", "bf16"), rounds=3, forms=("attention", "atconv", "hybrid"))
    result = json.loads(json.dumps(compare(options, clock=ticking()).to_json()))
    assert set(result) == {"options", "environment", "agreement", "measurements", "definitions"}
    assert result["options"]["preset"] == "Tiny/2"
    assert {"device", "hardware", "cpu_threads", "torch", "date"} <= set(result["environment"])
    cases = [(m["dtype"], m["resolution"], m["level"], m["form"]) for m in result["measurements"]]
    assert cases == list(itertools.product(("fp32", "bf16"), (32, 64), ("model", "sampling"), options.forms))
    checked = {(a["dtype"], a["resolution"]) for a in result["agreement"]}
    assert checked == set(itertools.product(options.dtypes, (32, 64)))
    assert len(result["agreement"]) == 4 * 3 and all(0 <= a["error"] < 0.05 for a in result["agreement"])
    for m in result["measurements"]:
        assert len(m["milliseconds"]["rounds"]) == len(m["images_per_second"]["rounds"]) == 3
        assert m["batch_size"] == {32: 4, 64: 2}[m["resolution"]]
        weights = m["parameters"] * {"fp32": 4, "bf16": 2}[m["dtype"]]
        if m["level"] == "sampling":
            assert weights < m["peak_memory_bytes"] < 2 * weights
        else:
            assert m["peak_memory_bytes"] is None
    explained = {name for key in DEFINITIONS for name in key.split(", ")}
    figures = {"milliseconds", "multiply_adds", "peak_memory_bytes", "speedup", "over_floor", "over_byte_floor"}
    assert {*figures, *LEVELS} <= explained and figures <= set(result["measurements"][0])


def test_running_out_of_memory_names_case_and_remedy(monkeypatch):
    def measure(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(ValueError, match=r"model at 32 px in fp32 with batch size 4 does not fit.*lower --batch-size"):
        compare(TINY)
