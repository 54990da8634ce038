"""A mixer of a user's own, from a module outside of the package; the same goes through the commands in other tests."""

import importlib
import json
import sys

import pytest
import torch

from sit_atconv.models import SiT
from sit_atconv.models.costs import DEFAULTS, mixer_multiply_adds, multiply_adds
from sit_atconv.models.mixers import MIXERS, Mixer, mixer_names, recognise_mixer
from tests.models.test_sit import TINY, randomised

POOLING = """
import torch.nn as nn
import torch.nn.functional as F
from sit_atconv.models.mixers import MIXERS, Mixer

class Pooling(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, grid_size):
        image = x.transpose(1, 2).unflatten(2, grid_size)
        return self.proj(F.avg_pool2d(image, 3, stride=1, padding=1).flatten(2).transpose(1, 2))

POOLING = Mixer(build=lambda dim, config: Pooling(dim), parameters=("proj.weight",))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module, imported and forgotten again, with all that it registered."""
    (tmp_path / "my_mixers.py").write_text(POOLING + "MIXERS.register('pooling', POOLING)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS))
    yield importlib.import_module("my_mixers")
    sys.modules.pop("my_mixers", None)


@pytest.mark.parametrize("mixer", ["pooling", "my_mixers.POOLING", ["attention", "my_mixers.POOLING"]])
def test_a_users_mixer_is_built_counted_trained_and_saved(module, mixer, tmp_path):
    model = randomised(mixer=mixer)
    names = mixer_names(mixer, 2)
    assert isinstance(model.blocks[1].attn, module.Pooling)
    assert (model.pos_embed is None) == ("attention" not in names)
    x, t, y = torch.randn(2, 4, 8, 12), torch.rand(2), torch.tensor([0, 3])
    model(x, t, y).square().mean().backward()
    assert model.blocks[1].attn.proj.weight.grad.any()

    N, D = 24, 48
    expected = sum(N * D * D if name != "attention" else 4 * N * D * D + 2 * N * N * D for name in names)
    without = multiply_adds(model, (4, 6), lambda name: 0)
    assert multiply_adds(model, (4, 6)) - without == expected
    assert without == multiply_adds({**TINY, "mixer": "atconv"}, (4, 6), lambda name: 0)

    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["mixer"] == mixer
    assert torch.equal(SiT.from_pretrained(tmp_path / "saved")(x, t, y), model(x, t, y))


def test_a_mixer_that_is_not_known_is_named_with_the_remedy(module, tmp_path, monkeypatch):
    randomised(mixer="my_mixers.POOLING").save_pretrained(tmp_path / "path")
    randomised(mixer="pooling").save_pretrained(tmp_path / "name")
    monkeypatch.delitem(sys.modules, "my_mixers")
    monkeypatch.setattr(MIXERS, "_entries", {name: MIXERS[name] for name in ("atconv", "attention")})
    with pytest.raises(ValueError, match=r"mixer my_mixers.POOLING is not known here: give --import my_mixers"):
        SiT.from_pretrained(tmp_path / "path")
    with pytest.raises(
        ValueError, match=r"hybrid, sparse-hybrid, atconv, attention, .* not 'pooling' .give --import MODULE"
    ):
        SiT.from_pretrained(tmp_path / "name")
    monkeypatch.setitem(sys.modules, "my_mixers", module)
    with pytest.raises(ValueError, match=r"mixer my_mixers.Pooling is not a Mixer"):
        SiT(**TINY, mixer="my_mixers.Pooling")


@pytest.mark.parametrize(
    "name, options",
    [
        ("atconv", {}),
        ("atconv", {"kernel_size": 5}),
        ("atconv", {"kernels": "static", "kernel_size": 5}),
        ("atconv", {"kernel_inhibition": "none"}),
        ("attention", {}),
        ("attention", {"qk_norm": True}),
    ],
)
def test_entries_know_their_tensors(name, options):
    mixer, config = MIXERS[name], {**DEFAULTS, "num_heads": 4, **options}
    tensors = mixer.build(16, config).state_dict()
    assert recognise_mixer(tensors) == name
    assert options.items() <= mixer.shown(tensors).items() <= config.items()
    assert set(mixer.silent) <= set(DEFAULTS)
    assert recognise_mixer({**tensors, "gate": tensors["proj.bias"]}) is None
    del tensors[mixer.parameters[0]]
    assert recognise_mixer(tensors) is None


@pytest.mark.parametrize("name, options", [("atconv", {}), ("atconv", {"kernels": "static"}), ("attention", {})])
def test_torch_counts_what_our_entries_count(monkeypatch, name, options):
    config = {**DEFAULTS, "hidden_size": 32, "num_heads": 4, **options}
    expected = mixer_multiply_adds(name, config, (3, 5))
    monkeypatch.setitem(MIXERS._entries, name, Mixer(build=MIXERS[name].build))
    assert mixer_multiply_adds(name, config, (3, 5)) == expected


def test_a_mixer_that_needs_data_must_count_itself(monkeypatch):
    class Asking(torch.nn.Module):
        def forward(self, x, grid_size):
            return x * x.max().item()

    monkeypatch.setitem(MIXERS._entries, "asking", Mixer(build=lambda dim, config: Asking()))
    with pytest.raises(ValueError, match=r"mixer asking cannot be counted .*: give its entry `multiply_adds`"):
        multiply_adds({"mixer": "asking"}, (4, 4))
