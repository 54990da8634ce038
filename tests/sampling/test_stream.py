import numpy as np
import pytest
import torch

from sit_atconv.sampling import SampleStream


def test_a_sample_does_not_depend_on_its_batch():
    together = SampleStream(3, range(20))
    noise, more = together.randn((2, 4, 4)), together.randn((2, 4, 4))
    labels = together.labels(10)
    for batch in ([7], [19, 7, 0], list(range(5, 12))):
        stream = SampleStream(3, batch)
        assert torch.equal(stream.randn((2, 4, 4)), noise[batch])
        assert torch.equal(stream.randn_like(noise[batch]), more[batch])
        assert torch.equal(stream.labels(10), labels[batch])


def test_neighbours_share_nothing():
    """Checks that (seed, i) differs from (i, seed), and that no noise is drawn twice."""
    a, b = SampleStream(0, [1]), SampleStream(1, [0])
    first = a.randn((64,))
    assert not torch.equal(first, b.randn((64,))) and not torch.equal(first, a.randn((64,)))
    draws = torch.cat([SampleStream(seed, range(200)).randn((4,)) for seed in range(5)])
    assert len(np.unique(draws.numpy(), axis=0)) == 1000


def test_seeds_beyond_32_bits_differ():
    assert not torch.equal(SampleStream(1, [0]).randn((8,)), SampleStream(1 + 2**32, [0]).randn((8,)))


def test_noise_is_standard_normal():
    noise = SampleStream(0, range(1000)).randn((100,))
    assert noise.dtype == torch.float32 and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_random_labels_are_uniform():
    counts = SampleStream(0, range(5000)).labels(10).bincount(minlength=10)
    assert counts.min() > 400 and counts.max() < 600


@pytest.mark.parametrize("num", [7, 30, 101])
def test_every_prefix_of_balanced_labels_is_balanced(num):
    labels = SampleStream(2, range(num)).labels(10, "balanced")
    assert labels.bincount(minlength=10).max() - labels.bincount(minlength=10).min() <= 1
    assert not torch.equal(labels[:10], labels[10:20]) or num < 20
    assert torch.equal(SampleStream(2, [6]).labels(10, "balanced"), labels[6:7])


def test_errors():
    with pytest.raises(ValueError, match="-1"):
        SampleStream(-1, [0])
    with pytest.raises(ValueError, match="'sorted'"):
        SampleStream(0, [0]).labels(10, "sorted")
