"""The diffusers pipeline draws the same samples as our solvers and supports the features of pipelines."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from sit_atconv import pipeline as pipeline_module
from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.data.codecs import IdentityCodec, VAECodec
from sit_atconv.data.pixels import to_uint8
from sit_atconv.models import SiT
from sit_atconv.pipeline import SiTPipeline, export_pipeline
from sit_atconv.sampling import guided, sample_ode
from sit_atconv.studies.model_card import renamed
from tests.conftest import relative_error
from tests.models.test_sit import randomised

FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
NAMES = [f"digit {i}" for i in range(10)]
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = [0, 7, 3]


def make_pipeline(scheduler=None, vae: Path | None = None, **options) -> SiTPipeline:
    decoder = vae and AutoencoderKL.from_pretrained(vae)
    made = SiTPipeline(randomised(), scheduler or FlowMatchEulerDiscreteScheduler(), decoder, **options)
    made.set_progress_bar_config(disable=True)
    return made


def weights_of(codec, interpolant: str = "linear") -> Weights:
    recipe = Recipe(interpolant, "velocity", codec.describe(), NAMES, step=1)
    return Weights(randomised(in_channels=codec.channels), recipe, Path("nowhere"))


def load(folder, **options) -> SiTPipeline:
    loaded = SiTPipeline.from_pretrained(folder, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, **options) -> np.ndarray:
    """Returns three images (3, H, W, 3) in [0, 1]."""
    return pipeline(LABELS, num_inference_steps=3, latents=NOISE, output_type="np", **options).images


@pytest.mark.parametrize(
    ("scheduler", "solver", "num_steps"),
    [
        (FlowMatchEulerDiscreteScheduler(), "euler", 12),
        (FlowMatchEulerDiscreteScheduler(), "euler", 50),
        (UniPCMultistepScheduler(**FLOW), "unipc", 12),
        (DPMSolverMultistepScheduler(**FLOW), "dpm++", 12),
    ],
)
def test_images_equal_those_of_our_solvers(make_vae, scheduler, solver, num_steps):
    vae = make_vae(shift_factor=2.0)
    pipeline, y = make_pipeline(scheduler, vae), torch.tensor(LABELS)
    pipeline.transformer.final_layer.linear.weight.data *= 10  # so strong that another grid or order would be seen
    pictures = pipeline(LABELS, guidance_scale=3.0, num_inference_steps=num_steps, latents=NOISE).images
    images = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
    with torch.no_grad():
        z = sample_ode(guided(pipeline.transformer, y, cfg=3.0), NOISE, solver=solver, num_steps=num_steps)
    expected = to_uint8(VAECodec(str(vae)).decode(z))
    assert images.shape == (3, 3, 16, 16) and expected.float().std() > 10
    assert (images.int() - expected.int()).abs().max() <= 1


def test_heun_is_more_accurate_than_euler_at_equal_cost():
    pipeline, y = make_pipeline(), torch.tensor(LABELS)
    with torch.no_grad():
        solution = sample_ode(guided(pipeline.transformer, y, cfg=2.0), NOISE, solver="heun", num_steps=50)

    def error(scheduler, num_steps):
        pipeline.scheduler = scheduler
        options = dict(num_inference_steps=num_steps, guidance_scale=2.0, latents=NOISE, output_type="latent")
        return relative_error(pipeline(LABELS, **options).images, solution)

    assert error(FlowMatchHeunDiscreteScheduler(), 8) < error(FlowMatchEulerDiscreteScheduler(), 15) / 4


class ModelOfGaussian(SiT):
    """Exact model of normal data with standard deviation 0.5: noise z becomes 0.5 z."""

    prediction = "velocity"

    def forward(self, x, t, y):
        t = t.view(-1, 1, 1, 1)
        numerator = 1 - t if self.prediction == "noise" else 0.25 * t - (1 - t)
        return numerator * x / (0.25 * t**2 + (1 - t) ** 2)


@pytest.mark.parametrize(("prediction", "num_steps"), [("noise", 50), ("velocity", 1010)])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
    ],
)
def test_noise_prediction_and_more_steps_than_scheduler_timesteps(scheduler, prediction, num_steps):
    model = ModelOfGaussian(input_size=8, hidden_size=16, depth=1, num_heads=1, num_classes=10)
    model.prediction = prediction
    pipeline = SiTPipeline(model, scheduler, prediction=prediction)
    pipeline.set_progress_bar_config(disable=True)
    z = pipeline(LABELS, 1.0, num_steps, latents=NOISE, output_type="latent").images
    assert relative_error(z, 0.5 * NOISE) < 0.03


def test_guidance_is_on_only_inside_its_interval():
    pipeline, sizes = make_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for options in (dict(guidance_interval=(0.3, 0.7)), dict(guidance_scale=1.0), dict()):
        pipeline(5, num_inference_steps=10, output_type="latent", **options)
    assert sizes == [1] * 3 + [2] * 4 + [1] * 3 + [1] * 10 + [2] * 10
    sizes.clear()
    pipeline(5, num_inference_steps=7, output_type="latent", guidance_interval=(2 / 7, 5 / 7))
    assert sizes == [1, 1, 2, 2, 2, 1, 1]
    pipeline.transformer = randomised(has_null_label=False)
    sizes.clear()
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pipeline(5, num_inference_steps=1, output_type="latent")
    assert sizes == [1]
    with pytest.raises(ValueError, match="needs a null label"):
        pipeline(5, guidance_scale=2.0)


def test_guidance_needs_a_trained_null_label():
    pipeline, sizes = make_pipeline(null_label_trained=False), []
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pipeline(5, num_inference_steps=2, output_type="latent")
    assert sizes == [1, 1]
    for options in (dict(guidance_scale=2.0), dict(guidance_scale=0.0), dict(guidance_interval=(0.2, 0.8))):
        with pytest.raises(ValueError, match="needs a null label, and this model was trained without one: use cfg = 1"):
            pipeline(5, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(guidance_interval=(0.8, 0.2)),
        dict(guidance_interval=(0.3, 1.2)),
        dict(guidance_interval=(0.5, 0.5)),
        dict(guidance_interval=None),
        dict(guidance_scale=float("nan")),
        dict(guidance_scale=float("inf")),
    ],
)
def test_invalid_guidance_is_refused(options):
    with pytest.raises(ValueError, match=r"two increasing times in \[0, 1\]|must be a finite number"):
        make_pipeline()(3, num_inference_steps=1, output_type="latent", **options)


def test_callbacks_can_read_and_change_every_step():
    pipeline, seen, sizes = make_pipeline(), [], []
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe is pipeline, step, float(timestep), tensors["latents"].clone()))
        return tensors

    options = dict(num_inference_steps=4, latents=NOISE[:1], output_type="latent")
    undisturbed = pipeline(5, **options).images
    watched = pipeline(5, callback_on_step_end=watch, **options).images
    assert torch.equal(undisturbed, watched) and torch.equal(seen[-1][3], watched)
    assert [step for _, step, *_ in seen] == [0, 1, 2, 3] == list(range(pipeline.num_timesteps)) and seen[0][0]
    assert [time for _, _, time, _ in seen] == sorted((time for _, _, time, _ in seen), reverse=True)

    def halve(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] / 2} if step == 3 else None

    assert torch.equal(pipeline(5, callback_on_step_end=halve, **options).images, undisturbed / 2)

    def stop_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale, pipe._interrupt = 1.0, step == 2
        return tensors

    sizes.clear()
    stopped = pipeline(5, callback_on_step_end=stop_guidance, **options).images
    assert sizes == [2, 1, 1] and not torch.equal(stopped, undisturbed)
    sizes.clear()
    pipeline(5, **options)
    assert sizes == [2] * 4  # the next call is not affected

    def guide(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0

    with pytest.raises(ValueError, match="needs a null label"):
        make_pipeline(null_label_trained=False)(5, callback_on_step_end=guide, **options)
    with pytest.raises(ValueError, match=r"tensor_inputs can be .*'latents'.*, not 'prompt_embeds'"):
        pipeline(5, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"], **options)


def test_callback_classes_of_diffusers_work():
    class Doubles(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * (2 if step_index == 1 else 1)}

    options = dict(num_inference_steps=2, latents=NOISE[:1], output_type="latent")
    pipeline = make_pipeline()
    for callback in (Doubles(), MultiPipelineCallbacks([Doubles()])):
        changed = pipeline(5, callback_on_step_end=callback, **options).images
        assert torch.equal(changed, 2 * pipeline(5, **options).images)


def test_labels_are_given_by_number_or_name():
    by_number = make_pipeline(id2label={"0": "1", "1": "10", "2": "2"})  # as folders were once sorted
    assert by_number.label_ids([1, "1", "10", 2]) == [1, 0, 1, 2]
    pipeline = make_pipeline(id2label={str(i): name for i, name in enumerate(NAMES)})
    assert pipeline.label_ids([2, "digit 7", np.int64(3)]) == [2, 7, 3]
    assert pipeline.label_ids("digit 9") == [9] and pipeline.label_ids(4) == [4]
    assert pipeline.label_ids(torch.tensor(4)) == [4] and pipeline.label_ids(torch.tensor([4, 5])) == [4, 5]
    with pytest.raises(ValueError, match=r"there is no class 'digt 7'; similar names: 'digit 7', 'digit"):
        pipeline.label_ids(["digt 7"])
    for label in (10, -1):
        with pytest.raises(ValueError, match=rf"class {label} is out of range: the model knows 0 \.\.\. 9"):
            pipeline.label_ids([0, label])
    with pytest.raises(ValueError, match="class_labels is empty"):
        make_pipeline().label_ids([])
    with pytest.raises(ValueError, match="there is no class 'digit 7'; similar names: '0'"):
        make_pipeline().label_ids("digit 7")


def test_noise_sizes_and_outputs(vae):
    pipeline = make_pipeline(vae=vae)

    def latents(seeds, **options):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline([3] * len(seeds), num_inference_steps=2, generator=generator, **options).images

    both = latents([0, 1], output_type="latent")
    assert both.shape == (2, 4, 8, 8) and relative_error(latents([1], output_type="latent")[0], both[1]) < 1e-5
    wide = latents([0], output_type="pt", height=8, width=24)
    assert wide.shape == (1, 3, 8, 24) and 0 <= wide.min() < wide.max() <= 1
    assert latents([0], output_type="np", height=8, width=24).shape == (1, 8, 24, 3)
    (picture,) = pipeline(3, num_inference_steps=1, return_dict=False)[0]
    assert picture.size == (16, 16) and picture.mode == "RGB"
    for wrong, message in [
        (dict(height=10), "sides must be divisible by 4"),
        (dict(latents=NOISE), r"latents are \(3, 4, 8, 8\), but must be \(1, 4, 8, 8\)"),
        (dict(generator=[torch.Generator()] * 2), "2 generators were given for 1 images"),
        (dict(output_type="png"), "output_type must be one of"),
        (dict(num_inference_steps=0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline(3, **wrong)


def test_only_flow_schedulers_and_the_linear_interpolant_are_taken():
    with pytest.raises(ValueError, match=r"DDIMScheduler does not .* use UniPCMultistepScheduler\(prediction_type="):
        make_pipeline(DDIMScheduler())
    with pytest.raises(ValueError, match="support only the linear interpolant, but the model was trained on 'gvp'"):
        make_pipeline(interpolant="gvp")
    pipeline = make_pipeline()
    for options in (dict(), dict(use_flow_sigmas=True), dict(prediction_type="flow_prediction")):
        pipeline.scheduler = DPMSolverMultistepScheduler(**options)
        with pytest.raises(ValueError, match=r"use DPMSolverMultistepScheduler\(prediction_type=\"flow_prediction\""):
            pipeline(3)


def test_noise_of_stochastic_schedulers_comes_from_the_generator():
    pipeline = make_pipeline(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW))
    one, same, other = (
        pipeline(3, 1.0, 3, torch.Generator().manual_seed(seed), latents=NOISE[:1], output_type="latent").images
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.fixture
def exported(vae, tmp_path):
    export_pipeline(weights_of(VAECodec(str(vae))), tmp_path / "exported")
    return tmp_path / "exported"


def test_an_exported_folder_gives_the_same_images_again(vae, exported, tmp_path):
    expected = draw(make_pipeline(vae=vae))
    pipeline = load(exported)
    assert np.array_equal(draw(pipeline), expected) and pipeline.label_ids("digit 7") == [7]
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, **FLOW)
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "again")
    assert np.array_equal(draw(load(tmp_path / "again")), expected)


def test_diffusers_finds_the_pipeline_itself(exported, tmp_path, monkeypatch):
    assert type(DiffusionPipeline.from_pretrained(exported)) is SiTPipeline
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(diffusers, "SiTPipeline", SiTPipeline)
    custom = DiffusionPipeline.from_pretrained(
        exported, custom_pipeline=pipeline_module.__file__, trust_remote_code=True
    )
    custom.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(custom), draw(load(exported)))


def test_pixel_space_has_no_vae_and_gives_rgb(tmp_path):
    export_pipeline(weights_of(IdentityCodec(1)), tmp_path / "exported")
    pipeline = load(tmp_path / "exported")
    assert pipeline.vae is None and not (tmp_path / "exported" / "vae").exists()
    for pixels in (
        np.array(pipeline(3, num_inference_steps=2).images[0]),
        pipeline(3, num_inference_steps=2, output_type="np").images[0],
    ):
        assert pixels.shape == (8, 8, 3) and np.ptp(pixels, axis=2).max() == 0 < np.ptp(pixels)


def test_half_precision_images_are_close(exported):
    expected = draw(load(exported))
    converted = load(exported).to("cpu").to(torch.bfloat16)
    for pipeline in (converted, load(exported, torch_dtype=torch.bfloat16)):
        assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16
        assert 0 < np.abs(draw(pipeline) - expected).mean() < 0.02


def test_offloading_gives_the_same_images(exported, monkeypatch):
    """Offloads to the CPU, where the hooks are the same."""
    pipeline = load(exported)
    expected = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert [hook.model for hook in pipeline._all_hooks] == [pipeline.transformer, pipeline.vae]
    assert np.array_equal(draw(pipeline), expected)

    pipeline.vae = None
    expected = pipeline(3, latents=NOISE[:1], num_inference_steps=2, output_type="latent").images
    to_cpu = torch.device("cpu")  # accelerate stumbles over the cpu:0 that diffusers makes of it
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda m, _, **options: offload(m, to_cpu, **options))
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert {p.device.type for p in pipeline.transformer.parameters()} == {"meta"}
    images = pipeline(3, latents=NOISE[:1], num_inference_steps=2, output_type="latent").images
    assert torch.equal(images, expected)


def test_a_pipeline_is_uploaded_and_downloaded(exported, tmp_path, monkeypatch):
    from diffusers.utils import hub_utils

    def upload(self, folder, repo_id, **options):
        os.rename(folder, tmp_path / "hub")
        os.mkdir(folder)

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **options: hub_utils.ModelCard(""))
    monkeypatch.setattr(hub_utils.PushToHubMixin, "_upload_folder", upload)
    load(exported).push_to_hub("me/digits")
    names = {path.relative_to(exported) for path in exported.rglob("*")}
    assert {path.relative_to(tmp_path / "hub") for path in (tmp_path / "hub").rglob("*")} == names

    card = (exported / "README.md").read_text()
    assert (tmp_path / "hub" / "README.md").read_text() == renamed(card, "exported", "me/digits") != card

    monkeypatch.setattr(pipeline_module, "snapshot_download", lambda hub_id, **options: str(tmp_path / hub_id[3:]))
    (tmp_path / "hub").rename(tmp_path / "digits")
    assert np.array_equal(draw(load("me/digits")), draw(load(exported)))


def test_the_card_of_an_upload(exported, tmp_path, monkeypatch):
    from diffusers.utils import hub_utils

    uploaded = []
    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(
        hub_utils,
        "upload_folder",
        lambda folder_path, **options: uploaded.append(Path(folder_path, "README.md").read_text()),
    )

    def push(pipeline, card: str) -> str:
        monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **options: hub_utils.ModelCard(card))
        pipeline.push_to_hub("me/digits")
        return uploaded.pop()

    loaded = load(exported)
    made_here = SiTPipeline(**loaded.components, id2label=loaded.config.id2label)
    generic = "It has been generated automatically. [More Information Needed]"
    assert "# me/digits" in push(made_here, generic) and "Written by sit-atconv" in push(made_here, generic)
    assert push(made_here, "# My own words").endswith("# My own words")  # the card of the repository
    shutil.copytree(exported, tmp_path / "edited")
    (tmp_path / "edited" / "README.md").write_text("# Edited")
    assert push(load(tmp_path / "edited"), generic) == "# Edited"
    assert push(load(tmp_path / "edited"), "# Edited on the hub").endswith("# Edited on the hub")
    monkeypatch.chdir(tmp_path)
    by_relative_path = load("edited")
    monkeypatch.chdir(exported)
    assert push(by_relative_path, generic) == "# Edited"
    uploaded_card = push(load(exported), generic)
    assert "# me/digits\n" in uploaded_card and 'from_pretrained("me/digits")' in uploaded_card
    assert "--ckpt me/digits --classes" in uploaded_card and exported.name not in uploaded_card


def test_an_export_is_complete_or_not_there(vae, tmp_path, monkeypatch):
    codec, folder = VAECodec(str(vae)), tmp_path / "exported"
    with pytest.raises(ValueError, match="only the linear interpolant"):
        export_pipeline(weights_of(codec, "vp"), folder)
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "save_pretrained", lambda *args, **options: os.listdir("/nowhere"))
        with pytest.raises(OSError):
            export_pipeline(weights_of(codec), folder)
    assert list(tmp_path.iterdir()) == []
    export_pipeline(weights_of(codec), folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert len({path.stat().st_mode for path in folder.rglob("*.*")}) == 1
    with pytest.raises(ValueError, match="exists already"):
        export_pipeline(weights_of(codec), folder)
