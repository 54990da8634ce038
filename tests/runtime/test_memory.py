"""Peak memory of a computation."""

import torch

from sit_atconv.runtime.memory import peak_bytes


def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        for _ in range(3):
            held = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)
            del held
        return torch.empty(2**18, dtype=torch.uint8)

    assert peak_bytes(run, torch.device("cpu")) == 2**20 + 2**19
