import subprocess
import sys

import pytest

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
