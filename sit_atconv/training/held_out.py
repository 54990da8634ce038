"""Held-out loss: the flow loss on images that are never trained on, at fixed noise and times."""

import contextlib

import torch
from torch import Tensor

from sit_atconv.data.codecs import Codec
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.loading import BatchReader
from sit_atconv.data.pixels import to_float
from sit_atconv.flow import Objective
from sit_atconv.sampling import SampleStream


class HeldOut:
    """Loss of the model's velocity on held-out images, with fixed noise and times.

    All models and seeds with the same path and prediction get the same images, noise and times. Each process takes its
    share of the images.

    Args:
        images: indices of the held-out images, in random order.
        codec: from pixels to latents, on `device`.
        skip_unreadable: leave out images that cannot be read; `unreadable` names those of this process.

    Raises:
        ValueError, OSError: an image cannot be read.
    """

    def __init__(
        self,
        data: DataSource,
        images: list[int],
        codec: Codec,
        flow: Objective,
        *,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        num_processes: int = 1,
        skip_unreadable: bool = False,
    ):
        self.flow = flow
        self.batches: list[tuple[Tensor, ...]] = []
        self.unreadable: dict[str, str] = {}
        reader = BatchReader(data, skip_unreadable)
        t0, t1 = flow.interpolant.interval(flow.prediction)
        times = t0 + (t1 - t0) * (torch.arange(len(images), dtype=torch.float64) + 0.5) / max(1, len(images))
        mine = range(rank, len(images), num_processes)
        for start in range(0, len(mine), batch_size):
            positions = mine[start : start + batch_size]
            batch = reader[[(images[i], False) for i in positions]]
            inputs, readable = batch.inputs.to(device), batch.readable
            stored = inputs if data.is_encoded else codec.encode(to_float(inputs))
            size = codec.latent_size(data.image_size)
            stream = SampleStream(0, [images[i] for i in positions])
            posterior, noise = (stream.randn((codec.channels, size, size)) for _ in range(2))
            latents = codec.latents(stored, noise=posterior.to(device)).cpu()
            t = times[list(positions)].float()
            self.batches.append(tuple(tensor[readable] for tensor in (latents, noise, t, batch.y)))
            self.unreadable |= batch.unreadable

    @torch.no_grad()
    def loss(self, model, autocast=contextlib.nullcontext) -> Tensor:
        """Returns the sum of the squared errors over this process's images, and their number, (2,)."""
        device = next(model.parameters()).device
        path, total = self.flow.interpolant, torch.zeros((), device=device)
        velocity = self.flow.velocity(model)
        for batch in self.batches:
            latents, noise, t, y = (tensor.to(device, non_blocking=True) for tensor in batch)
            with autocast():
                v = velocity(path.interpolate(latents, noise, t), t, y).float()
            total += (v - path.velocity(latents, noise, t)).square().flatten(1).mean(1).sum()
        return torch.stack([total, total.new_tensor(sum(len(batch[0]) for batch in self.batches))])
