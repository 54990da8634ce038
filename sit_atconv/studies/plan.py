"""Plan of a sweep: reads its file, and lists the runs with their settings, folders and command lines."""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import yaml

STAGES = ("train", "generate", "evaluate")  # the commands, in the order in which they run
KEYS = {*STAGES, "ckpt", "out", "records", "axes", "grid", "seeds", "report"}
PLACEHOLDER = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # {step} or {step:07d}
REPORT_KEYS = {"metric", "baseline", "table"}
Value = str | int | float
Settings = dict[str, Value]  # axis -> value


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep's file; docs/sweeps.md explains each entry.

    Args:
        name: name of the file without suffix.
        out: folder of the runs, relative to the working directory.
        records: folder of the records that tables and charts are made from.
        base: options that all runs share, as text by stage; a stage that is left out does not run.
        ckpt: weights to sample from instead of training.
        axes: axis -> value -> options as text by stage; an axis with a single option has the value None.
        grid: one setting of all axes for each leaf: a run to train, sample and evaluate.
        seeds: axes whose values are seeds, over which the report averages.
        report: metric, baseline and table of the report.
    """

    name: str
    out: Path
    records: Path
    base: Mapping[str, str]
    ckpt: str | None
    axes: Mapping[str, Mapping[Value | None, Mapping[str, str]]]
    grid: tuple[Settings, ...]
    seeds: tuple[str, ...]
    report: Mapping = field(default_factory=dict)

    def runs(self) -> "list[Run]":
        """Returns the training runs (with `ckpt`, the one that exists), each with its leaves."""
        leaves: dict[str, list[Settings]] = {}
        for settings in self.grid:
            leaves.setdefault(json.dumps(self._of("train", settings)), []).append(settings)
        return [Run(self, json.loads(of_training), tuple(each)) for of_training, each in leaves.items()]

    def _of(self, stage: str, settings: Settings) -> Settings:
        """Returns the settings of training, or those of the stages after it."""
        is_train = stage == "train"
        return {name: value for name, value in settings.items() if ("train" in self._stages(name)) == is_train}

    def _stages(self, axis: str) -> set[str]:
        return {stage for options in self.axes[axis].values() for stage in options}

    def options(self, stage: str, settings: Settings) -> str | None:
        """Returns the options of a stage as text, without folders; None if the stage does not run."""
        if stage not in self.base:
            return None
        texts = [self.base[stage]]
        for name, value in settings.items():
            choices = self.axes[name]
            text = choices.get(value, choices.get(None, {})).get(stage)
            if text is not None and None in choices and f"{{{name}" not in text:
                text = f"{text} {shlex.quote(str(value))}"
            texts.append(text or "")
        filled = " ".join(" ".join(texts).split())
        return PLACEHOLDER.sub(partial(_filled, settings), filled)

    def folder_name(self, settings: Settings) -> str:
        """Returns "attention-seed0" for {"mixer": "attention", "seed": 0}."""
        parts = [f"{name}{value}" if None in self.axes[name] else str(value) for name, value in settings.items()]
        return re.sub(r"[^\w.+=-]+", "_", "-".join(parts)) or "base"

    def label(self, settings: Settings) -> str:
        """Returns a row's name in the report: its settings without the seeds."""
        parts = [
            f"{name} {value}" if None in self.axes[name] else str(value)
            for name, value in settings.items()
            if name not in self.seeds
        ]
        return ", ".join(parts) or "base"


@dataclass(frozen=True)
class Run:
    """A training run and its leaves.

    Args:
        settings: values of the axes of training.
        grid: all settings of each leaf.
    """

    sweep: Sweep
    settings: Settings
    grid: tuple[Settings, ...]

    @property
    def name(self) -> str:
        return self.sweep.folder_name(self.settings)

    @property
    def folder(self) -> Path:
        return self.sweep.out / self.name

    @property
    def record(self) -> Path:
        """File of the training's record."""
        return self.sweep.records / f"{self.name}.training.json"

    @property
    def is_trained(self) -> bool:
        """True if this sweep trains the run."""
        return self.sweep.ckpt is None

    @cached_property
    def options(self) -> str:
        return self.sweep.options("train", self.settings) or ""

    @property
    def argv(self) -> list[str]:
        """Arguments of `sit_atconv/train.py`."""
        return [*shlex.split(_placed(self.options, self.sweep, self)), "--out", str(self.folder)]

    @cached_property
    def leaves(self) -> "list[Leaf]":
        """The samples to draw and evaluate; empty if the sweep only trains."""
        return [Leaf(self, settings) for settings in self.grid] if "evaluate" in self.sweep.base else []

    def needs(self, other: "Run") -> bool:
        """True if this run starts from the weights of the other one."""
        return other.name != self.name and str(other.folder) in self.argv

    @property
    def facts(self) -> dict:
        """Returns what the training's record says of the sweep."""
        return _facts(self.sweep, self.settings, {"train": self.options})


@dataclass(frozen=True)
class Leaf:
    """Samples of one run with one setting, and their evaluation."""

    run: Run
    settings: Settings

    @property
    def name(self) -> str:
        """Name of the record: all settings."""
        return self.run.sweep.folder_name(self.settings)

    @property
    def folder(self) -> Path:
        """Folder of the samples."""
        below = self.run.sweep.folder_name(self.run.sweep._of("generate", self.settings))
        return (self.run.folder / "samples" if self.run.is_trained else self.run.sweep.out) / below

    @property
    def record(self) -> Path:
        return self.run.sweep.records / f"{self.name}.json"

    @cached_property
    def options(self) -> dict[str, str]:
        """Options by stage, without folders."""
        texts = {stage: self.run.sweep.options(stage, self.settings) for stage in STAGES}
        return {stage: text for stage, text in texts.items() if text is not None}

    @property
    def scores(self) -> Path:
        """File that `eval/fid.py` writes; its name changes with any option, so that no old file is read."""
        key = hashlib.sha256(json.dumps([self.options, self.run.sweep.ckpt]).encode()).hexdigest()[:8]
        return self.folder / f"scores-{key}.json"

    @property
    def generate_argv(self) -> list[str]:
        """Arguments of `sample/generate.py`."""
        ckpt = self.run.sweep.ckpt or str(self.run.folder)
        options = shlex.split(_placed(self.options.get("generate", ""), self.run.sweep, self.run))
        return ["--ckpt", ckpt, *options, "--out", str(self.folder)]

    @property
    def is_of_last_step(self) -> bool:
        """True if the samples are drawn from the trained run, and not from a checkpoint on the way."""
        argv = self.generate_argv
        last = max(i for i, word in enumerate(argv) if word == "--ckpt" or word.startswith("--ckpt="))
        return self.run.is_trained and argv[last : last + 2] == ["--ckpt", str(self.run.folder)]

    @property
    def evaluate_argv(self) -> list[str]:
        """Arguments of `eval/fid.py`."""
        options = shlex.split(_placed(self.options["evaluate"], self.run.sweep, self.run))
        return ["--samples", str(self.folder), *options, "--out", str(self.scores)]

    @property
    def facts(self) -> dict:
        """Returns what the record says of the sweep."""
        return _facts(self.run.sweep, self.settings, self.options)


def _filled(settings: Settings, found: re.Match) -> str:
    name, form = found.groups()
    return format(settings[name], form or "") if name in settings else found[0]


def _placed(options: str, sweep: Sweep, run: Run) -> str:
    return options.replace("{out}", str(sweep.out)).replace("{run}", str(run.folder))


def _facts(sweep: Sweep, settings: Settings, options: Mapping[str, str]) -> dict:
    ckpt = {} if sweep.ckpt is None else {"ckpt": sweep.ckpt}
    return {"name": sweep.name, "settings": settings, "seeds": [*sweep.seeds], "options": dict(options), **ckpt}


def read_sweep(path: Path, out: str | None = None, more: Mapping[str, str] | None = None) -> Sweep:
    """Reads the file of a sweep.

    Args:
        path: the YAML file.
        out: folder of the runs instead of the file's.
        more: further options of all runs, as text by stage; they override those of the file.

    Raises:
        ValueError: the file cannot be read, or an entry is missing, unknown or of another form; names it.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    fault = f"{path} is not a sweep:"
    if not isinstance(content, dict) or (unknown := content.keys() - KEYS):
        found = f"unknown entry {sorted(map(str, unknown))[0]}" if isinstance(content, dict) else "no mapping"
        raise ValueError(f"{fault} {found}; known are {', '.join(sorted(KEYS))}")
    if ("ckpt" in content) == ("train" in content):
        raise ValueError(f"{fault} give either train (options of the training) or ckpt (weights that exist)")
    if "ckpt" in content and "evaluate" not in content:
        raise ValueError(f"{fault} with ckpt, give evaluate (options of eval/fid.py)")
    base = {stage: content[stage] or "" for stage in STAGES if stage in content}
    if "evaluate" in base:
        base.setdefault("generate", "")
    for name in ("out", "records", "ckpt", *base):
        if name in content and not isinstance(content[name] or "", str):
            raise ValueError(f"{fault} {name} is {content[name]!r}; give text")
    for stage, options in (more or {}).items():
        if stage not in base:
            raise ValueError(f"{path} has no {stage}, so leave --{stage} out")
        base[stage] = f"{base[stage]} {options}".strip()
    report = content.get("report") or {}
    if not isinstance(report, dict) or (unknown := report.keys() - REPORT_KEYS):
        raise ValueError(f"{fault} report takes {', '.join(sorted(REPORT_KEYS))}, not {report}")
    axes = {str(name): _axis(name, value, base, fault) for name, value in (content.get("axes") or {}).items()}
    grid = tuple(_settings(content.get("grid"), axes, fault))
    baseline = report.get("baseline") or {}
    if not any(all(settings.get(name) == value for name, value in baseline.items()) for settings in grid):
        raise ValueError(f"{fault} no run of the grid has the settings of report.baseline, {baseline}")
    if (table := report.get("table")) is not None and (
        not isinstance(table, dict) or table.keys() != {"rows", "columns"}
    ):
        raise ValueError(f"{fault} report.table must be {{rows: AXES, columns: AXIS}}, not {table}")
    seeds = content.get("seeds", ["seed"] if "seed" in axes else [])
    seeds = tuple([seeds] if isinstance(seeds, str) else seeds)
    if unknown := set(seeds) - axes.keys():
        raise ValueError(f"{fault} seeds names {sorted(unknown)[0]!r}, which is no axis")
    folder = Path(out or content.get("out") or f"runs/{path.stem}")
    records = folder / "records" if out or "records" not in content else Path(content["records"])
    sweep = Sweep(path.stem, folder, records, base, content.get("ckpt"), axes, grid, seeds, report)
    names: dict[str, Settings] = {}
    for leaf in (leaf for run in sweep.runs() for leaf in run.leaves):
        if (other := names.setdefault(leaf.name, leaf.settings)) is not leaf.settings:
            raise ValueError(f"{fault} {other} and {leaf.settings} would share the folder {leaf.name}: rename a value")
    return sweep


def _axis(name: object, value: object, base: Mapping[str, str], fault: str) -> dict[Value | None, dict[str, str]]:
    """Reads an axis: {stage: option} that takes the value, or value -> {stage: options}."""
    if isinstance(value, dict) and value.keys() <= {*STAGES} and all(isinstance(text, str) for text in value.values()):
        choices: dict[Value | None, dict[str, str]] = {None: dict(value)}
    elif isinstance(value, dict) and all(isinstance(options, dict) for options in value.values()):
        choices = {each: {stage: text or "" for stage, text in options.items()} for each, options in value.items()}
    else:
        raise ValueError(f"{fault} the axis {name} must be STAGE: --option, or VALUE: {{STAGE: options}}")
    for stage, text in ((stage, text) for options in choices.values() for stage, text in options.items()):
        if stage not in base:
            raise ValueError(f"{fault} the axis {name} sets options of {stage!r}, which is none of {', '.join(base)}")
        if not isinstance(text, str) or not text.startswith("-"):
            raise ValueError(f"{fault} the axis {name} has options {text!r}; they begin with --")
    return choices


def _settings(grid: object, axes: Mapping, fault: str) -> Iterator[Settings]:
    """Yields the settings of the grid: products of one mapping, or of several in turn, without duplicates."""
    parts = [grid] if isinstance(grid, dict) else grid
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{fault} grid must be a mapping from axes to values, or a list of them")
    seen = []
    for part in parts:
        if unknown := part.keys() - axes.keys():
            raise ValueError(f"{fault} the grid names {sorted(map(str, unknown))[0]}, known axes are {', '.join(axes)}")
        values = [value if isinstance(value, list) else [value] for value in part.values()]
        for axis, choices in zip(part, values, strict=True):
            for choice in choices:
                if None not in axes[axis] and choice not in axes[axis]:
                    known = ", ".join(map(str, axes[axis]))
                    raise ValueError(f"{fault} the axis {axis} has no value {choice!r}; known are {known}")
        for combination in itertools.product(*values):
            settings = dict(zip(part, combination, strict=True))
            settings = {name: settings[name] for name in axes if name in settings}  # in the order of the axes
            if settings not in seen:
                seen.append(settings)
                yield settings
