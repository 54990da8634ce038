import pytest
import torch

from sit_atconv.data.codecs import IdentityCodec, VAECodec
from sit_atconv.data.images import Digits
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.order import hold_out
from sit_atconv.flow import FlowMatching
from sit_atconv.training.held_out import HeldOut

CPU = torch.device("cpu")


class Seer(torch.nn.Module):
    """Answers as if all data were grey."""

    def __init__(self, flow):
        super().__init__()
        self.weight, self.flow = torch.nn.Parameter(torch.zeros(1)), flow

    def forward(self, x, t, y):
        path, grey = self.flow.interpolant, torch.zeros_like(x)
        if self.flow.prediction == "data":
            return grey
        v = path.velocity_from_data(grey, x, t)
        return v if self.flow.prediction == "velocity" else path.noise_from_velocity(v, x, t)


def held_out(flow=FlowMatching(), **options):  # noqa: B008
    data = Digits()
    options = dict(batch_size=7, device=CPU) | options
    return HeldOut(data, hold_out(len(data), 40).tolist(), IdentityCodec(1), flow, **options)


def test_batches_and_processes_do_not_matter():
    model = Seer(FlowMatching())
    whole = held_out().loss(model)
    assert held_out(batch_size=40).loss(model) == pytest.approx(whole.item(), rel=1e-5)
    parts = [held_out(rank=rank, num_processes=3).loss(model) for rank in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_it_is_the_velocitys_error_whatever_is_predicted():
    losses = [held_out(flow).loss(Seer(flow)).item()
              for flow in (FlowMatching(), FlowMatching(prediction="noise"), FlowMatching(prediction="data"))]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)  # on the same interval
    assert losses[0] > 0.3


def test_images_noise_and_times_are_fixed_and_times_cover_the_interval():
    torch.manual_seed(1)
    one = held_out()
    torch.manual_seed(2)
    two = held_out()
    for a, b in zip(one.batches, two.batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    latents, noise, t, y = (torch.cat(parts) for parts in zip(*one.batches, strict=True))
    assert torch.allclose(t, (torch.arange(40) + 0.5) / 40) and abs(noise.mean()) < 0.1
    digits = Digits()
    for image, label, index in zip(latents, y, hold_out(len(digits), 40), strict=True):
        pixels, digit = digits[index, False]
        assert label == digit and torch.allclose(image, pixels / 127.5 - 1)


def test_cached_latents_too(latents, vae):
    data = CachedLatents(latents)
    part = HeldOut(data, hold_out(len(data), 9).tolist(), VAECodec(str(vae)), FlowMatching(), batch_size=4, device=CPU)
    assert [len(batch[0]) for batch in part.batches] == [4, 4, 1] and part.batches[0][0].shape[1:] == (4, 16, 16)
    assert part.loss(Seer(FlowMatching())).isfinite()
