"""Typed configuration of a training run, read from YAML and the command line and checked.

Each dataclass of options is defined next to the code that reads it; those of the training loop are here, since commands
define no classes.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import torch
import yaml

from sit_atconv.checkpoints.power_averages import exponent_of
from sit_atconv.checkpoints.run_folder import list_checkpoints
from sit_atconv.checkpoints.training_state import checkpoints_at_once, snapshots_bytes
from sit_atconv.data.sources import DataConfig
from sit_atconv.flow import Objective
from sit_atconv.flow.alignment import Alignment  # noqa: F401  # makes its name known
from sit_atconv.flow.auxiliary import AuxiliaryLoss
from sit_atconv.models.presets import preset_config
from sit_atconv.models.sit import FROM_DATA, SiT
from sit_atconv.runtime.commands import fail, is_main_process, user_errors
from sit_atconv.runtime.devices import on_cpu
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.installation import command, configs_of, find_config, shipped_configs
from sit_atconv.runtime.settings import changed, differences, flatten
from sit_atconv.runtime.tables import import_module_of, import_modules
from sit_atconv.sampling import SOLVERS, Sampler
from sit_atconv.training.ema import PROFILES

# Options that choose a class, whose constructor's arguments are options, too -> base class and default class.
CLASSES: dict[str, tuple[type, str | None]] = {
    "backbone": (SiT, None),
    "flow": (Objective, "sit_atconv.flow.FlowMatching"),
    "auxiliary": (AuxiliaryLoss, None),
    "optimizer": (torch.optim.Optimizer, "torch.optim.AdamW"),
}
# Arguments of optimizers that are not options of that group: others set them (`train.lr`, the device).
NO_OPTIONS = {"params", "lr", "weight_decay", "foreach", "maximize", "capturable", "differentiable", "fused"}
# Options that may change when a run is resumed. (Data may have moved: data.json tells whether they are the same.)
MAY_CHANGE = {
    "out",
    "data.images",
    "data.latents",
    "data.pixels",
    "auxiliary.init_args.encoder_weights",  # may have moved: data.json holds their checksum
    "data.codec",
    "data.num_workers",
    "data.skip_unreadable",
    "data.keep_empty_classes",
    "data.max_megapixels",
    "train.steps",
    "train.accumulation",
    "train.activation_checkpointing",
    "train.compile",
    "train.cpu_threads",
    "train.log_every",
    "train.held_out_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.snapshot_every",
    "train.snapshot_dtype",
    "train.evaluate_every",
    "train.keep_best",
    "quality",
    "train.tracker",
    "train.peak_tflops",
    "preview",
}


@dataclass(frozen=True)
class TrainConfig:
    """Options of optimisation, checkpoints and logging.

    Args:
        steps: number of optimizer steps. Raise it to continue a finished run (a decaying learning rate then follows the
            schedule of the longer run).
        batch_size: images in one optimizer step, over all processes and micro-batches.
        accumulation: micro-batches in one optimizer step.
        lr: learning rate.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        lr_decay: decay of the learning rate after the warm-up, to 0 at the last step.
        weight_decay: decoupled weight decay of matrices; norms, biases and embeddings have none.
        max_grad_norm: clip the gradient to this norm; no clipping if not given.
        ema_decay: decay of the exponential moving average (EMA) of the weights, or a list of decays; previews and
            samples use the first.
        ema_warmup: let the decay rise to ema_decay, as min(ema_decay, (1 + step) / (10 + step)); the profile "warmup".
        ema_profile: rule by which the decay depends on the step: "constant" as in SiT, "warmup", "power", or your own
            function of (decay, step) as module.NAME. With "power", ema_decay is the relative width of the average as
            in EDM2, such as 0.05.
        precision: precision of the forward and backward pass; weights stay in fp32. "auto" is bf16 where the device
            computes it fast (CUDA and ROCm that support it, CPUs with AMX), else fp32.
        tf32: compute fp32 products in TF32 on CUDA.
        activation_checkpointing: keep only the input of each block, and compute the rest again in the backward pass:
            a third more arithmetic, far less memory.
        compile: compile the model with torch.compile: a minute or more at the start, faster steps afterwards.
        cpu_threads: threads of each process on a CPU; null shares the cores among the processes.
        seed: random seed of initialisation, data order, noise, times and label dropout.
        log_every: steps between two lines of stats.jsonl.
        held_out_every: steps between two measurements of the loss on the images of data.held_out.
        checkpoint_every: steps between two checkpoints; the last step always saves one.
        keep_checkpoints: number of newest checkpoints to keep.
        keep_every: also keep, permanently, checkpoints whose step is divisible by this number.
        snapshot_every: also keep the averages, permanently, every that many steps, so that `average` makes averages of
            other widths after training; needs ema_profile power, and two widths in ema_decay are best.
        snapshot_dtype: number format of these snapshots.
        evaluate_every: steps between two measurements of the Frechet distance of samples, as the group quality says;
            each saves a checkpoint first.
        keep_best: also keep the checkpoint with the lowest distance, RUN/best.
        tracker: also show the log in TensorBoard or wandb.
        peak_tflops: peak TFLOP/s of one device, to log the share that is used; known for common GPUs.
    """

    steps: int = 400_000
    batch_size: int = 256
    accumulation: int = 1
    lr: float = 1e-4
    warmup_steps: int = 0
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    ema_decay: float | list[float] = 0.9999
    ema_warmup: bool = False
    ema_profile: str = "constant"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    cpu_threads: int | None = None
    seed: int = 0
    log_every: int = 100
    held_out_every: int = 1000
    checkpoint_every: int = 50_000
    keep_checkpoints: int = 2
    keep_every: int | None = None
    snapshot_every: int | None = None
    snapshot_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    evaluate_every: int | None = None
    keep_best: bool = False
    tracker: Literal["tensorboard", "wandb"] | None = None
    peak_tflops: float | None = None

    def __post_init__(self):
        for name in (
            "evaluate_every",
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "held_out_every",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every",
            "snapshot_every",
            "cpu_threads",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, not {value}")
        for name in ("seed", "warmup_steps", "weight_decay", "lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be finite and not negative, not {getattr(self, name)}")
        for name in ("max_grad_norm", "peak_tflops"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"train.{name} must be positive, not {value}; null switches it off")
        if not self.ema_decays or len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"train.ema_decay must be one or more different numbers, not {self.ema_decay}")
        for decay in self.ema_decays:
            if not 0 <= decay < 1 and self.profile in PROFILES:  # a user's profile may give it another meaning
                raise ValueError(f"train.ema_decay must be in [0, 1), not {decay}")
            if self.profile == "power":
                exponent_of(decay)
        PROFILES.find(import_module_of(self.profile))
        if self.snapshot_every and self.profile != "power":
            raise ValueError(
                "train.snapshot_every keeps power function averages: give --train.ema_profile power --train.ema_decay "
                '"[0.05,0.1]", or leave it out'
            )
        if self.keep_best and self.evaluate_every is None:
            raise ValueError("train.keep_best keeps the best of several evaluations: give train.evaluate_every, too")
        if self.ema_warmup and self.ema_profile not in ("constant", "warmup"):
            raise ValueError(f"train.ema_warmup and train.ema_profile {self.ema_profile} exclude each other: give one")

    @property
    def ema_decays(self) -> list[float]:
        return self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]

    @property
    def profile(self) -> str:
        """Name of the EMA profile."""
        return "warmup" if self.ema_warmup else self.ema_profile

    def evaluates(self, step: int) -> bool:
        """True if the quality of samples is measured after this step (1-based)."""
        return self.evaluate_every is not None and (step == self.steps or step % self.evaluate_every == 0)

    @property
    def checkpoints_at_once(self) -> int:
        """The largest number of checkpoints on the disk, with the one being written."""
        return checkpoints_at_once(
            self.steps,
            self.checkpoint_every,
            self.keep_checkpoints,
            self.keep_every,
            self.evaluate_every,
            self.keep_best,
        )

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step (0-based)."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.lr * warmup * decay[self.lr_decay]


@dataclass(frozen=True)
class PreviewConfig:
    """Previews: grids of samples drawn from the EMA weights during training.

    Args:
        every: steps between two previews; the last step always draws one.
        num_classes: number of classes drawn, at most.
        per_class: samples of each class.
        cfg: guidance scale; null is 4, or 1 without a trained null label, and for a solver that jumps.
        solver: ODE solver, or one that jumps, a name that `--solver` of sample/generate.py takes.
        num_steps: solver steps, or a list of numbers, of which each has its picture.
    """

    every: int = 10_000
    num_classes: int = 10
    per_class: int = 8
    cfg: float | None = None
    solver: str = "euler"
    num_steps: int | list[int] = 50

    @property
    def samplers(self) -> list[Sampler]:
        """The settings of each picture."""
        numbers = self.num_steps if isinstance(self.num_steps, list) else [self.num_steps]
        return [Sampler(cfg=self.cfg, solver=self.solver, steps=steps) for steps in numbers]

    def __post_init__(self):
        if SOLVERS.find(import_module_of(self.solver)).is_sde:
            others = [name for name, solver in SOLVERS.items() if not solver.is_sde]
            raise ValueError(f"preview.solver must be an ODE solver, such as {', '.join(others)}, not {self.solver}")
        for name in ("every", "num_classes", "per_class"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"preview.{name} must be at least 1, not {value}")
        numbers = self.num_steps if isinstance(self.num_steps, list) else [self.num_steps]
        if not numbers or min(numbers) < 1 or len({*numbers}) < len(numbers):
            raise ValueError(f"preview.num_steps must be at least 1, and different numbers, not {self.num_steps}")
        if self.cfg is not None and not math.isfinite(self.cfg):
            raise ValueError(f"preview.cfg must be finite, not {self.cfg}")


@dataclass(frozen=True)
class QualityConfig:
    """Samples and Frechet distance of `train.evaluate_every`: those of sample/generate.py and eval/fid.py.

    Args:
        num_samples: number of samples; the distance of fewer is larger, so compare equal numbers only.
        reference: what to compare with, as in eval/fid.py; null is data.images.
        image_size: crop the images of the reference to this side; null is the size of the training if the reference is
            data.images, and otherwise no crop.
        extractor: feature extractor, as in eval/fid.py.
        weights: file with the extractor's weights.
        cfg: guidance scale.
        solver: solver, a name that `--solver` of sample/generate.py takes.
        num_steps: solver steps.
        seed: seed of the samples; their labels are balanced.
        batch_size: images that are drawn together, and of which features are extracted together.
        features: folder that caches the reference's features; several runs may share it.
    """

    num_samples: int = 5000
    reference: str | None = None
    image_size: int | None = None
    extractor: str = "inception"
    weights: str | None = None
    cfg: float = 1.0
    solver: str = "heun"
    num_steps: int = 25
    seed: int = 0
    batch_size: int = 64
    features: str = "runs/features"

    def __post_init__(self):
        for name in ("num_samples", "num_steps", "batch_size"):
            if (value := getattr(self, name)) < 1 + (name == "num_samples"):
                raise ValueError(f"quality.{name} must be at least {1 + (name == 'num_samples')}, not {value}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"quality.cfg must be finite, not {self.cfg}")
        SOLVERS.find(import_module_of(self.solver))

    @property
    def sampler(self) -> Sampler:
        return Sampler(cfg=self.cfg, solver=self.solver, steps=self.num_steps)

    @property
    def forwards(self) -> int:
        """Forwards of the model for a sample; 100 steps are assumed of an adaptive solver."""
        evaluations = SOLVERS.find(self.solver).evaluations
        return (100 if evaluations is None else self.num_steps * evaluations) * (1 if self.cfg in (0.0, 1.0) else 2)


@dataclass(frozen=True)
class Config:
    """A complete, resolved configuration of a training run."""

    out: Path
    preset: str | None
    init_from: str | None
    dry_run: bool
    backbone: str | None  # class path of the model; None for SiT
    model: dict  # the model's options, without those that come from the data
    data: DataConfig
    flow: Objective
    auxiliary: AuxiliaryLoss | None  # not built yet; None if its options switch it off
    optimizer: tuple[type[torch.optim.Optimizer], dict]  # with arguments of the constructor
    train: TrainConfig
    preview: PreviewConfig
    quality: QualityConfig
    options: dict  # all options as plain nested values, the content of config.yaml

    @property
    def objective(self) -> dict | None:
        """Class path and arguments of the objective; None if path and prediction are enough to sample."""
        return self.options["flow"] if type(self.flow).is_needed_to_sample() else None

    @property
    def prediction(self) -> str:
        """Quantity that the model returned by `as_trained` predicts."""
        return "velocity" if self.objective else self.flow.prediction

    def snapshots_bytes(self, net: SiT) -> int:
        """Returns the bytes of all snapshots of the averages."""
        train = self.train
        itemsize = torch_dtype(train.snapshot_dtype).itemsize
        return snapshots_bytes(net, len(train.ema_decays), train.steps, train.snapshot_every, itemsize)

    def auxiliary_of(self, step: int) -> AuxiliaryLoss | None:
        """Returns the auxiliary loss of a step (0-based), or None if it has none."""
        return self.auxiliary if self.auxiliary is not None and self.auxiliary.is_active(step) else None

    def check_previews(self, net: SiT, null_label: int | None) -> None:
        """Raises ValueError if previews cannot be drawn; `null_label` is None if it is not trained."""
        traits = dict(two_times=bool(net.config.get("two_times")), trained_cfg=self.flow.trained_cfg)
        groups = {"preview": self.preview.samplers}
        if self.train.evaluate_every:
            groups["quality"] = [self.quality.sampler]
        for group, samplers in groups.items():
            try:
                for sampler in samplers:
                    sampler.check(self.flow.path, self.prediction, null_label, **traits)
            except ValueError as error:
                raise ValueError(f"{group}: {error} ({group}.cfg, flow.class_dropout_prob)") from error

    def data_rules(self) -> int | None:
        """Returns the version of the rules by which an existing run reads its images; None for a new run."""
        if not list_checkpoints(self.out):
            return None
        return self._saved_data().get("rules", 1)

    def _saved_data(self) -> dict:
        """Returns the description of the data that the run was started with, {} if it has none."""
        path = self.out / "data.json"
        return read_mapping(path) if path.exists() else {}

    def check_resumable(self, data: dict) -> None:
        """Raises ValueError if a run with checkpoints cannot resume with these options and data."""
        if not list_checkpoints(self.out):
            return
        if not (self.out / "config.yaml").exists():
            raise ValueError(
                f"{self.out} has checkpoints and no config.yaml, which tells how they were trained: "
                "put it back, or give another --out"
            )
        if changes := self.changes(self.out):
            raise ValueError(
                f"{self.out} was started with other options ({'; '.join(changes)}): "
                "resume with those, or give another --out"
            )
        then, data = {"rules": 1} | (self._saved_data() or data), {"rules": 1} | data
        if changes := differences(then, data):
            files = changed(then, data).keys() & {"files", "images", "index"}
            remedy = (
                "put back the files as they were (--data.skip_unreadable true leaves out damaged ones)"
                if files
                else "resume with those"
            )
            raise ValueError(
                f"{self.out} was started with other data ({'; '.join(changes)}): {remedy}, or start "
                f"another run from these weights, --init-from {self.out} --out NEW"
            )

    def save(self, folder: Path, data: dict | None = None) -> None:
        """Writes config.yaml, and data.json if a description of the data is given."""
        options = yaml.safe_dump(self.options, sort_keys=False)
        write_aside(folder / "config.yaml", options, durable=True)
        if data is not None:
            write_aside(folder / "data.json", json.dumps(data, indent=1), durable=True)

    def changes(self, folder: Path) -> list[str]:
        """Returns the options of the run in `folder` that must not change on resuming, as "name then -> now".

        Options that did not exist yet when the run started had their defaults.
        """
        then, now = read_mapping(folder / "config.yaml"), self.options
        known, defaults = flatten(then), _defaults()
        newer = [name for name, value in flatten(now).items() if name not in known and value == defaults.get(name)]
        return differences({**then, "flow": _flat_objective(then.get("flow", {}))}, now, MAY_CHANGE | {*newer})


class Parser(jsonargparse.ArgumentParser):
    """Parser of jsonargparse whose errors are a usage line and one message, printed by rank 0 only."""

    def error(self, message, ex=None):
        if not self.exit_on_error:  # for the options of a chosen class: the caller adds the group's name
            super().error(message, ex)
        if is_main_process():
            print(self.format_usage().strip(), file=sys.stderr)
        message = " ".join(str(message).split())
        of_class = re.search(r"""Parser key "(\w+)": (?:.* )?Problem with given class_path '([^']+)': (.*)""", message)
        if of_class:  # word the message as for every other option
            group, path, reason = of_class.groups()
            reason = re.sub(r"^Option '(\w+)' is not accepted", rf"{group}.\1 is no option of {path}", reason)
            message = re.sub(r'^Parser key "(\w+)"', rf"{group}.\1", reason)
        fail(message, code=2)


class ConfigAction(jsonargparse.ActionConfigFile):
    """Option `--config`, which takes a file or the name of a shipped configuration."""

    def __call__(self, parser, namespace, value, option_string=None):
        if ":" not in value:  # jsonargparse also takes YAML in place of a file's name
            try:
                value = str(find_config(value))
            except ValueError as error:
                parser.error(f"--config: {error}")
        super().__call__(parser, namespace, value, option_string)


def parse(argv: list[str] | None = None) -> Config:
    """Reads the command line and the YAML files that it names; without --config, configs/digits.yaml.

    Exits with an error for unknown options, wrong types and values out of range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not given(argv, "--config"):
        argv = ["--config", str(shipped_configs()["digits"]), *argv]
    argv = _import_modules(argv)
    with user_errors():
        chosen = {group: _chosen_class(argv, group) for group in CLASSES}
    parser = _make_parser(chosen)
    if {"--help", "-h"} & {*argv}:
        _make_parser(chosen, for_help=True).parse_args(["--help"])
    preset = parser.parse_args(argv).preset
    if preset is not None:  # parse again: YAML and command line override the preset
        with user_errors():
            parser.set_defaults({f"model.{name}": value for name, value in preset_config(preset).items()})
    namespace = parser.parse_args(argv)
    options = _plain(parser, namespace)
    if options["out"] is None:
        name = Path(given(argv, "--config")[-1]).stem
        options["out"] = f"runs/{name}" + (f"-{preset.lower().replace('/', '')}" if preset else "")
    with user_errors():
        mixer = options["model"]["mixer"]
        for name in [mixer] if isinstance(mixer, str) else mixer:
            import_module_of(name)
        options["train"]["precision"] = resolve_precision(options["train"]["precision"])
        values = parser.instantiate(parser.parse_object(options))
        optimizer = options["optimizer"]
        optimizer_class = _locate("optimizer", optimizer["class_path"])
        assert optimizer_class is not None  # the parser has checked it
        return Config(
            out=Path(options["out"]),
            preset=preset,
            init_from=namespace.init_from,
            dry_run=namespace.dry_run,
            backbone=chosen["backbone"],
            model=options["model"],
            data=values.data,
            flow=values.flow,
            auxiliary=values.auxiliary if values.auxiliary is not None and values.auxiliary.enabled else None,
            optimizer=(optimizer_class, optimizer.get("init_args", {})),
            train=values.train,
            preview=values.preview,
            quality=values.quality,
            options=options,
        )


def _import_modules(argv: list[str]) -> list[str]:
    """Imports the modules of --import and returns the other arguments."""
    rest, modules, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument.split("=")[0] != "--import":
            rest.append(argument)
        else:
            modules.append(argument.partition("=")[2] or next(arguments, ""))
    with user_errors():
        import_modules(modules)
    return rest


def _chosen_class(argv: list[str], group: str) -> str | None:
    """Returns the path of the class that command line or YAML choose for a group, or its default.

    The parser must know it in advance to refuse options that the class lacks, whatever the order of the arguments.
    """
    base, path = CLASSES[group]
    for i, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        value = value or "".join(argv[i + 1 : i + 2])
        if name == f"--{group}":
            path = value
        elif name == "--config":
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError):  # the parser reports them
                options = yaml.safe_load(find_config(value).read_text()).get(group) or {}
                path = options if isinstance(options, str) else options.get("class_path", path)
    if path in (None, "null"):
        return None
    if (kind := _locate(group, path)) is None:
        raise ValueError(f"--{group} {path} is not a subclass of {base.__name__}: give one as module.NAME")
    return f"{kind.__module__}.{kind.__qualname__}" if group == "backbone" else path


def _locate(group: str, path: str) -> type | None:
    """Returns the class of a path, or of the name of a known class, such as SGD; None if there is none."""
    known = [CLASSES[group][0]]
    for kind in known:
        known += kind.__subclasses__()
    if "." not in path:
        return next((kind for kind in known if kind.__name__ == path), None)
    module, _, name = import_module_of(path).rpartition(".")
    found = getattr(sys.modules[module], name, None)
    return found if isinstance(found, type) and issubclass(found, known[0]) else None


def _plain(parser: "Parser", namespace) -> dict:
    """Returns the options as plain nested values, without --dry-run, which is not saved."""
    options = yaml.safe_load(parser.dump(namespace, skip_none=False))
    del options["dry_run"]
    return {**options, "flow": _flat_objective(options["flow"])}


def _defaults() -> dict:
    """Returns the defaults of all options, flat."""
    parser = _make_parser({group: _chosen_class([], group) for group in CLASSES})
    return flatten(_plain(parser, parser.get_defaults()))


def _flat_objective(options: Mapping) -> Mapping:
    """Returns the options of the objective; those of FlowMatching without class path, as in older runs."""
    return options.get("init_args", {}) if options.get("class_path") == CLASSES["flow"][1] else options


def given(argv: list[str], option: str) -> list[str]:
    """Returns the values of an option on the command line, given as `--option VALUE` or `--option=VALUE`."""
    return [
        argument.partition("=")[2] or "".join(argv[i + 1 : i + 2])
        for i, argument in enumerate(argv)
        if argument.split("=")[0] == option
    ]


def resolve_precision(precision: str) -> str:
    """Replaces "auto" by a precision that is fast on this machine.

    Raises:
        ValueError: fp16 on a CPU, which accelerate would ignore.
    """
    if precision == "fp16" and on_cpu():
        raise ValueError("train.precision fp16 does not work on a CPU: use bf16 (or fp32)")
    if precision != "auto":
        return precision
    if on_cpu():
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # of newer versions of torch
        return "bf16" if capabilities.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _make_parser(chosen: Mapping[str, str | None], for_help: bool = False) -> Parser:
    """Builds the parser for the chosen classes; with `for_help`, its help shows their options."""
    parser = Parser(
        prog=command("train"),
        usage="%(prog)s [--config FILE] [--group.option VALUE ...]",
        description="Trains SiT with ATConv or attention by flow matching. Without --config it trains on the embedded "
        "digits. The same command resumes the run in --out from its newest checkpoint.",
    )
    parser.add_argument(
        "--config",
        action=ConfigAction,
        metavar="FILE",
        help="YAML file with any of the options below, or the name of a shipped one "
        f"({', '.join(configs_of('train'))}); options after it override it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the model's size and the memory, time and disk that the run needs, and exit",
    )
    parser.add_argument("--out", type=str | None, help="folder of the run (default: runs/CONFIG-PRESET)")
    parser.add_argument(
        "--preset",
        type=str | None,
        help="named architecture such as SiT-ATConv-XL/2; options of the group model override it",
    )
    parser.add_argument(
        "--init-from",
        type=str | None,
        help="initial weights: a run, an exported folder, a pipeline, a hub id or a file of published "
        "weights; tensors of other classes or mixers start from scratch and are listed",
    )
    if for_help:
        parser.add_argument(
            "--import", metavar="MODULE", help="import your own module, which registers parts; may be repeated"
        )
    parser.add_argument(
        "--backbone",
        type=str | None,
        help="class of the model, a subclass of SiT as module.NAME; the group model holds its options (default: SiT)",
    )
    backbone = _locate("backbone", chosen["backbone"] or "SiT")
    parser.add_class_arguments(backbone, "model", instantiate=False, skip=FROM_DATA)
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    for group in ("flow", "auxiliary", "optimizer"):
        options = dict(skip=NO_OPTIONS if group == "optimizer" else set(), fail_untyped=False)
        if (path := chosen[group]) and for_help:
            parser.add_class_arguments(_locate(group, path), group, instantiate=False, **options)
        else:
            parser.add_subclass_arguments(
                CLASSES[group][0],
                group,
                default=path and {"class_path": path},
                instantiate=group != "optimizer",
                **options,
            )
    parser.add_argument("--train", type=TrainConfig, default=TrainConfig())
    parser.add_argument("--preview", type=PreviewConfig, default=PreviewConfig())
    parser.add_argument("--quality", type=QualityConfig, default=QualityConfig())
    return parser


def read_mapping(path: Path) -> dict:
    """Reads a YAML or JSON file. Raises ValueError if it holds no mapping."""
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): fix it, or give another --out") from error
    return content
