"""From weights to a folder of samples, on several processes, after any kill."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from sit_atconv.checkpointing.weights import Weights, load_weights, versions
from sit_atconv.class_labels import class_label, read_labels
from sit_atconv.data.codecs import Codec, open_codec
from sit_atconv.data.pixels import UINT8_RULE, to_uint8
from sit_atconv.devices import on_cpu, prepare_device
from sit_atconv.files import exclusive, sha256_of
from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.pictures import save_sample_grid
from sit_atconv.samples_folder import SamplesFolder
from sit_atconv.sampling import Counted, Sampler, SampleStream, default_solver

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODED_AT_ONCE = 16  # images: a decoder needs much memory for each
WRITERS = 4  # threads that write images while the next are drawn


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampler):
    """What to sample; the help of `sample/generate.py` says what each option means."""

    ckpt: str
    solver: str | None = None
    steps: int = 25
    model: str | None = None
    vae: str | None = None
    ema: bool | float = True
    weak: str | None = None
    classes: tuple[int | str, ...] = ()
    labels: str = "random"
    num_samples: int = 100
    seed: int = 0
    size: tuple[int, ...] = ()
    dtype: str = "fp32"
    batch_size: int = 64
    compile: bool = False
    latents: bool = False
    npz: bool = True
    out: str | None = None

    def settings(self) -> dict:
        """What the images depend on, beside weights, codec and labels."""
        elsewhere = ("ckpt", "vae", "weak", "classes", "labels", "batch_size", "latents", "npz", "out")
        return {name: value for name, value in _plain(dataclasses.asdict(self)).items() if name not in elsewhere}

    def folder_name(self, step: int, labels: str, weak: Weights | None) -> str:
        """Names every setting, so that two never share a folder."""
        sde = [self.diffusion_form, f"{self.diffusion_norm:g}", self.last_step, f"{self.last_step_size:g}"]
        parts = [
            f"step{step:07d}" + {True: "", False: "-online"}.get(self.ema, f"-ema{self.ema:g}"),
            f"cfg{self.cfg:g}" + (f"on{self.cfg_channels}" if self.cfg_channels else ""),
            *([self.cfg_schedule] if self.cfg_schedule != "constant" else []),
            *(["{:g}to{:g}".format(*self.interval)] if self.interval != (0.0, 1.0) else []),
            *([f"weak{weak.identity()[:8]}"] if weak else []),
            self.solver + ("_".join(f"{t:g}" for t in self.times) or str(self.steps)),
            *([f"shift{self.shift:g}"] if self.shift != 1 else []),
            *(sde if self.is_sde else []),
            labels,
            f"seed{self.seed}",
            f"n{self.num_samples}",
            *(["x".join(map(str, self.size))] if self.size else []),
            *([self.dtype] if self.dtype != "fp32" else []),
            *(["compiled"] if self.compile else []),
        ]
        return "-".join(part if len(part) < 40 else hashlib.sha256(part.encode()).hexdigest()[:12] for part in parts)


@dataclass(frozen=True)
class _Job:
    """What is to be sampled, all of it checked.

    Args:
        given: labels in turn; empty where the stream draws them.
        shape: (C, h, w) of the noise.
        settings: what the images depend on.
    """

    options: GenerateOptions
    weights: Weights
    weak: Weights | None
    codec: Codec
    given: list[int]
    shape: tuple[int, int, int]
    settings: dict
    folder: SamplesFolder

    def labels(self, stream: SampleStream) -> Tensor:
        """(B,)"""
        if self.given:
            return torch.tensor([self.given[i % len(self.given)] for i in stream.indices])
        return stream.labels(self.weights.model.config.num_classes, self.options.labels)

    @cached_property
    def all_labels(self) -> list[int]:
        """Of samples 0, 1, ..."""
        return self.labels(SampleStream(self.options.seed, range(self.options.num_samples))).tolist()


def generate_samples(options: GenerateOptions) -> tuple[SamplesFolder, dict]:
    """Draws what is missing of the samples asked for, on all processes together, and writes them down.

    Sample i is a function of (seed, i) and the settings. So a folder that a kill left half full is completed by the
    same call, and neither the number of processes nor the batch size changes an image (but for the last bits of
    arithmetic, and for dopri5, which chooses its steps for the batch).

    Returns:
        The folder and its manifest; {} on processes other than the main one.

    Raises:
        ValueError: weights or codec that cannot be loaded, settings that do not suit them, labels out of range, a
            folder that holds something else, or a disk too small.
        OSError: the folder cannot be written to.
    """
    job = _prepare(options)
    options = job.options
    folder, manifest = job.folder, job.folder.read_manifest()
    missing = folder.missing(options.num_samples, options.latents)
    if manifest.get("complete") and not missing and (folder.npz.exists() or not options.npz):
        return folder, manifest

    state = PartialState(cpu=on_cpu())
    prepare_device(state.device, tf32=options.dtype == "tf32")
    with contextlib.ExitStack() as to_release:
        if state.is_main_process:
            to_release.enter_context(exclusive(folder.folder))
            folder.begin(job.settings, options.latents)
        state.wait_for_everyone()
        missing = folder.missing(options.num_samples, options.latents)
        state.wait_for_everyone()
        speed = _draw(job, missing[state.process_index :: state.num_processes], state)
        state.wait_for_everyone()
        if not state.is_main_process:
            return folder, {}
        manifest = {
            "settings": job.settings,
            "ckpt": options.ckpt,
            "step": job.weights.recipe.step,
            **(speed or {name: manifest.get(name) for name in SPEED}),
            "processes": state.num_processes,
            "device": state.device.type,
            "versions": versions(),
            "labels": job.all_labels,
        }
        folder.write_manifest({"complete": False, **manifest})
        if options.npz:
            folder.write_npz(options.num_samples)
        _draw_grid(job)
        folder.write_manifest({"complete": True, **manifest})
        return folder, manifest


SPEED = ("images_per_second", "evaluations", "forwards")


def _draw(job: _Job, mine: list[int], state: PartialState) -> dict:
    """Draws and writes the samples `mine`. Returns SPEED, {} where there was nothing to do: the rate of all processes,
    and for each image how often the velocity and how often a network was evaluated."""
    options, recipe, device = job.options, job.weights.recipe, state.device
    model, weak = (_ready(weights, device, options) for weights in (job.weights, job.weak))
    codec = job.codec.to(device)
    weak_path = (get_interpolant(recipe.interpolant), job.weak.recipe.prediction) if job.weak else ()
    evaluations = forwards = 0
    writing = []
    clock = time.perf_counter()
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(WRITERS) as pool,
        tqdm(total=len(mine), unit="image", disable=not state.is_main_process) as progress,
    ):
        for start in range(0, len(mine), options.batch_size):
            stream = SampleStream(options.seed, mine[start : start + options.batch_size])
            noise, y = stream.randn(job.shape, device), job.labels(stream).to(device)
            counted, weak_counted = Counted(model), Counted(weak)
            z = options(
                counted, noise, y, path=recipe.interpolant, prediction=recipe.prediction,
                weak=as_velocity(weak_counted, *weak_path) if weak else None, randn=stream.randn_like,
            )
            images = torch.cat([to_uint8(codec.decode(part)) for part in z.split(DECODED_AT_ONCE)]).cpu()
            evaluations += counted.evaluations * len(y)
            forwards += counted.samples + weak_counted.samples
            for written in writing:
                written.result()  # raises what the writer met; one batch at most waits for the disk
            latents = z.cpu() if options.latents else [None] * len(y)
            samples = zip(stream.indices, images, latents, strict=True)
            writing = [pool.submit(job.folder.write_sample, *sample) for sample in samples]
            progress.update(len(y))
        for written in writing:
            written.result()
    if not mine:
        return {}
    rate = len(mine) * state.num_processes / (time.perf_counter() - clock)
    return dict(zip(SPEED, (rate, evaluations / len(mine), forwards / len(mine)), strict=True))


def _ready(weights: Weights | None, device: torch.device, options: GenerateOptions):
    if weights is None:
        return None
    torch.nn.Module.to(weights.model, device, DTYPES[options.dtype])  # diffusers' own warns of casting no module at all
    return torch.compile(weights.model) if options.compile else weights.model


def _prepare(options: GenerateOptions) -> _Job:
    weights = load_weights(options.ckpt, options.ema, model=options.model, vae=options.vae)
    recipe, config = weights.recipe, weights.model.config
    options = dataclasses.replace(options, solver=options.solver or default_solver(recipe.interpolant))
    weak = load_weights(options.weak) if options.weak else None
    if weak:
        _check_weak(weak, weights)
    options.check(recipe.interpolant, recipe.prediction, weights.model.null_label, bool(weak))
    codec = open_codec(recipe.codec, precision="fp32" if options.dtype == "fp32" else "tf32")
    given, labels = _given_labels(options, recipe.class_names)
    shape = (codec.channels, *_latent_size(options, codec, config))
    settings = options.settings() | {
        "labels": labels, "weights": weights.identity(), "weak": weak.identity() if weak else None,
        "codec": codec.identity(), "uint8_rule": UINT8_RULE,
    }
    home = Path(weights.home, "samples", options.folder_name(recipe.step, labels, weak))
    folder = SamplesFolder(options.out or home)
    folder.check(settings)
    image_shape = (shape[1] * codec.downsample, shape[2] * codec.downsample, 3)
    folder.check_room(
        len(folder.missing(options.num_samples, options.latents)),
        options.num_samples if options.npz and not folder.npz.exists() else 0,
        image_shape, 4 * math.prod(shape) if options.latents else 0,
    )
    return _Job(options, weights, weak, codec, given, shape, settings, folder)


def _check_weak(weak: Weights, weights: Weights) -> None:
    """Raises ValueError where a weaker model cannot guide: it lives on another path, in other latents or classes."""
    here, there = (
        {"interpolant": w.recipe.interpolant, "classes": w.model.config.num_classes,
         "channels": w.model.config.in_channels,
         "codec": {key: value for key, value in w.recipe.codec.items() if key != "source"}}
        for w in (weights, weak)
    )
    for name, value in here.items():
        if there[name] != value:
            raise ValueError(f"the weak model has {name} {there[name]}, and the model {value}: autoguidance takes a "
                             "smaller or less trained model of the same kind")


def _given_labels(options: GenerateOptions, class_names: list[str]) -> tuple[list[int], str]:
    """Labels in turn, or [] for the stream's, and what to call them."""
    if options.classes:
        labels = [class_label(given, class_names) for given in options.classes]
        return labels, "classes" + "_".join(map(str, labels))
    if options.labels in ("random", "balanced"):
        return [], options.labels
    labels = read_labels(Path(options.labels), class_names)
    if len(labels) < options.num_samples:
        raise ValueError(f"{options.labels} has {len(labels)} labels, and --num-samples is {options.num_samples}: "
                         "give as many")
    return labels, "labels" + sha256_of(Path(options.labels))[:12]


def _latent_size(options: GenerateOptions, codec: Codec, config) -> tuple[int, int]:
    if not options.size:
        return config.input_size, config.input_size
    if len(options.size) > 2:
        raise ValueError(f"size takes one side or two, not {len(options.size)}")
    unit = codec.downsample * config.patch_size
    for side in options.size:
        if side % unit:
            raise ValueError(f"size {side} is not divisible by {unit}, a patch of {config.patch_size} on latents "
                             f"{codec.downsample} times smaller: take {side // unit * unit or unit}")
    height, width = options.size if len(options.size) == 2 else options.size * 2
    return height // codec.downsample, width // codec.downsample


def _plain(value):
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def _draw_grid(job: _Job, side: int = 10) -> None:
    """The first `side` samples of the `side` most frequent classes."""
    y, options, recipe = job.all_labels, job.options, job.weights.recipe
    classes = [label for label, _ in Counter(y).most_common(side)]
    shown = [i for label in sorted(classes) for i in [j for j, other in enumerate(y) if other == label][:side]]
    images = [job.folder.read_image(i) for i in shown]
    title = f"step {recipe.step}, cfg {options.cfg:g}, {options.solver} {options.steps}, seed {options.seed}"
    save_sample_grid(images, [y[i] for i in shown], recipe.class_names, job.folder.grid, title, columns=side)
