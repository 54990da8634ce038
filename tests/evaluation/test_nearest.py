"""Whether samples are copies of training images, CMMD, and images with transparency."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.data.digits import load_digits
from sit_atconv.data.pixels import has_transparency, read_image
from sit_atconv.evaluation import metric_functions as metrics
from sit_atconv.evaluation.nearest import nearest, nearest_ratio
from tests.conftest import load_command
from tests.pixel_features import Pixels

DIGITS = np.repeat(load_digits()[0][..., None], 3, axis=-1)


def features(digits: slice) -> torch.Tensor:
    return torch.from_numpy(DIGITS[digits, ..., 0].reshape(-1, 64)).float()


def test_the_nearest_image_is_found_in_any_block():
    images, queries = features(slice(0, 500)), features(slice(500, 560))
    distance, where = nearest(queries, images.split(64))
    every = torch.cdist(queries, images)
    assert torch.equal(where, every.argmin(1)) and torch.allclose(distance, every.min(1).values)
    own = torch.arange(0, 500, 12)[:40]
    some = images[own]
    distance, where = nearest(some, images.split(64), own=own)
    every = torch.cdist(some, images)
    every[torch.arange(40), own] = torch.inf
    assert torch.equal(where, every.argmin(1)) and (distance > 0).all()


def test_copies_have_a_small_ratio_and_other_digits_one_of_about_1():
    images, held_out = features(slice(0, 900)), features(slice(900, 1350))
    group = metrics.jackknife_groups(447)
    fresh, pairs = nearest_ratio(features(slice(1350, None)), images.split(128), held_out, None, group)
    assert 0.85 < fresh.value < 1.15 and 0 < fresh.error < 0.1 and len(pairs) == 10
    copies, pairs = nearest_ratio(images[:447] + 0.1 * torch.rand(447, 64), images.split(128), held_out, None, group)
    assert copies.value < 0.1 and all(sample == image for sample, image, _ in pairs)
    own = torch.arange(0, 900, 9)
    assert nearest_ratio(features(slice(1350, None)), images.split(128), images[own], own, group)[0].value > 0.85
    with pytest.raises(ValueError, match="there is no ratio"):
        nearest_ratio(images, images.split(128), images[:50], None, group)


def test_the_ratios_error_follows_the_spread():
    torch.manual_seed(0)
    images, held_out = torch.randn(300, 4).split(100), torch.randn(100, 4)
    group = metrics.jackknife_groups(400)
    found = [nearest_ratio(torch.randn(400, 4), images, held_out, None, group)[0] for _ in range(60)]
    spread_of_values = np.std([score.value for score in found], ddof=1)
    assert 0.5 < np.mean([score.error for score in found]) / spread_of_values < 2  # a median's jackknife is rough


def test_cmmd_equals_its_definition_and_its_error_leaves_out_groups(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    torch.manual_seed(0)
    x, y = torch.randn(45, 5), torch.randn(30, 5) + 0.3

    def definition(x: torch.Tensor) -> float:
        a, b = (f.double() / f.double().norm(dim=1, keepdim=True) for f in (x, y))
        means = [torch.exp(-torch.cdist(p, q).square() / (2 * 10**2)).mean() for p, q in ((a, a), (b, b), (a, b))]
        return float(1000 * (means[0] + means[1] - 2 * means[2]))

    score, group = metrics.cmmd(x, y), metrics.jackknife_groups(45)
    assert score.value == pytest.approx(definition(x), rel=1e-6) and score.value > 0.1
    assert score.without_group == pytest.approx([definition(x[group != g]) for g in range(20)], rel=1e-6)
    assert metrics.cmmd(y, y).value == pytest.approx(0, abs=1e-9) and metrics.cmmd(x[:30], y).error is None


def evaluate(capsys, *argv) -> tuple[dict, str]:
    load_command("eval/fid.py").main([*map(str, argv), "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_the_command_finds_copies_and_draws_them(tmp_path, capsys):
    np.savez(tmp_path / "copies.npz", DIGITS[100:200])
    np.savez(tmp_path / "train.npz", DIGITS[:1000])
    np.savez(tmp_path / "held_out.npz", DIGITS[1000:1200])
    argv = ["--samples", tmp_path / "copies.npz", "--reference", tmp_path / "train.npz", "--extractor", "digits"]
    more = ["--metrics", "copies", "--features", tmp_path / "features", "--out", tmp_path / "scores.json"]
    found, printed = evaluate(capsys, *argv, *more, "--held-out", tmp_path / "held_out.npz")
    assert found["scores"]["nearest_ratio-digits"]["value"] == 0 and found["protocol"]["held_out"]["num"] == 200
    assert found["subject"]["nearest"][0] == [0, 100, 0.0]
    assert Image.open(tmp_path / "scores.nearest.png").width > 100 and "picture: " in printed
    found, _ = evaluate(capsys, *argv, *more)  # against other images of the reference
    assert found["scores"]["nearest_ratio-digits"]["value"] == 0 and "held_out" not in found["protocol"]


def test_options_that_would_do_nothing_are_refused(tmp_path, fails):
    np.savez(tmp_path / "samples.npz", DIGITS[:100])
    argv = ["--samples", tmp_path / "samples.npz", "--reference", "digits", "--extractor", "digits"]
    argv += ["--features", tmp_path / "features"]
    command = load_command("eval/fid.py").main
    assert "--held-out is for --metrics copies" in fails(command, [*argv, "--held-out", "digits"])
    assert "--background is for image files" in fails(command, [*argv, "--background", "white"])


def test_cmmd_is_for_clip(tmp_path, capsys, fails):
    if "clip-tiny" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("clip-tiny", Pixels)
    np.savez(tmp_path / "samples.npz", DIGITS[:200])
    argv = ["--samples", tmp_path / "samples.npz", "--reference", "digits", "--features", tmp_path / "features"]
    found, _ = evaluate(capsys, *argv, "--metrics", "cmmd", "--extractor", "clip-tiny")
    assert found["scores"]["CMMD-clip-tiny"]["value"] > 0
    printed = fails(load_command("eval/fid.py").main, [*argv, "--metrics", "cmmd", "--extractor", "digits"])
    assert "it is defined for an extractor clip-..., not digits" in printed


def write_transparent(folder: Path, number: int, start: int = 0) -> None:
    """Writes 40 digits as red with transparency, the first `number`; all others are opaque."""
    folder.mkdir()
    for i, digit in enumerate(DIGITS[start : start + 40, ..., 0]):
        alpha = digit if i < number else np.full_like(digit, 255)
        red = np.stack([np.full_like(digit, 255), digit, digit, alpha], axis=-1)
        Image.fromarray(red, "RGBA").save(folder / f"{i:02d}.png")


def test_one_transparent_grey_value_of_16_bits(tmp_path):
    levels = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "grey.png", transparency=5000)
    plain, white = (read_image(tmp_path / "grey.png", None, background=b) for b in (None, (255, 255, 255)))
    expected = plain.clone()
    expected[:, 0, 5] = 255
    assert has_transparency(tmp_path / "grey.png") and torch.equal(white, expected) and plain[0, 0, 5] < 30


def test_transparent_images_are_composited_on_request_and_counted(tmp_path, capsys, fails):
    write_transparent(tmp_path / "images", 3)
    first, last = (tmp_path / "images" / name for name in ("00.png", "39.png"))
    assert has_transparency(first) and not has_transparency(last)
    plain, white, black = (read_image(first, None, background=b) for b in (None, (255, 255, 255), (0, 0, 0)))
    alpha = torch.from_numpy(DIGITS[0, ..., 0] / 255)
    assert (plain[0] == 255).all() and torch.allclose(black[0].double(), 255 * alpha, atol=1)
    assert (white[0] == 255).all() and torch.allclose(white[1].double(), 255 * (1 - alpha + alpha**2), atol=1)
    assert torch.equal(read_image(last, None, background=(9, 9, 9)), read_image(last, None))
    argv = ["--samples", tmp_path / "images", "--reference", "digits", "--extractor", "digits", "--metrics", "kid"]
    argv[:0] = ["--features", tmp_path / "features"]
    found, printed = evaluate(capsys, *argv)
    assert (
        found["subject"]["transparent"] == {"samples": 3}
        and "3 of the 40 images of" in printed
        and "--background" in printed
    )
    other, printed = evaluate(capsys, *argv, "--background", "white")
    assert other["protocol"]["samples"]["background"] == "#ffffff" and "--background" not in printed
    assert other["scores"] != found["scores"] and other["subject"]["transparent"] == {"samples": 3}
    argv[argv.index("--samples") + 1] = argv[argv.index("--reference") + 1] = tmp_path / "images"
    write_transparent(tmp_path / "others", 2, start=40)
    found, printed = evaluate(capsys, *argv, "copies", "--held-out", tmp_path / "others")  # counted wherever they are
    assert found["subject"]["transparent"] == {"samples": 3, "reference": 3, "held_out": 2}
    assert "'mauvish' is no colour" in fails(load_command("eval/fid.py").main, [*argv, "--background", "mauvish"])
