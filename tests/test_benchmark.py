import dataclasses
import itertools
import json

import pytest
import torch
from PIL import Image

from sit_atconv import benchmark
from sit_atconv.benchmark import (
    DEFINITIONS,
    MIXERS,
    Measurement,
    Rounds,
    SpeedOptions,
    check_dtype,
    compare,
    measure,
    multiply_adds,
    open_device,
    peak_bytes,
    random_model,
    save_chart,
    speedup,
    table,
    time_interleaved,
)
from sit_atconv.models import SiT

CPU = torch.device("cpu")
TINY = SpeedOptions("Tiny/2", resolutions=(32, 64), dtypes=("fp32", "bf16"), batch_size=2, rounds=3, device="cpu")


@pytest.fixture(scope="module")
def comparison():
    return compare(TINY)


@pytest.mark.parametrize(
    "mixer, giga, parameters", [("attention", 118.6, 675_129_632), ("atconv", 95.8, 637_678_328)]
)
def test_published_multiply_adds_and_parameters(mixer, giga, parameters):
    config = SpeedOptions(preset="XL/2").model_config(mixer, 256)
    assert round(multiply_adds(config) / 1e9, 1) == giga
    with torch.device("meta"):
        assert sum(p.numel() for p in SiT(**config).parameters()) == parameters


@pytest.mark.parametrize("mixer", MIXERS)
def test_multiply_adds_of_one_block_are_those_of_its_formula(mixer):
    N, D, taps = 64, 128, 9
    one, two = (
        multiply_adds(SpeedOptions(preset="Tiny/2", depth=depth).model_config(mixer, 128)) for depth in (1, 2)
    )
    expected = {
        "attention": N * 4 * D**2 + 2 * N**2 * D,
        "atconv": N * 2 * D**2 + taps * D**2 + D * taps**2 + N * D * taps,
    }
    mlp_and_modulation = N * 8 * D**2 + 6 * D**2
    assert two - one == expected[mixer] + mlp_and_modulation


def test_rounds_are_interleaved_and_warmup_is_thrown_away():
    log, now = [], itertools.count()
    seconds = time_interleaved(
        {name: lambda name=name: log.append(name) for name in "AB"},
        rounds=3,
        warmup=2,
        synchronize=lambda: log.append("sync"),
        clock=lambda: log.append("clock") or next(now) ** 2,
        after_round=lambda: log.append("round"),
    )
    timed = [["sync", "clock", name, "sync", "clock"] for name in "AB"]
    assert log == [*timed[0], *timed[1], "round"] * 5
    elapsed = [(i + 1) ** 2 - i**2 for i in range(0, 20, 2)]  # of the ten timed runs, warm-up included
    assert seconds == {"A": elapsed[4::2], "B": elapsed[5::2]}


def test_speedup_is_taken_round_by_round():
    def measured(mixer, milliseconds):
        rates = Rounds.of([1 / ms for ms in milliseconds])
        return Measurement("SiT", mixer, 256, "fp32", 1, 1, Rounds.of(milliseconds), rates, 4, 4)

    found = speedup(measured("attention", [2.0, 40.0, 9.0]), measured("atconv", [1.0, 10.0, 3.0]))
    assert found.forward.rounds == pytest.approx((2, 4, 3))
    assert found.sampling.rounds == pytest.approx((2, 4, 3))
    assert (found.forward.q1, found.forward.median, found.forward.q3) == pytest.approx((2.5, 3, 3.5))
    assert found.mixer == "atconv"


def test_one_round_is_its_own_quartiles():
    assert Rounds.of([3.0]) == Rounds(3.0, 3.0, 3.0, (3.0,))


def test_milliseconds_and_images_per_second_follow_from_the_clock():
    options = dataclasses.replace(TINY, batch_size=3, steps=10, rounds=2)
    ticks = itertools.count(0, 0.5)  # every run lasts half a second
    attention, atconv = measure(options, 32, "fp32", CPU, clock=lambda: next(ticks))
    assert attention.forward_ms.rounds == atconv.forward_ms.rounds == (500, 500)
    per_step = 0.5 / benchmark.LOOP_STEPS
    assert atconv.images_per_second.median == pytest.approx(3 / (10 * per_step))


@pytest.mark.parametrize("cfg, batch", [(4.0, 4), (1.0, 2), (0.0, 2)])
def test_guidance_doubles_the_batch_of_a_sampling_step(monkeypatch, cfg, batch):
    sizes, forward = [], SiT.forward
    monkeypatch.setattr(SiT, "forward", lambda self, x, t, y: sizes.append(len(x)) or forward(self, x, t, y))
    monkeypatch.setattr(benchmark, "multiply_adds", lambda config: 0)
    measure(dataclasses.replace(TINY, cfg=cfg, rounds=1, warmup=0), 32, "fp32", CPU)
    sampling = [batch] * benchmark.LOOP_STEPS
    assert sizes == [2, 2] + sampling * 2 + sampling * 2  # forwards, timed loops, loops for the memory


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_are_random_everywhere_and_alike_at_every_call(mixer):
    config = TINY.model_config(mixer, 32)
    model, again = (random_model(config, "fp32", CPU) for _ in range(2))
    assert all((p == 0).float().mean() < 0.01 for p in model.parameters())
    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    assert model(x, t, y).std() > 0.01
    assert torch.equal(model(x, t, y), again(x, t, y))


def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        for _ in range(3):
            held = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)
            del held
        return torch.empty(2**18, dtype=torch.uint8)

    assert peak_bytes(run, CPU) == 2**20 + 2**19


def test_comparison_is_complete_and_readable_as_json(comparison):
    result = json.loads(json.dumps(comparison.to_json()))
    assert set(result) == {"options", "environment", "measurements", "speedups", "definitions"}
    assert result["options"]["preset"] == "Tiny/2"
    assert {"device", "hardware", "cpu_threads", "torch", "date"} <= set(result["environment"])
    cases = [(m["resolution"], m["dtype"], m["preset"]) for m in result["measurements"]]
    presets = ["SiT-Tiny/2", "SiT-ATConv-Tiny/2"]
    assert cases == [(px, dtype, name) for dtype in ("fp32", "bf16") for px in (32, 64) for name in presets]
    assert len(result["speedups"]) == 4
    assert all(s["mixer"] == "atconv" for s in result["speedups"])
    for m in result["measurements"]:
        assert m["weight_bytes"] == m["parameters"] * {"fp32": 4, "bf16": 2}[m["dtype"]]
        assert m["weight_bytes"] < m["peak_memory_bytes"] < 2 * m["weight_bytes"]
        assert len(m["forward_ms"]["rounds"]) == len(m["images_per_second"]["rounds"]) == 3
        assert 0 < m["forward_ms"]["q1"] <= m["forward_ms"]["median"] <= m["forward_ms"]["q3"]
    explained = {name for key in DEFINITIONS for name in key.split(", ")}
    assert {"parameters", "multiply_adds", "forward_ms", "images_per_second", "peak_memory_bytes"} <= explained


def test_table_has_a_row_for_each_measurement(comparison):
    text = table(comparison)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(comparison.measurements)
    for row, m in zip(rows, comparison.measurements, strict=True):
        assert f"| {m.preset} |" in row
        assert f"{m.forward_ms.median:.4g}" in row
    assert f"{comparison.speedups[0].forward.median:.2f}" in rows[1]
    assert comparison.environment["hardware"] in text


def test_chart_is_a_picture_with_both_bars_in_every_panel(comparison, tmp_path):
    save_chart(comparison, tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.format == "PNG"
        left, top = picture.width // 2, picture.height // 2
        for x, y in itertools.product((0, left), (0, top)):
            colors = picture.convert("RGB").crop((x, y, x + left, y + top)).getcolors(10**6)
            common = {color for count, color in colors if count > 2000}
            assert {(0x75, 0x80, 0x8C), (0x2A, 0x6F, 0x97)} <= common


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(resolutions=(250,)), "resolution 250 is not a multiple of 16.*give 240 or 256"),
        (dict(resolutions=(8,)), "resolution 8 .*give 16 or 32"),
        (dict(resolutions=()), "resolutions must be one or more"),
        (dict(resolutions=(64, 64)), "resolutions must be one or more different"),
        (dict(preset="SiT-S/2"), "no preset 'SiT-S/2'.*S/2"),
        (dict(dtypes=("fp64",)), "fp32, bf16, fp16, not fp64"),
        (dict(rounds=0), "rounds must be at least 1, not 0"),
        (dict(depth=0), "depth must be at least 1, not 0"),
        (dict(warmup=-1), "warmup must not be negative: -1"),
        (dict(cfg=float("nan")), "cfg must be a finite number, not nan"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        SpeedOptions(**change)


def test_pixel_space_tiles_by_the_patch_alone():
    options = SpeedOptions(preset="Tiny/4", resolutions=(28,), downsample=1, channels=3)
    config = options.model_config("atconv", 28)
    assert (config["input_size"], config["in_channels"], config["patch_size"]) == (28, 3, 4)


def test_unknown_device_is_named():
    with pytest.raises(ValueError, match=r"device 'abacus' cannot be used here.*give cpu"):
        open_device("abacus")


def test_dtype_without_kernels_is_named(monkeypatch):
    def forward(self, x, t, y):
        raise RuntimeError("not implemented for 'Half'")

    check_dtype(CPU, "bf16")
    monkeypatch.setattr(SiT, "forward", forward)
    with pytest.raises(ValueError, match="fp16 does not run on this cpu: use fp32 or bf16"):
        check_dtype(CPU, "fp16")


def test_too_little_memory_is_said(monkeypatch):
    def measure(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(ValueError, match=r"32 px in fp32 with batch_size 2 does not fit.*lower the batch size"):
        compare(TINY)
