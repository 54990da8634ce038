"""Features extracted by several processes together, and read again whole, in part or as a Gaussian."""

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.features import SHARD, FeatureShards
from sit_atconv.evaluation.image_sets import digest_of
from sit_atconv.evaluation.statistics import Gaussian, Moments
from sit_atconv.processes import raise_together


class Extraction:
    """The features of a set of images, extracted by all processes together and read by the main one.

    Args:
        shards: where they are kept.
        state: of the processes; each takes every n-th shard.

    Raises:
        OSError: on all processes, what any of them met.
    """

    def __init__(self, shards: FeatureShards, state: PartialState):
        self.shards, self.num = shards, len(shards.images)
        if state.is_main_process:
            self.shards.clear_partial()
        mine = range(len(self.shards))[state.process_index :: state.num_processes]
        made, faults = [], []
        with tqdm(total=sum(min(SHARD, self.num - number * SHARD) for number in mine), unit="image",
                  desc=shards.images.name[-40:], disable=not state.is_main_process) as progress:
            for number in mine:
                try:
                    made.append((number, self.shards.make(number, progress)))
                except (ValueError, OSError) as error:
                    faults.append(str(error))
                    break
        raise_together(faults)
        self.contents = [content for _, content in sorted(gather_object(made))]
        self.content = digest_of(*self.contents)

    def load(self, output: str) -> Tensor:
        """All of them, (N, D)."""
        return self.shards.load(output, self.contents)

    def load_spread(self, output: str, most: int) -> Tensor:
        """`most` of them, from all over the set, or all."""
        chosen = np.linspace(0, self.num - 1, min(most, self.num)).astype(int)
        parts = []
        for number, content in enumerate(self.contents):
            here = chosen[(chosen >= number * SHARD) & (chosen < (number + 1) * SHARD)] - number * SHARD
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
