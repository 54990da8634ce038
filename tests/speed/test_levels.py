"""Each level runs the right computations. No test depends on how long they take."""

import dataclasses

import pytest
import torch

from sit_atconv.models import SiT
from sit_atconv.models.mixers import MIXERS, Mixer
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.speed import levels
from sit_atconv.speed.forms import LEVELS
from sit_atconv.speed.levels import PREPARE, Case, check_dtype, open_decoder, random_model
from sit_atconv.speed.options import SpeedOptions
from tests.conftest import relative_error

CPU = torch.device("cpu")
TINY = SpeedOptions("Tiny/2", depth=2, resolutions=(32, 64), batch_sizes=(2, 3), device="cpu")


def case(resolution=32, dtype="fp32", **changes) -> Case:
    return Case(dataclasses.replace(TINY, **changes), resolution, dtype, CPU)


def test_a_case_has_the_grid_and_batch_of_its_resolution():
    assert (case(64).grid_size, case(64).batch_size, case(32).batch_size) == ((4, 4), 3, 2)
    assert [tuple(tensor.shape) for tensor in case(64).inputs] == [(3, 4, 8, 8), (3,), (3,)]


@pytest.mark.parametrize("level", LEVELS)
def test_every_form_of_a_level_is_checked_and_runs_every_quantity(level):
    here = case()
    timed = PREPARE[level](here)
    forms = TINY.forms_of(level)
    quantities = {
        "mixer": ["forward", "forward+backward"],
        "block": ["forward", "forward+backward"],
        "model": ["forward"],
        "train": ["step"],
        "sampling": ["sampling"],
        "jump": ["sampling"],
        "train-jump": ["flow step", "MeanFlow step"],
    }
    if level == "op":
        convolution = ["forward", "backward", "grad_x", "grad_kernels"]
        assert list(timed.runs) == [
            (form, q)
            for form, names in {
                "attention": ["forward", "backward"],
                "published": convolution,
                "atconv": convolution,
                "floor": ["forward"],
            }.items()
            for q in names
        ]
    else:
        assert list(timed.runs) == [(form, quantity) for form in forms for quantity in quantities[level]]
        assert tuple(timed.modules) == forms
    assert [check.what.split()[0] for check in here.checks] == [f for f in forms if (level, f) != ("op", "floor")]


def test_only_requested_forms_are_built():
    timed = PREPARE["model"](case(forms=("attention", "floor", "timm")))
    assert list(timed.runs) == [("attention", "forward"), ("floor", "forward")]


def test_forms_with_the_same_weights_give_the_same_values():
    timed = PREPARE["op"](case(64))
    run = {key: run() for key, run in timed.runs.items()}
    for quantity in ("forward", "grad_x", "grad_kernels"):
        a, b = run["atconv", quantity], run["published", quantity]
        assert relative_error(*(y if torch.is_tensor(y) else y[0] for y in (a, b))) < 1e-5, quantity
    x_gradient, kernel_gradient = run["atconv", "backward"]
    assert torch.equal(x_gradient, run["atconv", "grad_x"][0])
    assert torch.equal(kernel_gradient, run["atconv", "grad_kernels"][0])
    assert run["attention", "backward"][0].shape == (3, 16, 3 * 128)

    timed = PREPARE["sampling"](case(64))
    images = {form: run() for (form, _), run in timed.runs.items()}
    assert relative_error(images["atconv"], images["published"]) < 1e-4
    assert relative_error(images["atconv"], images["floor"]) > 1e-2


@pytest.mark.parametrize("cfg, batch", [(4.0, 4), (1.0, 2), (0.0, 2)])
def test_guidance_doubles_the_batch_of_a_sampling_step(monkeypatch, cfg, batch):
    sizes, forward = [], SiT.forward
    timed = PREPARE["sampling"](case(forms=("attention", "atconv"), cfg=cfg, steps=50))
    monkeypatch.setattr(SiT, "forward", lambda self, x, t, y: sizes.append(len(x)) or forward(self, x, t, y))
    for run in timed.runs.values():
        run()
    assert sizes == [batch] * 2  # one step of each
    assert timed.scale == 50


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step_updates_every_trained_weight_and_clears_gradients(dtype):
    timed = PREPARE["train"](case(dtype=dtype, forms=("attention", "hybrid", "atconv")))
    model = timed.modules["hybrid"]
    before, arithmetic = {name: p.clone() for name, p in model.named_parameters()}, []
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: arithmetic.append(output.dtype))
    for (_, quantity), run in timed.runs.items():
        assert quantity == "step" and run() is None
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == ["pos_embed"] and arithmetic == [torch_dtype(dtype)]
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("form", ["attention", "atconv"])
def test_random_weights_are_not_zero_and_the_same_at_every_call(form):
    config = TINY.model_config(form, 32)
    model, again = (random_model(config, "fp32", CPU) for _ in range(2))
    assert all((p == 0).float().mean() < 0.01 for p in model.parameters())
    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    assert model(x, t, y).std() > 0.01
    assert torch.equal(model(x, t, y), again(x, t, y))


def test_constants_of_a_mixer_keep_their_values(monkeypatch):
    class Reversing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.register_buffer("order", torch.arange(16).flip(0))

        def forward(self, x, grid_size):
            return self.scale * x[:, self.order]

    monkeypatch.setitem(MIXERS._entries, "reversing", Mixer(build=lambda dim, config: Reversing()))
    model = random_model({**TINY.model_config("reversing", 64), "depth": 1}, "bf16", CPU)
    mixer, x = model.blocks[0].attn, torch.arange(16.0)[None, :, None]
    assert mixer.scale.dtype == torch.bfloat16 and mixer.scale != 1
    assert torch.equal(mixer(x, (4, 4)), mixer.scale * x.flip(1))


def test_a_compiled_form_must_agree_with_the_uncompiled_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    here = case(compile=True, forms=("attention",))
    PREPARE["model"](here)
    assert [check.what for check in here.checks][1:] == ["attention with and without torch.compile"]

    class Wrong(torch.nn.Module):
        null_label = 7

        def __init__(self, module, **options):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return 1.01 * self.module(*inputs)

    monkeypatch.setattr(torch, "compile", Wrong)
    for level in ("mixer", "block", "model", "train", "sampling"):
        with pytest.raises(ValueError, match=r"attention with and without .* do not agree at 32 px in fp32"):
            PREPARE[level](case(compile=True, forms=("attention",)))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=2,
    ).save_pretrained(folder)
    return str(folder)


def test_a_decoder_from_a_folder_decodes_to_pixels(vae):
    options = dataclasses.replace(TINY, decoder=vae, downsample=2, levels=("sampling",), forms=("attention",))
    timed = PREPARE["sampling"](Case(options, 64, "bf16", CPU, open_decoder(options)))
    images = timed.extras["decode"]().sample
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.bfloat16
    assert open_decoder(dataclasses.replace(options, levels=("model",))) is None


def test_a_decoder_that_does_not_fit_is_an_error(vae, tmp_path):
    options = dataclasses.replace(TINY, levels=("sampling",))
    with pytest.raises(ValueError, match=r"decodes 4 channels of 1/2 the resolution, not 4 of 1/8: .*--downsample 2"):
        open_decoder(dataclasses.replace(options, decoder=vae))
    with pytest.raises(ValueError, match="no VAE could be loaded from"):
        open_decoder(dataclasses.replace(options, decoder=str(tmp_path)))


def test_the_sd_vae_has_its_published_size():
    with torch.device("meta"):
        decoder = open_decoder(SpeedOptions(decoder="sd-vae"))
    assert sum(p.numel() for p in decoder.parameters()) == 83_653_863


def test_a_dtype_without_kernels_is_an_error_that_names_others(monkeypatch):
    def forward(self, x, t, y):
        raise RuntimeError("not implemented for 'Half'")

    check_dtype(CPU, "bf16")
    monkeypatch.setattr(levels.SiT, "forward", forward)
    with pytest.raises(ValueError, match=r"fp16 does not run on this cpu \(.*\): use fp32 or bf16"):
        check_dtype(CPU, "fp16")
