"""One HTML page about training runs: tables, curves and pictures of their records, all in the file."""

import base64
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from sit_atconv import __version__
from sit_atconv.checkpoints.run_folder import list_checkpoints, read_config, read_quality, read_stats
from sit_atconv.evaluation.image_sets import evenly_spaced
from sit_atconv.evaluation.records import Evaluation, protocol_differences, read_evaluation
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.plots import set_log
from sit_atconv.runtime.settings import flatten

TEMPLATE = Path(__file__).with_name("page.html")
COLOURS = ("#2a6f97", "#d1495b", "#3c9a6b", "#d1722c", "#8a5fb5", "#c9a227")
WIDEST = 1400  # pixels of an embedded picture
MOST_PREVIEWS = 5  # of each run
FACTS = {  # row of the first table -> options of the run that it shows
    "model": ("preset", "model.mixer", "model.patch_size", "model.hidden_size", "model.depth", "model.use_pos_embed"),
    "data": ("data.images", "data.latents", "data.image_size", "data.mirror"),
    "objective": ("flow.class_path", "flow.path", "flow.prediction", "flow.class_dropout_prob"),
    "alignment": ("auxiliary.class_path", "auxiliary.init_args.target", "auxiliary.init_args.encoder"),
    "optimisation": ("train.batch_size", "train.lr", "train.lr_decay", "train.warmup_steps", "train.ema_decay"),
    "arithmetic": ("train.precision", "train.compile"),
    "seed": ("train.seed",),
}


@dataclass
class RunRecord:
    """The records of a training run.

    Args:
        folder: the run.
        name: its name on the page.
        options: its configuration, flat.
        stats: lines of its log.
        sessions: entries of its provenance.json.
        evaluations: its scores, by the file that holds them.
    """

    folder: Path
    name: str
    options: dict
    stats: list[dict]
    sessions: list[dict]
    evaluations: dict[Path, Evaluation] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return max([line["step"] for line in self.stats], default=0)

    @property
    def distances(self) -> dict[str, list[tuple[int, float, float]]]:
        """Scores of the samples drawn during training: name -> (step, value, standard error)."""
        found: dict[str, list[tuple[int, float, float]]] = {}
        for step, record in read_quality(self.folder).items():
            for name, value in record["log"].items():
                if not name.endswith("/error"):
                    error = record["log"].get(f"{name}/error", 0.0)
                    found.setdefault(name.removeprefix("quality/"), []).append((step, value, error))
        return found


def read_runs(folders: Sequence[Path], scores: Iterable[Path] = ()) -> list[RunRecord]:
    """Reads the records of runs.

    Args:
        folders: the runs.
        scores: further records that eval/fid.py wrote; each belongs to the run whose weights it names, or to the first.

    Raises:
        ValueError: a folder is no training run, or a record is damaged.
    """
    runs = []
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is not a training run: it has no config.yaml")
        name = folder.name if len({other.name for other in folders}) == len(folders) else str(folder)
        if not (options := flatten(read_config(folder))):
            raise ValueError(f"{folder / 'config.yaml'} is damaged: put back a copy of it")
        run = RunRecord(folder, name, options, read_stats(folder), _sessions(folder))
        for path in sorted(folder.glob("samples/*/scores-*.json")):
            run.evaluations[path] = read_evaluation(path)
        runs.append(run)
    for path in scores:
        evaluation = read_evaluation(path)
        weights = Path(str(evaluation.subject.get("ckpt", ""))).absolute()
        owners = [run for run in runs if weights.is_relative_to(run.folder.absolute())]
        (owners or runs)[0].evaluations[path] = evaluation
    return runs


def _sessions(folder: Path) -> list[dict]:
    try:
        return [dict(session) for session in json.loads((folder / "provenance.json").read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def write_page(runs: Sequence[RunRecord], out: Path, title: str, speed: Path | None = None) -> None:
    """Writes the page.

    Args:
        runs: what `read_runs` returned.
        out: the HTML file.
        title: its heading.
        speed: speed.png of eval/speed.py, or None.
    """
    evaluations = {path: (run, found) for run in runs for path, found in run.evaluations.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        runs=runs,
        facts=training_facts(runs),
        curves=_curves(runs),
        scores=_scores(evaluations),
        differences=_differences(evaluations),
        steps_chart=_steps_chart(evaluations),
        pictures=_pictures(runs, evaluations),
        speed=_speed(runs, evaluations),
        speed_chart=_embedded(speed) if speed else None,
        commands={run.name: [session.get("command", "") for session in run.sessions] for run in runs},
    )
    write_aside(out, page)


def training_facts(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Returns the rows of the table of what was trained on what, a cell for each run, without empty ones."""
    rows = {}
    for row, names in FACTS.items():
        cells = [
            ", ".join(
                f"{name.rpartition('.')[2].replace('_', ' ')} {run.options[name]}"
                for name in names
                if run.options.get(name) not in (None, "")
            )
            for run in runs
        ]
        if any(cells):
            rows[row] = cells
    rows["steps"] = [f"{run.step:,} of {run.options.get('train.steps', 0):,}" for run in runs]
    rows["checkpoints"] = [str(len(list_checkpoints(run.folder))) for run in runs]
    versions = [(run.sessions[-1].get("versions") or {}) if run.sessions else {} for run in runs]
    rows["versions"] = [", ".join(f"{name} {v[name]}" for name in ("torch", "python") if name in v) for v in versions]
    rows["commit"] = [str((run.sessions[-1].get("commit") or "") if run.sessions else "")[:12] for run in runs]
    return rows


def _curves(runs: Sequence[RunRecord]) -> list[Markup]:
    """Returns the charts of losses, and of distances during training."""
    panels = [("training loss", "loss"), ("held-out flow loss", "held_out_loss")]
    panels = [(label, key) for label, key in panels if any(key in line for run in runs for line in run.stats)]
    charts = []
    for label, key in panels:
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
            points = [(line["step"], line[key]) for line in run.stats if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=run.name)
        _finish(axes, "optimizer step", label)
        charts.append(_svg(figure))
    if any(run.distances for run in runs):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
            for name, measured in run.distances.items():
                at, values, errors = zip(*measured, strict=True)
                axes.errorbar(at, values, errors, fmt="o-", color=colour, markersize=3, label=f"{run.name}, {name}")
        _finish(axes, "optimizer step", "distance of samples (lower is better)")
        charts.append(_svg(figure))
    return charts


def _steps_chart(evaluations: Mapping[Path, tuple[RunRecord, Evaluation]]) -> Markup | None:
    """Returns a chart of distance over function evaluations; None if no run was sampled with several."""
    lines: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for run, evaluation in evaluations.values():
        nfe, (name, score) = evaluation.subject.get("evaluations"), next(iter(evaluation.scores.items()))
        if nfe is not None and name.startswith(("FID", "FD")):
            sampler = flatten(evaluation.protocol).get("samples.sampler.solver")
            lines.setdefault((run.name, f"{sampler}, {name}"), {})[nfe] = (score.value, score.error or 0.0)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for (run_name, label), points in lines.items():
        at = sorted(points)
        values, errors = zip(*(points[nfe] for nfe in at), strict=True)
        axes.errorbar(at, values, errors, fmt="o-", markersize=3, label=f"{run_name}, {label}")
    set_log(axes, "x")
    _finish(axes, "function evaluations an image", "distance (lower is better)")
    return _svg(figure)


def _finish(axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure) -> Markup:
    """Returns a figure as SVG that takes the page's text colour, light or dark."""
    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": str(id(figure))}):  # ids differ between figures of a page
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"(<text[^>]*style=\")", r"\1fill: currentColor; ", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that nothing refers to, equal in all figures
    return Markup(re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart" role="img"', svg, count=1))


def _scores(evaluations: Mapping[Path, tuple[RunRecord, Evaluation]]) -> dict:
    """Returns the columns and rows of the table of scores."""
    names = list(dict.fromkeys(name for _, found in evaluations.values() for name in found.scores))
    rows = []
    for run, found in evaluations.values():
        sampler = flatten(found.protocol)
        cells = {
            "run": run.name,
            "step": str(found.subject.get("step", "")),
            "samples": f"{sampler.get('samples.num', '')}",
            "sampler": " ".join(str(sampler.get(f"samples.sampler.{key}", "")) for key in ("solver", "steps")),
            "cfg": str(sampler.get("samples.sampler.cfg", "")),
            "reference": Path(str(found.subject.get("reference", ""))).name,
        }
        rows.append([*cells.values(), *(str(found.scores[name]) if name in found.scores else "" for name in names)])
    return {"columns": ["run", "step", "samples", "sampler", "cfg", "reference", *names], "rows": rows}


def _differences(evaluations: Mapping[Path, tuple[RunRecord, Evaluation]]) -> list[str]:
    """Returns the differences of protocol between the first evaluation and the others, in lines."""
    found = [evaluation for _, evaluation in evaluations.values()]
    rows: dict[str, list[str]] = {}
    for number, other in enumerate(found[1:], 2):
        if changed := protocol_differences(found[0], other):
            said = "; ".join(f"{name}: {before} -> {after}" for name, (before, after) in changed.items())
            rows.setdefault(said, []).append(str(number))
    return [f"row {', '.join(numbers)} beside row 1: {said}" for said, numbers in rows.items()]


def _pictures(runs: Sequence[RunRecord], evaluations: Mapping[Path, tuple[RunRecord, Evaluation]]) -> dict[str, list]:
    """Returns the pictures by heading: (caption, embedded picture)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        previews = sorted(run.folder.glob("samples/step-*.png"))
        shown = [previews[i] for i in evenly_spaced(len(previews), MOST_PREVIEWS)] if previews else []
        found[f"{run.name}: the same noise during training"] = [(path.stem, _embedded(path)) for path in shown]
        grids = sorted({*run.folder.glob("samples/*/grid.png")})
        found[f"{run.name}: samples"] = [(path.parent.name, _embedded(path)) for path in grids]
    for path, (run, evaluation) in evaluations.items():
        folder = Path(str(evaluation.subject.get("path", "")))
        grid = folder / "grid.png"
        if grid.is_file() and not path.is_relative_to(run.folder):
            found[f"{run.name}: samples"].append((folder.name, _embedded(grid)))
        nearest = path.with_suffix(".nearest.png")
        if nearest.is_file():
            found.setdefault(f"{run.name}: nearest training images", []).append((folder.name, _embedded(nearest)))
    return {heading: pictures for heading, pictures in found.items() if pictures}


def _embedded(path: Path) -> str:
    """Returns a picture as a data URI, at most `WIDEST` pixels wide."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
        if picture.width > WIDEST:
            picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        picture.save(content, "webp", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _speed(runs: Sequence[RunRecord], evaluations: Mapping[Path, tuple[RunRecord, Evaluation]]) -> list[list[str]]:
    """Returns rows of (run, what, images/s)."""
    rows = []
    for run in runs:
        rates = sorted(line["images_per_second"] for line in run.stats if line.get("images_per_second"))
        if rates:
            rows.append([run.name, "training", f"{rates[len(rates) // 2]:.3g}"])
    for run, found in evaluations.values():
        if rate := found.subject.get("images_per_second"):
            rows.append([run.name, f"sampling, NFE {found.subject.get('evaluations', '?'):g}", f"{rate:.3g}"])
    return rows
