"""BatchNorm in groups: each group by itself, running statistics once a step, timm's names."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from accelerate import Accelerator

from sit_atconv.classification.batch_norm import GroupNorms
from tests.conftest import relative_error

YES = torch.tensor(True)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def filled(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.train()


def test_groups_are_normalised_by_themselves_and_statistics_are_their_mean(accelerator):
    norm, x = filled(nn.Sequential(nn.BatchNorm2d(3))), torch.randn(12, 3, 5, 4)
    plain = [copy.deepcopy(norm) for _ in range(3)]
    wanted = torch.cat([each(part) for each, part in zip(plain, x.split(4), strict=True)])
    mean, var = (
        torch.stack([getattr(each[0], name) for each in plain]).mean(0) for name in ("running_mean", "running_var")
    )
    norms = GroupNorms(norm, num_groups=3, groups_of_step=3)
    assert torch.equal(norm(x), wanted)
    norms.settle(accelerator, YES)
    assert relative_error(norm[0].running_mean, mean) < 1e-6 and relative_error(norm[0].running_var, var) < 1e-6
    assert norm[0].num_batches_tracked == 1 and norm.state_dict().keys() == plain[0].state_dict().keys()


def test_micro_batches_equal_one_batch_and_a_withheld_step_leaves_no_trace(accelerator):
    whole, parts, x = filled(nn.BatchNorm2d(3)), filled(nn.BatchNorm2d(3)), torch.randn(2, 12, 3, 5, 4)
    of_whole, of_parts = GroupNorms(whole, 3, 3), GroupNorms(parts, 1, 3)
    for images in x:
        whole(images)
        for part in images.split(4):
            parts(part)
        of_whole.settle(accelerator, YES)
        of_parts.settle(accelerator, YES)
    before = copy.deepcopy(parts.state_dict())
    parts(x[0] * float("nan"))
    of_parts.settle(accelerator, ~YES)
    for name, tensor in parts.state_dict().items():
        assert torch.equal(tensor, before[name]) and torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize("name", ["attnet_xxs", "test_efficientnet"])
def test_models_keep_names_and_evaluation(name, accelerator):
    import sit_atconv.models.attnet  # noqa: F401  # registers it

    net = filled(timm.create_model(name, num_classes=4)).eval()
    x, names = torch.randn(2, 3, 64, 64), net.state_dict().keys()
    before = net(x)
    norms = GroupNorms(net, 2, 2)
    assert norms.norms and torch.equal(net(x), before) and net.state_dict().keys() == names
    net.train()(x)
    norms.settle(accelerator, YES)
    assert not torch.equal(net.eval()(x), before)
