"""The speed comparison of image classifiers: its checks, its results and the command."""

import json

import pytest
import torch

from sit_atconv.speed import classifiers
from sit_atconv.speed.classifiers import build, compare_classifiers, difference, table
from tests.conftest import load_command


@pytest.mark.parametrize("name", ["published:attnet_xxs", "fused:attnet_xxs", "published:attnet_xs"])
def test_forms_compute_what_the_model_computes(name):
    assert difference(name, 64) < 2e-5 and difference("attnet_xxs", 64) is None


def test_the_published_form_has_the_same_gradients():
    x, gradients = torch.randn(2, 3, 64, 64), []
    for name in ("attnet_xs", "published:attnet_xs"):
        model = build(name).eval()
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert ((a - b).norm() / a.norm()).item() < 1e-4


def test_a_form_of_other_values_is_not_timed(monkeypatch):
    monkeypatch.setattr(classifiers, "scaled", lambda x, layer_scale: 2 * x)
    with pytest.raises(ValueError, match="published:attnet_xxs does not compute what attnet_xxs does"):
        compare_classifiers(["attnet_xxs", "published:attnet_xxs"], resolution=64, rounds=1)


def test_a_form_for_inference_alone_is_not_trained():
    found = compare_classifiers(["fused:attnet_xxs"], resolution=32, batch_size=1, rounds=1, warmup=0, device="cpu")
    assert [t["quantity"] for t in found["timings"]] == ["inference"]


def test_results_are_complete(tmp_path, capsys):
    names = ["attnet_xxs", "fused:attnet_xxs", "resnet10t"]
    argv = [
        "--classifiers",
        *names,
        "--resolutions",
        "64",
        "--batch-size",
        "2",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    ]
    load_command("eval/speed.py").main([*argv, "--warmup", "0", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    timings = found["timings"]
    assert [(t["classifier"], t["quantity"]) for t in timings] == [
        *((name, "inference") for name in names),
        ("attnet_xxs", "training step"),
        ("resnet10t", "training step"),
    ]
    assert timings[0]["parameters"] == 2_853_556 != timings[1]["parameters"]
    assert timings[0]["speedup"]["rounds"] == [1, 1] and all(t["images_per_second"]["median"] > 0 for t in timings)
    assert json.loads((tmp_path / "classifiers.json").read_text()) == found
    assert (tmp_path / "classifiers.md").read_text() == table(found) + "\n"
    assert table(found).count("| resnet10t |") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["attnet_t9"], "timm has no model 'attnet_t9'"),
        (["fused:resnet10t"], "the forms are fused:attnet_... and published:attnet_..., not 'fused:resnet10t'"),
        (["attnet_xxs", "--resolutions", "64", "96"], "takes one of --resolutions"),
        (["attnet_xxs", "--resolutions", "256", "512"], "takes one of --resolutions"),  # the defaults of SiT
        (["attnet_xxs", "--levels", "op"], "the levels model and train, not op"),
        (["attnet_xxs", "--preset", "XL/2"], "--preset is not for --classifiers"),
    ],
)
def test_errors_name_the_value(fails, argv, message, tmp_path):
    main = load_command("eval/speed.py").main
    assert message in fails(main, ["--classifiers", *argv, "--out", tmp_path])
