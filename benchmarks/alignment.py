"""Benchmark of alignment's cost: whole training steps with and without it, interleaved, as ratios.

    python benchmarks/alignment.py --encoder digits --config digits
    python benchmarks/alignment.py --encoder dinov2-vit-s --config imagenet256 --data.images DIR --train.batch_size 8

The other options are those of training. Prints a Markdown table: seconds of a step without
alignment, and how many times as long a step takes with it (median and quartiles of rounds).
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn

from sit_atconv.runtime.commands import ArgumentParser, run_command, user_errors
from sit_atconv.runtime.devices import synchronize
from sit_atconv.runtime.environment import describe_environment
from sit_atconv.speed.timing import Rounds, time_interleaved
from sit_atconv.training.config import parse
from sit_atconv.training.ema import Averages
from sit_atconv.training.estimate import trial_pass
from sit_atconv.training.optimizers import make_optimizer
from sit_atconv.training.preflight import build_auxiliary, new_net, prepared_device

VARIANTS = {  # options, in which ENCODER is that of --encoder
    "encoder, MLP": ["--auxiliary.encoder", "ENCODER"],
    "encoder, convolution": ["--auxiliary.encoder", "ENCODER", "--auxiliary.projector", "conv"],
    "latents, MLP": ["--auxiliary.target", "vae"],
    "self, MLP": ["--auxiliary.target", "self"],
    "dispersive": ["--auxiliary.coefficient", "0", "--auxiliary.dispersive", "0.5"],
}
ROUNDS = 15


def step_of(argv: list[str]) -> Callable[[], None]:
    """Returns a function that runs one training step with these options."""
    config = parse(argv)
    data, codec = config.data.open()
    device, net = prepared_device(config), new_net(config, data, codec)
    build_auxiliary(config, net, data)
    net.to(device)
    modules: list[nn.Module] = [net] if config.auxiliary is None else [net, config.auxiliary.to(device)]
    averages = Averages(net, config.train.ema_decays, auxiliary=config.auxiliary)
    optimizer = make_optimizer(config.optimizer[0], modules, 1e-4, 0.0, config.optimizer[1])
    updated = torch.ones((), dtype=torch.bool, device=device)

    def step() -> None:
        trial_pass(net, config, config.train.batch_size, device)
        optimizer.step()
        averages.update(0, updated)
        optimizer.zero_grad()

    return step


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Times training steps with and without alignment.")
    parser.add_argument("--encoder", default="digits", help="image encoder of the variants that have one")
    options, training = parser.parse_known_args(argv)
    with user_errors():
        device = prepared_device(parse(training))
        steps = {"none": step_of(training)}
        for name, words in VARIANTS.items():
            chosen = [options.encoder if word == "ENCODER" else word for word in words]
            steps[name] = step_of([*training, "--auxiliary", "Alignment", *chosen])
        seconds = time_interleaved(
            steps,
            rounds=ROUNDS,
            warmup=2,
            synchronize=partial(synchronize, device),
            clock=time.perf_counter,
        )
    rounds = {name: Rounds.of(values) for name, values in seconds.items()}
    print("| alignment | time of a step |\n|---|---:|")
    for name, times in rounds.items():
        ratio = times.over(rounds["none"])
        text = f"{times.median:.3g} s" if name == "none" else f"{ratio.median:.2f} ({ratio.q1:.2f}-{ratio.q3:.2f})"
        print(f"| {name} | {text} |")
    print(f"\n{describe_environment(device)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
