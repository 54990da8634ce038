"""Gives each of several pytest workers CPUs of its own, before a library counts them; its processes inherit them."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":
    cpus = sorted(os.sched_getaffinity(0))
    worker, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cpus[worker % len(cpus) :: count])
