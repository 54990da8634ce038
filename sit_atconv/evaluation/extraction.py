"""Features extracted by several processes together, and read again whole, in part or as a Gaussian."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.features import FeatureShards
from sit_atconv.evaluation.gaussians import Gaussian, Moments
from sit_atconv.evaluation.image_sets import digest_of, evenly_spaced
from sit_atconv.runtime.processes import share, together


@dataclass(frozen=True)
class ExtractedFeatures:
    """The features of a set of images.

    Args:
        shards: where they are kept.
        contents: the digests of the images of each shard.
    """

    shards: FeatureShards
    contents: list[str]

    @property
    def content(self) -> str:
        """Digest of all images."""
        return digest_of(*self.contents)

    def load(self, output: str) -> Tensor:
        """All of them, (N, D)."""
        return self.shards.load(output, self.contents)

    def load_spread(self, output: str, most: int) -> Tensor:
        """`most` of them, from all over the set, or all."""
        chosen = torch.tensor(evenly_spaced(len(self.shards.images), most))
        parts = []
        for number, content in enumerate(self.contents):
            start, stop = self.shards.bounds(number)
            here = chosen[(chosen >= start) & (chosen < stop)] - start
            parts.append(self.shards.load(output, [content])[here])
        return torch.cat(parts)

    def gaussian(self, output: str) -> Gaussian:
        """Fitted to all of them, one shard in memory at a time."""
        moments = None
        for content in self.contents:
            features = self.shards.load(output, [content])
            moments = moments or Moments(features.double().mean(0))
            moments.add(features)
        return moments.gaussian()


def extract_together(shards: FeatureShards, state: PartialState) -> ExtractedFeatures:
    """Extracts what is missing; each process takes every n-th shard.

    Raises:
        OSError: on all processes, what any of them met; or they do not see each other's files.
    """
    mine, made = share(range(len(shards)), state), []
    num_images = sum(stop - start for start, stop in map(shards.bounds, mine))
    with together(), tqdm(total=num_images, unit="image", desc=Path(shards.images.name).name,
                          disable=not state.is_main_process) as progress:
        shards.make_ready()
        for number in mine:
            made.append((number, shards.make(number, progress)))
    contents = [content for _, content in sorted(gather_object(made))]
    with together():
        if state.is_main_process and not all(map(shards.has, contents)):
            raise OSError(f"{shards.folder} lacks what other processes wrote: give --features a folder that all of "
                          "them see")
    return ExtractedFeatures(shards, contents)
