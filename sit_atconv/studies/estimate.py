"""Estimate of a sweep's time from one measured step of each kind of run."""

import importlib
import json
import time
from collections.abc import Callable, Sequence

import torch

from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.evaluation.extractors import open_extractor
from sit_atconv.runtime.devices import on_cpu, open_device, synchronize
from sit_atconv.runtime.installation import COMMANDS
from sit_atconv.sampling.solvers import SOLVERS
from sit_atconv.studies.execution import Task, in_words
from sit_atconv.studies.plan import Leaf, Run
from sit_atconv.training.config import parse
from sit_atconv.training.preflight import measure_step

START = 3.0  # seconds until a command has read its options, weights and data; a guess
ADAPTIVE_NFE = 100  # of solvers that choose their steps; a guess


def estimate(runs: Sequence[Run], tasks: Sequence[Task], jobs: int) -> str:
    """Returns a table of the time that the tasks would take, measured on this machine one by one."""
    missing = {task.name for task in tasks}
    lines = ["| runs | seconds a step | training | sampling and evaluation |", "|---|---:|---:|---:|"]
    total, measured = 0.0, dict[str, tuple[float, float, float]]()
    rows: dict[str, list[float]] = {}
    for run in runs:
        leaves = [leaf for leaf in run.leaves if leaf.name in missing]
        is_trained = f"{run.name}.training" in missing
        if not leaves and not is_trained:
            continue
        label = run.sweep.label(run.settings)
        if label not in measured:
            measured[label] = _measure(run)
        step, steps, forward = measured[label]
        training = step * steps + START if is_trained else 0.0
        sampling = sum(_seconds_of(leaf, forward) for leaf in leaves)
        row = rows.setdefault(label, [0, 0.0, 0.0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + training, row[2] + sampling
        total += training + sampling
    for label, (count, training, sampling) in rows.items():
        step = measured[label][0]
        lines.append(f"| {count:.0f} x {label} | {step:.3g} | {in_words(training)} | {in_words(sampling)} |")
    at_once = f", at best {in_words(total / jobs)} with {jobs} jobs" if jobs > 1 else ""
    return "\n".join([*lines, "", f"in all {in_words(total)} for one job{at_once}; {len(tasks)} tasks"])


def _measure(run: Run) -> tuple[float, float, float]:
    """Returns seconds of a training step, number of steps, and seconds of one forward of one image."""
    device = open_device("cpu" if on_cpu() else "auto")
    if run.is_trained:
        config = parse(run.argv)
        (step, net), steps = measure_step(config), config.train.steps
    else:
        step, steps, net = 0.0, 0, load_weights(str(run.sweep.ckpt)).model.to(device)
    num = 64
    x = torch.randn(num, net.config.in_channels, net.config.input_size, net.config.input_size, device=device)
    t, y = torch.full((num,), 0.5, device=device), torch.zeros(num, dtype=torch.long, device=device)
    with torch.inference_mode():
        return step, steps, _timed(lambda: net(x, t, y)) / num


def _seconds_of(leaf: Leaf, forward: float) -> float:
    """Returns the time to draw and evaluate the samples of a leaf."""
    drawn = importlib.import_module(COMMANDS["generate"][1]).make_parser().parse_args(leaf.generate_argv)
    scored = importlib.import_module(COMMANDS["fid"][1]).make_parser().parse_args(leaf.evaluate_argv)
    solver = SOLVERS.find(drawn.solver or "unipc")
    steps = drawn.steps or solver.default_steps
    nfe = ADAPTIVE_NFE if solver.evaluations is None else steps * solver.evaluations
    guided = 1 if drawn.cfg in (0.0, 1.0) or (drawn.cfg is None and solver.jumps) else 2
    weights = scored.weights or [None] * len(scored.extractor)
    features = sum(_feature_seconds(*pair) for pair in zip(scored.extractor, weights, strict=True))
    return 2 * START + drawn.num_samples * (nfe * guided * forward + features)


_features: dict[str, float] = {}


def _feature_seconds(extractor: str, weights: str | None) -> float:
    """Returns the seconds to extract the features of one image, measured once."""
    key = json.dumps([extractor, weights])
    if key not in _features:
        device = open_device("cpu" if on_cpu() else "auto")
        network = open_extractor(extractor, weights, device)
        side = getattr(network.network, "side", 64)
        images = torch.zeros(16, 3, side, side, dtype=torch.uint8, device=device)
        _features[key] = _timed(lambda: network(images)) / len(images)
    return _features[key]


def _timed(task: Callable[[], object]) -> float:
    """Returns the seconds of the second of two calls."""
    for _ in range(2):
        start = time.perf_counter()
        task()
        synchronize(torch.device("cpu" if on_cpu() else "cuda"))
    return time.perf_counter() - start
