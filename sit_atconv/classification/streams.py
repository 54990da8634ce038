"""Independent streams of random numbers, functions of the run's seed and of the place in the run."""

import numpy as np

# Keys of the streams; the order of the images has none (see data/order.py).
AUGMENTATION, MIXING, DROP_PATH, MODEL = 2, 3, 4, 5


def stream_seed(stream: int, *place: int) -> int:
    """Returns the 32-bit seed of a stream at a place, such as (seed, step, position)."""
    return int(np.random.SeedSequence(place, spawn_key=(stream,)).generate_state(1)[0])
