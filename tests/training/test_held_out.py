import shutil

import pytest
import torch

from sit_atconv.data.codecs import IdentityCodec, VAECodec
from sit_atconv.data.digits import Digits
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.order import hold_out
from sit_atconv.flow import FlowMatching
from sit_atconv.training.held_out import HeldOut

CPU = torch.device("cpu")


class Seer(torch.nn.Module):
    """A model that predicts grey data."""

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


def mean(parts):
    total, count = sum(parts).tolist()
    return total / count


def test_the_loss_does_not_depend_on_batches_and_processes():
    model = Seer(FlowMatching())
    whole = held_out().loss(model)
    assert whole[1] == 40 and mean([held_out(batch_size=40).loss(model)]) == pytest.approx(mean([whole]), rel=1e-5)
    parts = [held_out(rank=rank, num_processes=3).loss(model) for rank in range(3)]
    assert mean(parts) == pytest.approx(mean([whole]), rel=1e-5)


def test_the_loss_is_that_of_the_velocity_for_every_prediction():
    losses = [
        mean([held_out(flow).loss(Seer(flow))])
        for flow in (FlowMatching(), FlowMatching(prediction="noise"), FlowMatching(prediction="data"))
    ]
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


def test_held_out_images_of_cached_latents(latents, vae):
    data = CachedLatents(latents)
    part = HeldOut(data, hold_out(len(data), 9).tolist(), VAECodec(str(vae)), FlowMatching(), batch_size=4, device=CPU)
    assert [len(batch[0]) for batch in part.batches] == [4, 4, 1] and part.batches[0][0].shape[1:] == (4, 16, 16)
    assert part.loss(Seer(FlowMatching())).isfinite().all()


def test_an_unreadable_image_is_left_out_and_the_others_keep_noise_and_times(digit_folder, tmp_path):
    images = [3, 50, 7, 11]
    options = dict(batch_size=3, device=CPU)
    whole = HeldOut(ImageFolder(digit_folder, 16), images, IdentityCodec(3), FlowMatching(), **options)
    folder = shutil.copytree(digit_folder, tmp_path / "images")
    data = ImageFolder(folder, 16)
    (folder / data.name(50)).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{data.name(50)}.*--data.skip_unreadable true"):
        HeldOut(data, images, IdentityCodec(3), FlowMatching(), **options)
    part = HeldOut(data, images, IdentityCodec(3), FlowMatching(), skip_unreadable=True, **options)
    assert list(part.unreadable) == [data.name(50)] and "cannot be read" in part.unreadable[data.name(50)]
    left = [torch.cat(parts)[[0, 2, 3]] for parts in zip(*whole.batches, strict=True)]
    assert all(
        torch.equal(torch.cat(parts), other) for parts, other in zip(zip(*part.batches, strict=True), left, strict=True)
    )
    assert part.loss(Seer(FlowMatching()))[1] == 3
