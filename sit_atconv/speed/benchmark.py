"""The speed comparison: the forms of `speed/forms.py`, timed side by side in one run.

Every round times each form once (ABAB...), so that other load on the machine affects all forms alike, and ratios are
taken round by round. A level is timed only after its forms have passed their checks.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from sit_atconv.ops import fastest_implementation
from sit_atconv.runtime.devices import keep_freed_memory, open_device, synchronize
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.environment import describe_environment
from sit_atconv.runtime.memory import peak_bytes
from sit_atconv.speed.costs import form_multiply_adds, operator_cost
from sit_atconv.speed.forms import TWO_TIMES
from sit_atconv.speed.levels import FLOW_STEP, PREPARE, Case, check_dtype, open_decoder
from sit_atconv.speed.options import SpeedOptions
from sit_atconv.speed.results import Comparison, Measurement
from sit_atconv.speed.timing import Rounds, time_interleaved

MEMORY = ("train", "sampling", "jump", "train-jump")  # levels whose peak memory is measured


def compare(
    options: SpeedOptions,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
    after_case: Callable[[Comparison], object] = lambda comparison: None,
) -> Comparison:
    """Times the forms at every level, at each resolution and in each dtype.

    Args:
        options: what to time.
        clock: returns seconds.
        progress: whether to draw a progress bar on stderr.
        after_case: called with the results so far after every resolution, so that a killed run loses little.

    Raises:
        ValueError: forms do not agree; the device is missing, does not support a dtype or has too little memory; the
            decoder cannot be loaded or does not fit the models.
    """
    device = open_device(options.device)
    keep_freed_memory()
    for dtype in options.dtypes:
        check_dtype(device, dtype)
    decoder = open_decoder(options)
    cases = [Case(options, px, dtype, device, decoder) for dtype, px in product(options.dtypes, options.resolutions)]
    environment = {**describe_environment(device), "operator": fastest_implementation(device)}
    comparison = Comparison(options, environment, [], [])
    total = len(cases) * len(options.levels) * (options.rounds + options.warmup)
    with tqdm(total=total, unit="round", disable=not progress) as bar:
        while cases:
            case = cases.pop(0)  # frees the models of the case before
            for level in options.levels:
                bar.set_description(f"{options.preset} {level} {case.resolution} px {case.dtype}")
                try:
                    comparison.measurements.extend(measure(case, level, clock=clock, after_round=bar.update))
                except torch.OutOfMemoryError:
                    raise ValueError(
                        f"{level} at {case.resolution} px in {case.dtype} with batch size "
                        f"{case.batch_size} does not fit into the memory of {device}: lower "
                        "--batch-size"
                    ) from None
            comparison.agreement.extend(
                {"resolution": case.resolution, "dtype": case.dtype, **asdict(check)} for check in case.checks
            )
            after_case(comparison)
    return comparison


def measure(
    case: Case,
    level: str,
    *,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """Times every form of a level in the same rounds. Raises ValueError before that if a check fails."""
    options, device = case.options, case.device
    if options.compile:
        torch.compiler.reset()
        # Every form adds compilations, with and without gradients. (torch.compile got an argument for it after 2.7.)
        torch._dynamo.config.recompile_limit = 64
    timed = PREPARE[level](case)
    seconds = time_interleaved(
        {**timed.runs, **timed.extras},
        rounds=options.rounds,
        warmup=options.warmup,
        synchronize=partial(synchronize, device),
        clock=clock,
        after_round=after_round,
    )
    decode = Rounds.of([1000 * s for s in seconds.get("decode", [0.0] * options.rounds)])
    ms = {key: Rounds.of([1000 * timed.scale * s for s in seconds[key]]).plus(decode) for key in timed.runs}

    def measured(form: str, quantity: str, milliseconds: Rounds, **figures: Any) -> Measurement:
        rates = Rounds.of([1000 * case.batch_size / one for one in milliseconds.rounds])
        return Measurement(
            level,
            quantity,
            form,
            case.resolution,
            case.grid_size,
            case.dtype,
            case.batch_size,
            milliseconds,
            rates,
            **figures,
        )

    measurements = []
    for (form, quantity), milliseconds in ms.items():
        figures: dict[str, Rounds | int] = {}
        if form in timed.modules:
            figures["parameters"] = sum(p.numel() for p in timed.modules[form].parameters())
        if level in MEMORY and (beyond := peak_bytes(timed.runs[form, quantity], device)) is not None:
            figures["peak_memory_bytes"] = beyond + resident_bytes(timed.modules[form], timed.optimizers.get(form))
        if form != options.baseline and (options.baseline, quantity) in ms:
            figures["speedup"] = ms[options.baseline, quantity].over(milliseconds)
        if form != "floor" and ("floor", quantity) in ms:
            figures["over_floor"] = milliseconds.over(ms["floor", quantity])
        if level == "train-jump" and quantity != FLOW_STEP:
            figures["over_flow"] = milliseconds.over(ms[form, FLOW_STEP])
        config = {**options.model_config(form, case.resolution), "two_times": level in TWO_TIMES}
        if level == "op":
            macs, numbers = operator_cost(form, config, case.grid_size)[quantity]
            needed_bytes = case.batch_size * numbers * torch_dtype(case.dtype).itemsize
            bandwidth = [2 * timed.copied_bytes / s for s in seconds["copy"]]  # read and written
            figures["over_byte_floor"] = milliseconds.over(Rounds.of([1000 * needed_bytes / b for b in bandwidth]))
        else:
            macs = form_multiply_adds(level, form, config, case.grid_size)
        measurements.append(measured(form, quantity, milliseconds, multiply_adds=macs, **figures))
    if "decode" in timed.extras:
        measurements.append(measured("decoder", "decode", decode))
    return measurements


def resident_bytes(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Returns the bytes of weights and optimizer state, which stay allocated between runs."""
    state = [tensor for values in optimizer.state.values() for tensor in values.values()] if optimizer else []
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *state])
