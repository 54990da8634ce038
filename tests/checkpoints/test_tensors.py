"""Options inferred from tensors."""

import pytest
import torch

from sit_atconv.checkpoints.tensors import mixer_kinds, shown_options
from sit_atconv.models.mixers import MIXERS, Mixer
from tests.models.test_sit import randomised


@pytest.mark.parametrize(
    "options, spoken",
    [
        ({"mixer": "hybrid", "kernel_size": 5}, ["attention", "5x5 ATConv"]),
        ({"mixer": ["atconv", "attention"], "qk_norm": True}, ["3x3 ATConv", "attention with qk_norm"]),
    ],
)
def test_tensors_show_the_mixers(options, spoken):
    tensors = randomised(**options).state_dict()
    assert list(map(str, mixer_kinds(tensors).values())) == spoken
    assert options.items() <= shown_options(tensors).items()


@pytest.mark.parametrize("unknown", [{"mix.weight"}, {"qkv.weight", "proj.weight", "mix.weight"}])
def test_an_unknown_mixer_is_refused_until_it_is_registered(unknown, monkeypatch):
    tensors = randomised().state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.attn.")}
    tensors |= {f"blocks.1.attn.{name}": torch.zeros(48, 48) for name in unknown}
    with pytest.raises(ValueError, match=r"not known here \(blocks.1.attn.mix.weight\): give --import MODULE"):
        shown_options(tensors)
    mixer = Mixer(build=lambda dim, config: None, parameters=("mix.weight", "qkv.weight", "proj.weight"))
    monkeypatch.setitem(MIXERS._entries, "mixing", mixer)
    assert shown_options(tensors)["mixer"] == ["atconv", "mixing"]
    assert str(mixer_kinds(tensors)[1]) == "mixing"


def test_mixers_may_come_from_the_config():
    config = {"mixer": ["atconv", "attention"], "depth": 2}
    tensors = randomised(**config).state_dict()
    assert mixer_kinds(tensors, config) == mixer_kinds(tensors)
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.attn.")}
    with pytest.raises(ValueError, match=r"blocks.1.attn is missing"):
        shown_options(without)
