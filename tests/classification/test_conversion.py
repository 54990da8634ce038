"""The converting command with AttNet's official files."""

import argparse

import pytest
import timm
import torch

from sit_atconv.models.attnet import official_state_dict
from tests.conftest import load_command


@pytest.fixture
def official(tmp_path):
    """An official training file of AttNet-XXS with three classes, and its model."""
    torch.manual_seed(0)
    model = timm.create_model("attnet_xxs", num_classes=3).eval()
    average = {name: torch.zeros_like(tensor) for name, tensor in official_state_dict(model).items()}
    content = {"model": official_state_dict(model), "model_ema": average, "args": argparse.Namespace(lr=4e-3)}
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", model


def test_an_official_file_is_converted_and_back(official, tmp_path, capsys):
    file, model = official
    main = load_command("sit_atconv/convert.py").main
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    main([str(file), str(tmp_path / "ours"), "--model", "attnet_xxs", "--class-names", str(tmp_path / "names.txt")])
    assert "attnet_xxs, trained weights of" in capsys.readouterr().out
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and again.pretrained_cfg["label_names"] == ["cat", "dog", "cow"]

    main([str(tmp_path / "ours"), str(tmp_path / "back.pth"), "--to", "attnet"])
    back, weights = torch.load(tmp_path / "back.pth")["model"], official_state_dict(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)
    assert f"{tmp_path}/back --model attnet_xxs" in capsys.readouterr().out


def test_errors_name_value_and_remedy(official, fails, tmp_path):
    file, _ = official
    torch.save({"model": {"x_embedder.proj.weight": torch.zeros(3)}}, tmp_path / "sit.pt")
    timm.models.save_for_hf(timm.create_model("resnet10t"), str(tmp_path / "other"), safe_serialization=True)
    main, out = load_command("sit_atconv/convert.py").main, tmp_path / "out"
    for argv, message in [
        ([file, out, "--model", "attnet_t9"], "give --model as one of attnet_xxs"),
        ([file, out, "--model", "attnet_xs"], "does not fit attnet_xs"),
        ([tmp_path / "sit.pt", out, "--model", "attnet_xxs"], "holds no weights of AttNet"),
        ([file, out, "--model", "attnet_xxs", "--vae", "x"], "--vae is not for AttNet"),
        ([file, tmp_path / "out.pt", "--model", "attnet_xxs", "--to", "sit"], "--to sit is for SiT"),
        ([tmp_path / "other", tmp_path / "out.pth", "--to", "attnet"], "--to attnet is for AttNet"),
        ([tmp_path / "other", out, "--to", "attnet"], "give an OUT that ends in .pth or .pt"),
    ]:
        assert message in fails(main, argv), argv
    assert not out.exists()
