"""The model as a diffusers pipeline, with the schedulers, offloading and hub access of diffusers."""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard, snapshot_download
from PIL.Image import Image
from torch import Tensor

from sit_atconv.checkpoints.exported import Weights, load_pipeline
from sit_atconv.data.codecs import Codec, DCCodec, IdentityCodec, VAECodec, open_codec
from sit_atconv.data.pixels import to_pil, to_uint8
from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.generation.labels import class_label
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.files import hub_options, write_folder_aside
from sit_atconv.sampling import guided, time_grid
from sit_atconv.sampling.guidance import check_guidance, default_cfg

README = "README.md"
GENERIC_CARD = "More Information Needed"  # words of the card that diffusers writes
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class SiTPipeline(DiffusionPipeline):
    """Pipeline from class labels to images, with any flow scheduler of diffusers.

    Schedulers go from sigma = 1 (noise) to sigma = 0 (data) with velocity noise - data: t = 1 - sigma, and the sign of
    our velocity changes. A model with two times (MeanFlow) jumps from step to step with the scheduler FlowMatchEuler,
    and is a flow model with all others.

    Args:
        transformer: the model.
        scheduler: FlowMatchEuler, FlowMatchHeun, or another one with flow sigmas, such as UniPC and DPM++.
        vae: the VAE that decodes the latents; None in pixel space.
        prediction: meaning of the model's output: "velocity", "noise", "score" or "data".
        interpolant: the interpolant of its training; only "linear" is supported.
        id2label: class names by label, {"0": "tench", ...}. (diffusers would take a list for a component.)
        step, ema_decay, null_label_trained, ema_known: as in `Recipe`, which is restored from them; None if not known.
        empty_classes: as in `Recipe`, in the form of `id2label`.
        trained_cfg: as in `Recipe`.

    Raises:
        ValueError: another interpolant than linear, or a scheduler that is not set up for flows.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    _guidance_scale: float
    _home: Path | None = None  # the folder that it was loaded from

    def __init__(
        self,
        transformer: SiT,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        prediction: str = "velocity",
        interpolant: str = "linear",
        id2label: dict[str, str] | None = None,
        step: int | None = None,
        ema_decay: float | None = None,
        null_label_trained: bool | None = None,
        empty_classes: dict[str, str] | None = None,
        ema_known: bool = False,
        trained_cfg: float = 1.0,
    ):
        super().__init__()
        if interpolant != "linear":
            raise ValueError(
                "the schedulers of diffusers support only the linear interpolant, but the model was "
                f"trained on {interpolant!r}: sample it with sample/generate.py"
            )
        check_scheduler(scheduler)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            prediction=prediction,
            interpolant=interpolant,
            id2label=id2label,
            step=step,
            ema_decay=ema_decay,
            null_label_trained=null_label_trained,
            empty_classes=empty_classes,
            ema_known=ema_known,
            trained_cfg=trained_cfg,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> "SiTPipeline":
        """Loads a pipeline as diffusers does, and remembers its folder wherever the program changes to."""
        home = Path(pretrained_model_name_or_path).resolve()
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **options)
        pipeline._home = home if home.is_dir() else None
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **options) -> str:
        """Downloads a pipeline and returns its folder; the method of diffusers refuses our model class."""
        is_local = hub_options(pretrained_model_name)["local_files_only"] or options.get("local_files_only")
        return snapshot_download(
            pretrained_model_name,
            revision=options.get("revision"),
            cache_dir=options.get("cache_dir"),
            token=options.get("token"),
            force_download=bool(options.get("force_download")),
            local_files_only=bool(is_local),
            allow_patterns=["*.json", "*.safetensors"],
        )

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, **options):
        """Puts the card into the folder before diffusers uploads it.

        It is the one that the repository has already, else README.md beside the pipeline, else one made of the weights.
        """
        from sit_atconv.studies.model_card import model_card, renamed

        target = Path(working_dir, README)
        home = self._home or Path(self.config.get("_name_or_path") or working_dir)  # DiffusionPipeline loaded it
        there = ModelCard(target.read_text()).text.strip() if target.exists() else ""
        if not there or GENERIC_CARD in there:
            if home != Path(working_dir) and (home / README).is_file():
                target.write_text(renamed((home / README).read_text(), home.name, repo_id))
            else:
                target.write_text(model_card(load_pipeline(Path(working_dir)), repo_id))
        return super()._upload_folder(working_dir, repo_id, **options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draws images of the given classes.

        Args:
            class_labels: one class or several, each a label (int) or a class name (str).
            guidance_scale: scale of classifier-free guidance; 1 is off. None is 4, but 1 without a trained null label,
                for jumps, and for weights that have learned guidance, where other scales are an error.
            num_inference_steps: steps of the scheduler: uniform in t if it takes sigmas, else on its own grid. None is
                50, or 1 for jumps.
            generator: random generator of the noise: one for all images or one for each.
            guidance_interval: (lo, hi), guidance is on where lo <= t < hi.
            height, width: size of the images in pixels; None is the size of the training images.
            latents: initial noise (B, C, h, w), instead of a generator.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent" (B, C, h, w) not decoded.
            return_dict: True returns an `ImagePipelineOutput`, False a tuple.
            callback_on_step_end: called after each step as (pipeline, step, timestep, tensors), as in all pipelines of
                diffusers. It may return other tensors, set `_guidance_scale`, or set `_interrupt` to skip the remaining
                steps.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback; only "latents" is possible.

        Raises:
            ValueError: unknown labels, sizes that do not fit, guidance that is not possible (`check_guidance`), or a
                scheduler that is not set up for flows.
        """
        check_scheduler(self.scheduler)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := sorted({*callback_on_step_end_tensor_inputs} - {*self._callback_tensor_inputs}):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can be {self._callback_tensor_inputs}, not {unknown[0]!r}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, not {output_type!r}")
        device = self._execution_device
        y = torch.tensor(self.label_ids(class_labels), device=device)
        x = self._noise((len(y), *self._latent_shape(height, width)), generator, latents, device)
        interpolant, prediction = get_interpolant(self.config.interpolant), self.config.prediction
        model = as_velocity(self.transformer, interpolant, prediction)
        null_label = None if self.config.null_label_trained is False else self.transformer.null_label
        jumps = self.jumps
        is_asked = guidance_interval != (0.0, 1.0)
        scale = guidance_scale
        if scale is None:
            is_off = (jumps or self.config.trained_cfg != 1) and not is_asked
            scale = 1.0 if is_off else default_cfg(null_label, is_asked=is_asked)
        if self.config.trained_cfg != 1 and scale != 1:
            raise ValueError(
                f"these weights have learned the guidance scale {self.config.trained_cfg:g}, and guidance_scale "
                f"{scale:g} would guide them again: leave out guidance_scale and guidance_interval"
            )
        check_guidance(scale, null_label, interval=guidance_interval)
        cfg = scale if null_label is None else lambda t: self._guidance_scale  # a callback may change it
        velocity = guided(model, y, cfg=cfg, interval=guidance_interval)

        t0, t1 = interpolant.interval(prediction)
        if num_inference_steps is None:
            num_inference_steps = 1 if jumps else 50
        times = self._set_timesteps(num_inference_steps, t0, t1)
        ends = [*times[1:], times.new_tensor(t1)] if jumps else [None] * len(times)
        if jumps and self.scheduler.config.stochastic_sampling:  # it goes to the data, and puts noise back
            ends = [ends[-1]] * len(times)
        self._guidance_scale, self._interrupt, self._num_timesteps = scale, False, len(times)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        steps = zip(times, ends, self.progress_bar(self.scheduler.timesteps), strict=True)
        for step, (t, r, timestep) in enumerate(steps):
            if self._interrupt:
                continue
            x = self.scheduler.step(-velocity(x, t, r), timestep, x, return_dict=False, **options)[0]
            if callback_on_step_end is not None:
                tensors = {name: x for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, step, timestep, tensors) or tensors).get("latents", x)
                check_guidance(self._guidance_scale, null_label)

        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def jumps(self) -> bool:
        """True if each step is a jump with the average velocity."""
        is_euler = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        return bool(self.transformer.config.get("two_times")) and is_euler

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def codec(self) -> Codec:
        """The codec of the VAE, or the identity codec in pixel space."""
        return IdentityCodec(self.transformer.config.in_channels) if self.vae is None else VAECodec.of(self.vae)

    @property
    def downsample(self) -> int:
        """Pixels per latent along a side."""
        return self.codec.downsample

    def label_ids(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        """Returns the labels of classes given by label (int) or name (str). ValueError: as in `class_label`."""
        if isinstance(class_labels, int | str) or np.ndim(class_labels) == 0:
            wanted = [cast("int | str", class_labels)]  # or an integer of NumPy or torch
        else:
            wanted = list(class_labels)
        if not wanted:
            raise ValueError("class_labels is empty: give a label for each image")
        given = self.config.id2label or {}
        class_names = [given.get(str(label), str(label)) for label in range(self.transformer.config.num_classes)]
        return [class_label(label, class_names) for label in wanted]

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        config = self.transformer.config
        unit = self.downsample * config.patch_size
        height, width = (config.input_size * self.downsample if side is None else side for side in (height, width))
        if height < 1 or width < 1 or height % unit or width % unit:
            raise ValueError(f"images of {height}x{width} are not possible: sides must be divisible by {unit}")
        return config.in_channels, height // self.downsample, width // self.downsample

    def _noise(self, shape: tuple[int, ...], generator, latents: Tensor | None, device: torch.device) -> Tensor:
        """Returns the initial noise. Samples are float32, whatever the model's dtype, until decoded."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} images: give one for each")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, but must be {shape}")
        return latents.to(device, torch.float32)

    def _decode(self, x: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image]:
        if output_type == "latent":
            return x
        images = self.codec.decode(x).expand(-1, 3, -1, -1)  # greyscale becomes RGB
        if output_type == "pil":
            return [to_pil(image) for image in to_uint8(images).cpu()]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    def _set_timesteps(self, num_steps: int, t0: float, t1: float) -> Tensor:
        """Sets the scheduler's grid and returns the time of each of its evaluations, in float64.

        The times equal ours exactly if the scheduler takes our grid, so that an edge of the guidance interval falls on
        the same side. (The scheduler's timesteps may be integers.)
        """
        ours = time_grid(num_steps, t0, t1)[:-1]
        if "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(sigmas=(1 - ours).numpy())
        else:
            self.scheduler.set_timesteps(num_steps)
        self.scheduler.set_begin_index(0)  # otherwise it finds a step by its timestep, which several steps may have
        times = 1 - self.scheduler.sigmas[: len(self.scheduler.timesteps)].double()
        if len(times) == len(ours) and torch.allclose(times, ours, rtol=0, atol=2e-6):
            return ours
        return times.mul(1e6).round().div(1e6).clamp(t0, t1)


diffusers.SiTPipeline = SiTPipeline  # DiffusionPipeline.from_pretrained looks here for the class named in a folder


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises ValueError for a scheduler that does not integrate a flow; the message names one that does."""
    config = scheduler.config
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)):
        return
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return
    name = type(scheduler).__name__
    remedy = name if "use_flow_sigmas" in config else "UniPCMultistepScheduler"
    raise ValueError(
        f"this {name} does not integrate a flow: use "
        f'{remedy}(prediction_type="flow_prediction", use_flow_sigmas=True), or a FlowMatch scheduler'
    )


def export_pipeline(weights: Weights, folder: Path, licence: str | None = None, scores: Iterable[Path] = ()) -> None:
    """Writes a folder for `SiTPipeline.from_pretrained`, completely or not at all.

    Args:
        weights: returned by `load_weights`.
        folder: the folder to write; it must be new or empty.
        licence, scores: for the card in README.md, as in `model_card`.

    Raises:
        ValueError: the folder is not empty, a record of scores is damaged, the VAE is not the one of the training, or a
            pipeline cannot express the interpolant, objective, backbone or codec.
        OSError: the folder cannot be written.
    """
    recipe = weights.recipe
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: give another folder, or delete it")
    if recipe.objective or recipe.backbone:
        raise ValueError("a pipeline does not support your own objective or backbone: sample with sample/generate.py")
    codec = open_codec(recipe.codec)
    if type(codec) not in (IdentityCodec, VAECodec, DCCodec):
        raise ValueError(
            "a pipeline decodes with an AutoencoderKL or AutoencoderDC, but these weights were trained with the codec "
            f"{recipe.codec['kind']}: sample them with sample/generate.py"
        )
    pipeline = SiTPipeline(
        weights.model,
        FlowMatchEulerDiscreteScheduler(),
        getattr(codec, "vae", None),
        prediction=recipe.prediction,
        interpolant=recipe.interpolant,
        id2label={str(label): name for label, name in enumerate(recipe.class_names)},
        step=recipe.step,
        ema_decay=recipe.ema_decay,
        null_label_trained=recipe.null_label_trained,
        empty_classes={str(label): recipe.class_names[label] for label in recipe.empty_classes},
        ema_known=recipe.ema_known,
        trained_cfg=recipe.trained_cfg,
    )
    from sit_atconv.studies.model_card import model_card  # draws charts: importing it takes a second

    card = model_card(weights, folder.name, licence, scores)

    def write(partial: Path) -> None:
        pipeline.save_pretrained(partial)
        (partial / README).write_text(card)

    write_folder_aside(folder, write)
