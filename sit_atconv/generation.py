"""From weights to pictures: a batch of images, the preview of a training run, and whole folders of samples."""

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from sit_atconv.checkpointing.weights import Recipe, load_weights, versions
from sit_atconv.data.codecs import Codec, open_codec
from sit_atconv.data.pixels import UINT8_RULE, to_uint8
from sit_atconv.devices import keep_freed_memory, on_cpu, share_cores
from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.pictures import save_sample_grid
from sit_atconv.samples_folder import SamplesFolder
from sit_atconv.sampling import SampleStream, guided, sample_ode

if TYPE_CHECKING:
    from sit_atconv.config import PreviewConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.inference_mode()
def generate_images(
    model,
    codec: Codec,
    recipe: Recipe,
    noise: Tensor,
    y: Tensor,
    *,
    cfg: float = 4.0,
    channels: int | None = None,
    solver: str = "euler",
    num_steps: int = 50,
) -> Tensor:
    """Noise (B, C, h, w) and labels (B,) -> uint8 images (B, 3 or 1, H, W) on the CPU.

    `cfg` and `channels` are those of `guided`, `solver` and `num_steps` those of `sample_ode`.
    """
    interpolant = get_interpolant(recipe.interpolant)
    velocity = guided(as_velocity(model, interpolant, recipe.prediction), y, cfg=cfg, channels=channels)
    t0, t1 = interpolant.interval(recipe.prediction)
    times = t0 + (t1 - t0) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return to_uint8(codec.decode(sample_ode(velocity, noise, solver=solver, times=times))).cpu()


def draw_preview(model, codec: Codec, recipe: Recipe, preview: "PreviewConfig", path: Path) -> None:
    """Draws a labelled grid, from the same seed every time, so that the pictures of a run can be compared."""
    y = torch.arange(min(preview.num_classes, len(recipe.class_names))).repeat_interleave(preview.per_class)
    noise = SampleStream(0, range(len(y))).randn((codec.channels, *[model.config.input_size] * 2))
    options = dict(cfg=preview.cfg, solver=preview.solver, num_steps=preview.num_steps)
    images = torch.cat([
        generate_images(model, codec, recipe, z.to(model.device), labels.to(model.device), **options)
        for z, labels in zip(noise.split(16), y.split(16), strict=True)
    ])
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"step {recipe.step}, EMA weights, cfg {preview.cfg:g}, {preview.solver} {preview.num_steps}"
    save_sample_grid(pixels, y.tolist(), recipe.class_names, path, title, columns=preview.per_class)


@dataclass(frozen=True)
class GenerateOptions:
    """What to sample; the help of `sample/generate.py` says what each option means."""

    ckpt: str
    cfg: float = 4.0
    cfg_channels: int | None = None
    classes: tuple[int, ...] = ()
    labels: str = "random"
    num_samples: int = 100
    seed: int = 0
    solver: str = "euler"
    steps: int = 50
    ema: bool = True
    dtype: str = "fp32"
    batch_size: int = 64
    compile: bool = False
    out: str | None = None

    def settings(self) -> dict:
        """What the images depend on, beside the weights."""
        options = dataclasses.asdict(self) | {"classes": list(self.classes)}
        return {name: value for name, value in options.items() if name not in ("ckpt", "batch_size", "out")}

    def folder_name(self, step: int) -> str:
        """Names every setting, so that two never share a folder."""
        parts = [
            f"step{step:07d}" + ("" if self.ema else "-online"),
            f"cfg{self.cfg:g}" + (f"on{self.cfg_channels}" if self.cfg_channels else ""),
            f"{self.solver}{self.steps}",
            "classes" + "_".join(map(str, self.classes)) if self.classes else self.labels,
            f"seed{self.seed}",
            f"n{self.num_samples}",
            *([self.dtype] if self.dtype != "fp32" else []),
            *(["compiled"] if self.compile else []),
        ]
        return "-".join(parts)

    def draw_labels(self, stream: SampleStream, num_classes: int) -> Tensor:
        """(B,)"""
        if self.classes:
            return torch.tensor([self.classes[i % len(self.classes)] for i in stream.indices])
        return stream.labels(num_classes, self.labels)


def generate_samples(options: GenerateOptions) -> tuple[SamplesFolder, dict]:
    """Draws what is missing of the samples asked for, on all processes together, and writes them down.

    Sample i is a function of (seed, i) and the settings. So a folder that a kill left half full is completed by the
    same call, and neither the number of processes nor the batch size changes an image (but for the last bits of
    arithmetic, and for dopri5, which chooses its steps for the batch).

    Returns:
        The folder and its manifest.

    Raises:
        ValueError: weights or codec that cannot be loaded, labels out of range, guidance without a null label, or a
            folder that holds something else.
    """
    weights = load_weights(options.ckpt, options.ema)
    model, recipe = weights.model, weights.recipe
    num_classes, size = model.config.num_classes, model.config.input_size
    for label in options.classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is out of range: the model knows 0 ... {num_classes - 1}")
    guided(model, torch.zeros(1, dtype=torch.int64), cfg=options.cfg)  # raises if the model cannot be guided
    codec = open_codec(recipe.codec)
    folder = SamplesFolder(options.out or Path(weights.home, "samples", options.folder_name(recipe.step)))
    settings = options.settings() | {"weights": weights.identity(), "codec": recipe.codec, "uint8_rule": UINT8_RULE}
    folder.check(settings)
    if (manifest := folder.read_manifest()).get("complete"):
        return folder, manifest

    state = PartialState(cpu=on_cpu())
    if state.device.type == "cpu":
        share_cores()
        keep_freed_memory()
    if state.is_main_process:
        folder.begin(settings)
    state.wait_for_everyone()
    missing = folder.missing(options.num_samples)
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    torch.nn.Module.to(model, state.device, DTYPES[options.dtype])  # diffusers' own warns of casting no module at all
    codec = codec.to(state.device)
    if options.compile:
        model = torch.compile(model)

    clock = time.perf_counter()
    with tqdm(total=len(mine), unit="image", disable=not state.is_main_process) as progress:
        for start in range(0, len(mine), options.batch_size):
            stream = SampleStream(options.seed, mine[start : start + options.batch_size])
            noise = stream.randn((codec.channels, size, size), state.device)
            y = options.draw_labels(stream, num_classes).to(state.device)
            images = generate_images(
                model, codec, recipe, noise, y,
                cfg=options.cfg, channels=options.cfg_channels, solver=options.solver, num_steps=options.steps,
            )
            for index, image in zip(stream.indices, images, strict=True):
                folder.write_image(index, image)
            progress.update(len(images))
    state.wait_for_everyone()
    seconds = time.perf_counter() - clock

    if state.is_main_process:
        y = options.draw_labels(SampleStream(options.seed, range(options.num_samples)), num_classes).tolist()
        folder.write_npz(options.num_samples)
        _draw_grid(folder, y, recipe, options)
        manifest = {
            "complete": True,
            "settings": settings,
            "ckpt": options.ckpt,
            "step": recipe.step,
            "images_per_second": len(missing) / seconds,
            "processes": state.num_processes,
            "device": state.device.type,
            "versions": versions(),
            "labels": y,
        }
        folder.write_manifest(manifest)
    state.wait_for_everyone()
    return folder, manifest


def _draw_grid(folder: SamplesFolder, y: list[int], recipe: Recipe, options: GenerateOptions, side: int = 10) -> None:
    """The first `side` samples of the `side` most frequent classes."""
    classes = [label for label, _ in Counter(y).most_common(side)]
    shown = [i for label in sorted(classes) for i in [j for j, other in enumerate(y) if other == label][:side]]
    images = [folder.read_image(i) for i in shown]
    title = f"step {recipe.step}, cfg {options.cfg:g}, {options.solver} {options.steps}, seed {options.seed}"
    save_sample_grid(images, [y[i] for i in shown], recipe.class_names, folder.grid, title, columns=side)
