"""Typed configuration of a classifier's training, read from YAML and the command line and checked."""

import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from timm.data import create_transform

from sit_atconv.checkpoints.run_folder import list_checkpoints
from sit_atconv.classification.loading import Transform
from sit_atconv.runtime.commands import user_errors
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.installation import command, configs_of, shipped_configs
from sit_atconv.runtime.settings import differences
from sit_atconv.training.config import ConfigAction, Parser, given, read_mapping, resolve_precision

# Options that may change when a run is resumed. (Data may have moved: data.json tells whether they are the same.)
MAY_CHANGE = {
    "out",
    "data.train",
    "data.val",
    "data.num_workers",
    "train.epochs",
    "train.steps",
    "train.accumulation",
    "train.compile",
    "train.cpu_threads",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
}


@dataclass(frozen=True)
class DataConfig:
    """Options of images and their augmentation.

    Args:
        train: images to train on: a folder with one subfolder for each class, wds/FOLDER (webdataset shards),
            hfds/OWNER/NAME[:SPLIT] (a Hugging Face data set); null is scikit-learn's digits, and every fifth held out.
        val: images to evaluate on, of the same classes; required with data.train.
        channels: 3 for colour, 1 for grey images.
        image_size: side of the images that the model sees, in pixels.
        mean: mean by which each channel is normalised, for pixels in [0, 1]; null is the model's own, 0.5 for grey.
        std: standard deviation likewise.
        interpolation: interpolation of all resizing.
        crop_ratio: side of the centre crop of evaluation, as a share of the image's shorter side.
        scale: smallest and largest share of an image's area that a random crop covers.
        flip: probability of a horizontal flip.
        randaugment: RandAugment or AutoAugment in timm's notation, such as rand-m9-mstd0.5-inc1; null is none.
        erasing: probability of random erasing, one rectangle of random pixels.
        mixup: alpha of Mixup; 0 is none.
        cutmix: alpha of CutMix; 0 is none.
        mix_prob: probability that a group of train.norm_batch images is mixed.
        switch_prob: probability of CutMix where both are on.
        smoothing: label smoothing.
        repeats: draws of each image in a row (repeated augmentation); an epoch then sees 1 / repeats of the images.
        num_workers: processes that read images ahead, for each process of training.
    """

    train: str | None = None
    val: str | None = None
    channels: Literal[1, 3] = 3
    image_size: int = 224
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    crop_ratio: float = 0.875
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    randaugment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1
    repeats: int = 1
    num_workers: int = 4

    def __post_init__(self):
        if self.train is not None and self.val is None:
            raise ValueError("there are images to train on, and none to evaluate on: give --data.val, too")
        for name, smallest in (("image_size", 1), ("repeats", 1), ("num_workers", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"data.{name} must be at least {smallest}, not {getattr(self, name)}")
        for name in ("flip", "erasing", "mix_prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be a probability in [0, 1], not {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"data.{name} must be finite and not negative, not {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"data.smoothing must be in [0, 1), not {self.smoothing}")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"data.crop_ratio must be in (0, 1], not {self.crop_ratio}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale must be two shares in (0, 1], the smaller first, not {self.scale}")
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None and len(values) != self.channels:
                raise ValueError(
                    f"data.{name} has {len(values)} numbers, and the images have {self.channels} channels: give one "
                    "number for each"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std must be positive, not {self.std}")

    def normalisation(self, model_config: dict) -> dict[str, list[float]]:
        """Returns mean and standard deviation of each channel; `model_config` has those of the model."""
        usual = {1: {"mean": [0.5], "std": [0.5]}, 3: model_config}[self.channels]
        return {name: getattr(self, name) or [*usual[name]] for name in ("mean", "std")}

    def training_transform(self, normalisation: dict) -> Transform:
        """Returns the random augmentation of one image. ValueError: `randaugment` is not timm's notation."""
        try:
            return create_transform(
                self.image_size,
                is_training=True,
                interpolation=self.interpolation,
                scale=self.scale,
                hflip=self.flip,
                color_jitter=None,
                auto_augment=self.randaugment,
                re_prob=self.erasing,
                re_mode="pixel",
                **normalisation,
            )
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"data.randaugment {self.randaugment} is not timm's notation: give one like rand-m9-mstd0.5-inc1"
            ) from error

    def evaluation_transform(self, normalisation: dict) -> Transform:
        """Returns resizing and centre crop of one image."""
        return create_transform(
            self.image_size, crop_pct=self.crop_ratio, interpolation=self.interpolation, **normalisation
        )


@dataclass(frozen=True)
class TrainConfig:
    """Options of optimisation, checkpoints and logging.

    Args:
        batch_size: images in one optimizer step, over all processes and micro-batches.
        accumulation: micro-batches in one optimizer step.
        norm_batch: images over which BatchNorm normalises and within which images are mixed; null is the smaller of
            256 and batch_size. Every micro-batch must hold whole groups.
        epochs: passes over the training images.
        steps: number of optimizer steps, in place of epochs.
        lr: learning rate after the warm-up; it then follows a cosine.
        warmup_epochs: epochs over which the learning rate rises linearly.
        warmup_lr: learning rate of the first step of the warm-up.
        min_lr: learning rate that the cosine ends at.
        weight_decay: decoupled weight decay of matrices and kernels; vectors (biases, norms, scales) have none.
        max_grad_norm: clip the gradient to this norm; no clipping if null.
        ema_decay: decay of the exponential moving average (EMA) of weights and running statistics, which rises to this
            value as (1 + step) / (10 + step).
        precision: precision of the forward and backward pass; weights stay in fp32. "auto" is bf16 where the device
            computes it fast, else fp32.
        seed: random seed of initialisation, data order, augmentation, mixing and stochastic depth.
        compile: compile the model with torch.compile.
        cpu_threads: threads of each process on a CPU; null shares the cores among the processes.
        log_every: steps between two lines of stats.jsonl.
        eval_every: steps between two evaluations on data.val; the last step always evaluates.
        checkpoint_every: steps between two checkpoints; the last step always saves one.
        keep_checkpoints: number of newest checkpoints to keep.
    """

    batch_size: int = 4096
    accumulation: int = 1
    norm_batch: int | None = None
    epochs: int = 300
    steps: int | None = None
    lr: float = 4e-3
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    max_grad_norm: float | None = None
    ema_decay: float = 0.99995
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    compile: bool = False
    cpu_threads: int | None = None
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self):
        for name in (
            "batch_size",
            "accumulation",
            "norm_batch",
            "epochs",
            "steps",
            "cpu_threads",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, not {value}")
        for name in ("seed", "lr", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be finite and not negative, not {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"train.max_grad_norm must be positive, not {self.max_grad_norm}; null switches it off")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must be in [0, 1), not {self.ema_decay}")

    @property
    def group_size(self) -> int:
        """Images over which BatchNorm normalises."""
        return self.norm_batch or min(256, self.batch_size)

    def groups_in(self, micro_batch: int, num_processes: int) -> int:
        """Returns the number of groups in a micro-batch. ValueError: they are not whole."""
        if micro_batch % self.group_size:
            raise ValueError(
                f"train.batch_size {self.batch_size} over {num_processes} processes and {self.accumulation} "
                f"micro-batches makes {micro_batch} images each, which are no whole groups of train.norm_batch "
                f"{self.group_size}: lower train.accumulation, or give a --train.norm_batch that divides {micro_batch}"
            )
        return micro_batch // self.group_size


@dataclass(frozen=True)
class Schedule:
    """Length of a run and its learning rate, in steps: linear warm-up, then timm's cosine."""

    steps: int
    warmup_steps: int
    lr: float
    warmup_lr: float
    min_lr: float

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step (0-based)."""
        if step < self.warmup_steps:
            return self.warmup_lr + step * (self.lr - self.warmup_lr) / self.warmup_steps
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Config:
    """A complete, resolved configuration."""

    out: Path
    model: str
    drop_path_rate: float
    init_from: str | None
    reset_head: bool
    dry_run: bool
    eval_only: bool
    data: DataConfig
    train: TrainConfig
    options: dict  # all options as plain nested values, the content of config.yaml

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """Returns the schedule. ValueError: the run would end within its warm-up."""
        train = self.train
        steps = train.steps or train.epochs * steps_per_epoch
        warmup_steps = round(train.warmup_epochs * steps_per_epoch)
        if warmup_steps >= steps:
            raise ValueError(
                f"train.warmup_epochs {train.warmup_epochs:g} makes {warmup_steps} steps of warm-up, and the run has "
                f"{steps}: lower it, or train for longer"
            )
        return Schedule(steps, warmup_steps, train.lr, train.warmup_lr, train.min_lr)

    def evaluation_command(self) -> str:
        """Returns the command that evaluates the run."""
        return f"{command('classify')} --config {shlex.quote(str(self.out / 'config.yaml'))} --eval-only"

    def check_resumable(self, data: dict) -> None:
        """Raises ValueError if a run with checkpoints cannot resume with these options and data."""
        if not list_checkpoints(self.out):
            return
        for file, now, what in (("config.yaml", self.options, "options"), ("data.json", data, "data")):
            if not (self.out / file).exists():
                raise ValueError(f"{self.out} has checkpoints and no {file}: put it back, or give another --out")
            if changes := differences(read_mapping(self.out / file), now, MAY_CHANGE):
                raise ValueError(
                    f"{self.out} was started with other {what} ({'; '.join(changes)}): resume with those, or give "
                    "another --out"
                )

    def save(self, data: dict) -> None:
        """Writes config.yaml, and data.json with the description of the data."""
        write_aside(self.out / "config.yaml", yaml.safe_dump(self.options, sort_keys=False), durable=True)
        write_aside(self.out / "data.json", json.dumps(data, indent=1), durable=True)


def parse(argv: list[str] | None = None) -> Config:
    """Reads the command line and YAML; without --config and images, configs/attnet-digits.yaml.

    Exits with an error for unknown options, wrong types and values out of range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not any(given(argv, option) for option in ("--config", "--data.train", "--data.val")):
        argv = ["--config", str(shipped_configs()["attnet-digits"]), *argv]
    parser = _make_parser()
    namespace = parser.parse_args(argv)
    options = yaml.safe_load(parser.dump(namespace, skip_none=False))
    for name in ("dry_run", "eval_only"):
        del options[name]
    if options["out"] is None:
        configs = given(argv, "--config")
        options["out"] = f"runs/{Path(configs[-1]).stem if configs else options['model']}"
    with user_errors():
        options["train"]["precision"] = resolve_precision(options["train"]["precision"])
        if not 0 <= namespace.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), not {namespace.drop_path_rate}")
        values = parser.instantiate(parser.parse_object(options))
        return Config(
            out=Path(options["out"]),
            model=namespace.model,
            drop_path_rate=namespace.drop_path_rate,
            init_from=namespace.init_from,
            reset_head=namespace.reset_head,
            dry_run=namespace.dry_run,
            eval_only=namespace.eval_only,
            data=values.data,
            train=values.train,
            options=options,
        )


def _make_parser() -> Parser:
    parser = Parser(
        prog=command("classify"),
        usage="%(prog)s [--config FILE] [--data.train DIR --data.val DIR] [--group.option VALUE ...]",
        description="Trains AttNet, or any model of timm, to classify images. Without --config and --data.train it "
        "trains on the embedded digits. The same command resumes the run in --out from its newest checkpoint.",
    )
    parser.add_argument(
        "--config",
        action=ConfigAction,
        metavar="FILE",
        help="YAML file with any of the options below, or the name of a shipped one "
        f"({', '.join(configs_of('classify'))}); options after it override it",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the run's size, and exit")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the newest checkpoint in --out, or the weights of --init-from, and write a JSON record",
    )
    parser.add_argument("--out", type=str | None, help="folder of the run (default: runs/CONFIG)")
    parser.add_argument("--model", type=str, default="attnet_xxs", help="name of a model of timm, or of AttNet")
    parser.add_argument("--drop-path-rate", type=float, default=0.0, help="stochastic depth of the last block")
    parser.add_argument(
        "--init-from",
        type=str | None,
        help="initial weights: a run, a folder that timm saved, or a file of weights, AttNet's official ones included",
    )
    parser.add_argument(
        "--reset-head",
        type=bool,
        default=False,
        help="leave out the classifier of --init-from, to train on other classes",
    )
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    parser.add_argument("--train", type=TrainConfig, default=TrainConfig())
    return parser
