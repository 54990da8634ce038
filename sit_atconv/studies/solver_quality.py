"""Quality and speed of solvers and grids by NFE, compared with many Euler steps."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import Codec, decode_in_parts, open_codec
from sit_atconv.data.pixels import to_uint8
from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.evaluation.features import extract_features
from sit_atconv.evaluation.gaussians import Gaussian, fit_gaussian
from sit_atconv.evaluation.image_sets import open_image_set
from sit_atconv.evaluation.metric_functions import frechet, jackknife_groups
from sit_atconv.flow import as_trained
from sit_atconv.runtime.devices import on_cpu, open_device, prepare_device
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.plots import save_solver_curves
from sit_atconv.runtime.settings import differences
from sit_atconv.sampling import SOLVERS, Counted, Sampler, SampleStream

DEFAULT_CFG = 2.0  # for models with a null label that have not learned guidance


@dataclass(frozen=True)
class Options:
    """Options of `eval/solvers.py`, whose --help explains each."""

    ckpt: str
    out: str
    cfg: float | None
    reference: str
    extractor: str
    extractor_weights: str | None
    num_samples: int
    batch_size: int
    seed: int
    solvers: tuple[str, ...]
    evaluations: tuple[int, ...]
    shifts: tuple[float, ...]
    baseline: int


@dataclass(frozen=True)
class Point:
    """Result of one solver on one grid.

    Args:
        evaluations: NFE, the number of evaluations of the velocity per image.
        distance: Frechet distance of the samples to the reference.
        error: standard error of `distance` (jackknife).
        images_per_second: speed of sampling alone.
    """

    solver: str
    shift: float
    steps: int
    evaluations: float
    distance: float
    error: float
    images_per_second: float


def compare_solvers(options: Options) -> dict:
    """Measures the points missing in OUT/solvers.json, and writes OUT/solvers.png and solvers.md.

    All samples come from the same noise and balanced labels. After an interruption the same call resumes.

    Returns:
        The content of solvers.json: settings, points, and those that are enough (`is_enough`).

    Raises:
        ValueError: weights, reference or extractor are not available, a solver does not suit the model, or OUT holds
            another comparison.
    """
    weights = load_weights(options.ckpt)
    recipe = weights.recipe
    if options.cfg is None:
        is_off = weights.null_label is None or recipe.trained_cfg != 1
        options = replace(options, cfg=1.0 if is_off else DEFAULT_CFG)
    for sampler in plan(options):
        sampler.check(recipe.interpolant, recipe.prediction, **weights.traits)
    device = open_device("cpu" if on_cpu() else "auto")
    prepare_device(device)
    network = open_extractor(options.extractor, options.extractor_weights, device)
    out = Path(options.out)
    settings = asdict(options) | {"weights": weights.identity(), "extractor_sha256": network.sha256}
    del settings["ckpt"], settings["out"], settings["batch_size"], settings["extractor_weights"]
    settings = json.loads(json.dumps(settings))
    out.mkdir(parents=True, exist_ok=True)
    points = _read(out / "solvers.json", settings)
    known = {(point.solver, point.shift, point.steps) for point in points}
    missing = [sampler for sampler in plan(options) if (sampler.solver, sampler.shift, sampler.steps) not in known]
    if missing:
        reference = extract_features(network, open_image_set(options.reference), options.batch_size, device)
        real = fit_gaussian(reference["features"])
        remedy = f"Give --ckpt the folder that python -m sit_atconv.convert {options.ckpt} OUT --vae PATH writes"
        codec = open_codec(recipe.codec, remedy=remedy).to(device)
        warm_up = replace(options, num_samples=options.batch_size)
        measure(Sampler(cfg=options.cfg, solver="euler", steps=1), weights, codec, network, real, warm_up, device)
    for sampler in tqdm(missing, unit="solver"):
        points.append(measure(sampler, weights, codec, network, real, options, device))
        _write(out / "solvers.json", settings, points)
    return _write(out / "solvers.json", settings, points)


def plan(options: Options) -> list[Sampler]:
    """Returns the samplers to measure, without duplicates: the Euler baseline, then all others."""
    samplers = [Sampler(cfg=options.cfg, solver="euler", steps=options.baseline)] + [
        Sampler(cfg=options.cfg, solver=solver, steps=steps, shift=shift)
        for solver in options.solvers
        for shift in options.shifts
        for evaluations in options.evaluations
        if (steps := evaluations // SOLVERS.find(solver).evaluations)
    ]
    return list(dict.fromkeys(samplers))


@torch.inference_mode()
def measure(
    sampler: Sampler,
    weights: Weights,
    codec: Codec,
    network: Extractor,
    real: Gaussian,
    options: Options,
    device: torch.device,
) -> Point:
    """Draws samples, measures their speed, and compares their features with `real`, the reference."""
    recipe, config = weights.recipe, weights.model.config
    model = Counted(weights.model.to(device))
    features, labels, seconds = [], [], 0.0
    for start in range(0, options.num_samples, options.batch_size):
        stream = SampleStream(options.seed, range(start, min(start + options.batch_size, options.num_samples)))
        noise = stream.randn((codec.channels, config.input_size, config.input_size), device)
        y = stream.labels(config.num_classes, "balanced", recipe.empty_classes).to(device)
        labels += y.tolist()
        clock = time.perf_counter()
        z = sampler(
            as_trained(model, recipe),
            noise,
            y,
            path=recipe.interpolant,
            prediction=recipe.prediction,
            randn=stream.randn_like,
        )
        images = to_uint8(decode_in_parts(codec, z)).cpu()
        seconds += time.perf_counter() - clock
        features.append(network(images.expand(-1, 3, -1, -1).to(device))["features"])
    score = frechet(torch.cat(features), real, jackknife_groups(options.num_samples, labels))
    assert score.error is not None  # there are at least 100 samples
    return Point(
        sampler.solver,
        sampler.shift,
        sampler.steps,
        model.evaluations / len(features),
        score.value,
        score.error,
        options.num_samples / seconds,
    )


def is_enough(point: Point, baseline: Point) -> bool:
    """True if the distance is at most two standard errors above the baseline's."""
    return point.distance <= baseline.distance + 2 * baseline.error


def _read(path: Path, settings: dict) -> list[Point]:
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text())
        points = [Point(**point) for point in held["points"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: delete it, or give another --out") from error
    if changed := differences(held["settings"], settings, ignored=("solvers", "evaluations", "shifts")):
        raise ValueError(f"{path} holds another comparison ({'; '.join(changed)}): give another --out")
    return points


def _write(path: Path, settings: dict, points: list[Point]) -> dict:
    baseline = points[0]
    enough = sorted(
        (point for point in points[1:] if is_enough(point, baseline)),
        key=lambda point: (point.evaluations, point.distance),
    )
    result = {"settings": settings, "points": [asdict(p) for p in points], "enough": [asdict(p) for p in enough]}
    write_aside(path, json.dumps(result, indent=1))
    write_aside(path.with_suffix(".md"), table(points))
    save_solver_curves(
        [asdict(point) for point in points],
        path.with_suffix(".png"),
        f"cfg {settings['cfg']:g}, {settings['num_samples']} samples, features: {settings['extractor']}",
    )
    return result


def table(points: list[Point]) -> str:
    """Returns Markdown: the distance of each solver and grid by NFE, in bold where it is enough."""
    baseline, others = points[0], points[1:]
    columns = sorted({point.evaluations for point in others})
    lines = [
        f"Euler, {baseline.steps} steps: {baseline.distance:.2f} +- {baseline.error:.2f}, "
        f"{baseline.images_per_second:.1f} images/s\n",
        "| solver | shift | " + " | ".join(f"{n:g}" for n in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for solver, shift in dict.fromkeys((point.solver, point.shift) for point in others):
        row = {p.evaluations: p for p in others if (p.solver, p.shift) == (solver, shift)}
        cells = []
        for n in columns:
            cell = f"{row[n].distance:.2f}" if n in row else ""
            cells.append(f"**{cell}**" if n in row and is_enough(row[n], baseline) else cell)
        lines.append(f"| {solver} | {shift:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
