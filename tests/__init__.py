"""What must happen before a library is imported: CPUs of each pytest worker, and Ctrl-C."""

import os
import signal
import sys

if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":  # a share of the CPUs, which its processes inherit
    cpus = sorted(os.sched_getaffinity(0))
    worker, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cpus[worker % len(cpus) :: count])
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts programs in the background without Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
