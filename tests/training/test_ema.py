import pytest
import torch

from sit_atconv.models import SiT
from sit_atconv.training.ema import Averages


@pytest.fixture
def net():
    return SiT.from_preset("SiT-ATConv-Tiny/2-Hybrid", depth=2, hidden_size=32, num_classes=3)


def test_averages_follow_updates_and_keep_their_bits_if_one_is_withheld(net):
    averages = Averages(net, [0.9, 0.5])
    before = {name: p.clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 1
    averages.update(0, torch.tensor(False))
    for model in averages.models.values():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    averages.update(1, torch.tensor(True))
    for decay, model in averages.models.items():
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, before[name] + (1 - decay) * (name != "pos_embed"), msg=name)
    assert averages.first is averages.models[0.9]


def test_the_warmup_profile_starts_with_a_low_decay(net):
    averages = Averages(net, [0.9], profile="warmup")
    before = net.final_layer.linear.bias.clone()
    with torch.no_grad():
        net.final_layer.linear.bias += 1
    averages.update(0, torch.tensor(True))
    torch.testing.assert_close(averages.first.final_layer.linear.bias, before + 0.9)  # decay 1 / 10
