import os
import subprocess
import sys

import pytest
import torch

from sit_atconv.runtime.devices import open_device, share_cores
from tests.conftest import python


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators have no such knob")
def test_large_blocks_are_used_again():
    """Page faults of the second ten allocations of 64 MiB, after the first ten."""
    code = """
import resource, sys, torch
from sit_atconv.runtime.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def allocate():
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-allocate() + allocate())
"""
    faults = {
        how: int(subprocess.run(python("-c", code, how), capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    assert faults["keep"] < 100 and faults["keep"] < faults["return"]


def test_unknown_device_is_named():
    with pytest.raises(ValueError, match=r"device 'abacus' is not available.*give cpu"):
        open_device("abacus")


def test_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert open_device("auto") == torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process to some CPUs")
def test_a_process_takes_its_share_of_the_cpus_it_may_use(monkeypatch):
    """Slurm and taskset give a process fewer CPUs than the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6, 7})
    threads = torch.get_num_threads()
    try:
        for processes, share in ((1, 4), (2, 2), (8, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            share_cores()
            assert torch.get_num_threads() == share
    finally:
        torch.set_num_threads(threads)
