"""What the training loop costs beside what it cannot do without: forward, backward, clipping, AdamW, averages."""

import contextlib
import importlib.util
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from sit_atconv.flow import FlowMatching
from sit_atconv.speed.timing import describe_environment, synchronize
from sit_atconv.training.averages import Averages

WARMUP = 2  # steps that are not counted


def measure_loop(train_command: Path, steps: int, options: list[str]) -> dict:
    """Seconds of the parts of a step, means over `steps`, and the share of what is none of them.

    Args:
        train_command: the file sit_atconv/train.py.
        steps: how many to measure, after WARMUP others.
        options: of that command.
    """
    spec = importlib.util.spec_from_file_location("train", train_command)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    seconds, ends = defaultdict(list), []

    def clocked(owner: object, name: str, part: str) -> None:
        function = getattr(owner, name)

        def run(*args, **kwargs):
            synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            seconds[part].append((len(ends), time.perf_counter() - start))
            return result

        setattr(owner, name, run)

    for owner, name, part in [
        (FlowMatching, "loss", "forward"), (train.Accelerator, "backward", "backward"),
        (train, "get_total_norm", "clipping"), (train, "clip_grads_with_norm_", "clipping"),
        (torch.optim.AdamW, "step", "AdamW"), (Averages, "update", "averages"),
    ]:
        clocked(owner, name, part)
    look = train.FiniteWatch.look

    def end_of_step(*args, **kwargs):
        ends.append(time.perf_counter())
        return look(*args, **kwargs)

    train.FiniteWatch.look = end_of_step
    count = WARMUP + steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.main([*options, "--train.steps", str(count + 1), "--out", folder, "--train.checkpoint_every",
                    "1000000", "--preview.num_steps", "1", "--preview.num_classes", "1", "--preview.per_class", "1"])
    if len(ends) < count:
        raise KeyboardInterrupt  # training noted a Ctrl-C and left after its step
    total = (ends[count - 1] - ends[WARMUP - 1]) / steps
    parts = {part: sum(s for step, s in calls if WARMUP <= step < count) / steps for part, calls in seconds.items()}
    return {
        "seconds_per_step": total,
        "parts": parts,
        "share_of_the_loop": 1 - sum(parts.values()) / total,
        "steps": steps,
        "environment": describe_environment(device),
    }
