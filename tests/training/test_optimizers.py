"""Parameter groups of the optimizer."""

import pytest
import torch

from sit_atconv.models import SiT
from sit_atconv.training.optimizers import parameter_groups


@pytest.fixture
def net():
    return SiT.from_preset("SiT-ATConv-Tiny/2-Hybrid", depth=2, hidden_size=32, num_classes=3)


def test_norms_biases_embeddings_and_difference_control_do_not_decay(net):
    net.blocks[0].norm1 = torch.nn.LayerNorm(32)
    decayed, others = parameter_groups([net], 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {p: name for name, p in net.named_parameters()}
    kept = {names[p] for p in others["params"]}
    assert all(names[p].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    for part in ("bias", "difference_control", "embedding_table.weight", "norm1.weight"):
        assert any(part in name for name in kept) and not any(part in names[p] for p in decayed["params"])
    assert {names[p] for p in decayed["params"]} | kept == {n for n, p in net.named_parameters() if p.requires_grad}
    assert "pos_embed" not in kept and net.pos_embed is not None
