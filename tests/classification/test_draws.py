"""Draws of a classifier's training: order, augmentation, mixing, stochastic depth, learning rate."""

from collections import Counter

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from timm.scheduler import create_scheduler_v2

from sit_atconv.classification.config import DataConfig, Schedule
from sit_atconv.classification.drop_path import DropPaths
from sit_atconv.classification.image_sets import open_images
from sit_atconv.classification.loading import AugmentedReader, RepeatedOrder
from sit_atconv.classification.mixing import Mixing

MIXED = dict(mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5, smoothing=0.1)


def test_an_image_is_drawn_three_times_in_different_groups():
    order = RepeatedOrder(100, 24, repeats=3, group_size=8, seed=0)
    epoch = [order.batch(step) for step in range(order.steps_per_epoch)]
    assert order.steps_per_epoch == 4
    assert {*Counter(index for batch in epoch for index in batch).values()} == {3}
    assert epoch != [order.batch(step) for step in range(4, 8)]
    for batch in epoch:
        assert all(len({*group.tolist()}) == 8 for group in np.array(batch).reshape(3, 8))


def test_processes_and_micro_batches_share_out_the_same_draws():
    def draws(num_processes, accumulation, step=5):
        parts = []
        for rank in range(num_processes):
            split = dict(num_processes=num_processes, accumulation=accumulation, rank=rank)
            order = RepeatedOrder(100, 24, repeats=3, group_size=4, seed=1, **split).starting_at(step)
            parts += [item for _, micro_batch in zip(range(accumulation), order, strict=False) for item in micro_batch]
        return sorted(parts)

    assert draws(1, 1) == draws(2, 3) == draws(3, 1)


def test_augmentation_is_a_function_of_seed_step_and_position():
    data = DataConfig(channels=3, image_size=32, randaugment="rand-m9-mstd0.5-inc1", erasing=0.5)
    transform = data.training_transform({"mean": [0.5] * 3, "std": [0.5] * 3})
    reader = AugmentedReader(open_images(None, "train", 3), transform, seed=3)
    draws = [(7, position, 4) for position in range(6)]
    whole, alone = reader[draws].x, reader[draws[4:5]].x
    assert torch.equal(whole[4], alone[0]) and len({image.sum().item() for image in whole}) == 6
    assert not torch.equal(alone, reader[[(8, 4, 4)]].x)


def test_mixing_pairs_images_within_groups_whatever_the_micro_batch():
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16)
    mixing = Mixing(16, **MIXED, group_size=4, seed=0)
    whole, targets = mixing(x.clone(), y, step=2, first=0)
    half, of_half = mixing(x[8:].clone(), y[8:], step=2, first=8)
    assert torch.equal(whole[8:], half) and torch.equal(targets[8:], of_half)
    assert relative_total(targets) < 1e-6 and not torch.equal(whole, mixing(x.clone(), y, step=3, first=0)[0])
    for row, target in enumerate(targets):
        partner = row // 4 * 4 + 3 - row % 4
        assert {*torch.nonzero(target > 0.1 / 16 + 1e-4).flatten().tolist()} <= {row, partner}


def relative_total(targets):
    return (targets.sum(1) - 1).abs().max()


def test_without_mixing_only_labels_are_smoothed():
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 1])
    mixing = Mixing(2, **{**MIXED, "mixup": 0.0, "cutmix": 0.0}, group_size=3, seed=0)
    same, targets = mixing(x, y, step=0, first=0)
    assert same is x and torch.allclose(targets, torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.05, 0.95]]))
    with pytest.raises(ValueError, match=r"train\.norm_batch 3 is odd"):
        Mixing(2, **MIXED, group_size=3, seed=0)


def test_dropped_paths_are_those_of_the_whole_batch_at_the_published_rate():
    def factors(micro_batch, rows):
        net = torch.nn.Sequential(DropPath(0.25), DropPath(0.0), DropPath(0.5), torch.nn.Linear(1, 1)).train()
        paths = DropPaths(net, 1000, micro_batch, seed=0)
        paths.draw(3, rows)
        assert len(paths.layers) == 2
        return torch.stack([layer(torch.ones(micro_batch, 2, 2))[:, 0, 0] for layer in paths.layers])

    whole, part = factors(1000, slice(0, 1000)), factors(300, slice(500, 800))
    assert torch.equal(whole[:, 500:800], part)
    assert {*whole[0].unique().tolist()} == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.allclose((whole == 0).float().mean(1), torch.tensor([0.25, 0.5]), atol=0.05)


def test_the_learning_rate_is_that_of_timms_scheduler():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=4e-3)
    theirs, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=30, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=7,
    )  # fmt: skip
    ours = Schedule(steps=210, warmup_steps=35, lr=4e-3, warmup_lr=1e-6, min_lr=1e-5)
    for step in range(210):
        theirs.step_update(step)
        assert ours.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
