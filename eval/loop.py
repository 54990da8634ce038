"""What the training loop costs beside what it cannot do without: forward, backward, clipping, AdamW, averages.

    python eval/loop.py --steps 12 [--train.batch_size 32 --preset SiT-ATConv-XL/2 ... any option of train.py]

Trains for real, in a temporary folder, with a clock around each of these parts; waits for the device at each, so that
the shares are true on a GPU too. What remains is drawing noise, data, logging and the loop itself. Prints JSON.
"""

import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from sit_atconv.commands import ArgumentParser, at_least

TRAIN = Path(__file__).parents[1] / "sit_atconv" / "train.py"
WARMUP = 2  # steps that are not counted


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        usage="python eval/loop.py [--steps N] [options of sit_atconv/train.py]",
        description="How much of a training step is forward, backward, clipping, AdamW and averages, and how much the "
        "loop adds. All other options are those of sit_atconv/train.py.",
    )
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps to measure")
    options, of_training = parser.parse_known_args(argv)
    print(json.dumps(measure(options.steps, of_training), indent=1))


def measure(steps: int, options: list[str]) -> dict:
    """Seconds of the parts of a step, means over `steps`, and the share of what is none of them."""
    import torch

    from sit_atconv.flow import FlowMatching
    from sit_atconv.speed.timing import describe_environment, synchronize
    from sit_atconv.training.averages import Averages

    spec = importlib.util.spec_from_file_location("train", TRAIN)
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
    total = (ends[count - 1] - ends[WARMUP - 1]) / steps
    parts = {part: sum(s for step, s in calls if WARMUP <= step < count) / steps for part, calls in seconds.items()}
    return {
        "seconds_per_step": total,
        "parts": parts,
        "share_of_the_loop": 1 - sum(parts.values()) / total,
        "steps": steps,
        "environment": describe_environment(device),
    }


if __name__ == "__main__":
    main()
