import json
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

from sit_atconv.data.codecs import IdentityCodec, VAECodec, open_codec, typed_codec
from sit_atconv.data.pixels import to_float
from tests.conftest import relative_error, working_folder


@pytest.fixture(scope="module")
def vae_folder(vae):
    return str(vae)


def test_identity_changes_nothing():
    codec, images = IdentityCodec(3), torch.randn(2, 3, 8, 8)
    assert codec.latents(codec.encode(images)) is images and codec.decode(images) is images
    assert open_codec(codec.describe()).channels == 3 and codec.latent_size(8) == 8


def test_latents_are_draws_of_the_posterior_shifted_and_scaled(vae_folder):
    codec, images = VAECodec(vae_folder), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    moments = codec.encode(images)
    posterior = codec.vae.encode(images).latent_dist
    assert moments.shape == (2, 8, 8, 8) and codec.downsample == 2 and codec.latent_size(16) == 8
    draws = torch.stack([codec.latents(moments, torch.Generator().manual_seed(i)) for i in range(400)])
    assert relative_error(draws.mean(0), (posterior.mean - 0.1) * 0.5) < 0.15
    assert relative_error(draws.std(0), posterior.std * 0.5) < 0.1


def test_decoding_undoes_scale_and_shift(vae_folder):
    codec, z = VAECodec(vae_folder), torch.randn(2, 4, 8, 8)
    assert torch.equal(codec.decode(z), codec.vae.decode(z / 0.5 + 0.1).sample)


def test_slicing_and_bf16_change_only_rounding_and_tiling_only_images_larger_than_a_tile(vae_folder):
    photograph = torch.from_numpy(load_sample_image("china.jpg")[:96, :96].copy()).permute(2, 0, 1)
    images = to_float(torch.stack([photograph, photograph.flip(-1)]))
    plain = VAECodec(vae_folder).encode(images)
    sliced = VAECodec(vae_folder, slicing=True)
    assert relative_error(sliced.encode(images), plain) < 1e-5
    z = sliced.latents(plain, torch.Generator().manual_seed(0))
    assert relative_error(sliced.decode(z), VAECodec(vae_folder).decode(z)) < 1e-5
    coarse = VAECodec(vae_folder, "bf16")
    assert coarse.vae.dtype == torch.bfloat16 and coarse.encode(images).dtype == torch.float32
    assert 1e-4 < relative_error(coarse.encode(images), plain) < 3e-2
    tiled = VAECodec(vae_folder, tiling=True)
    assert tiled.vae.config.sample_size == 32  # a tile
    assert tiled.encode(images).shape == plain.shape and relative_error(tiled.encode(images), plain) > 1e-4
    assert torch.equal(tiled.encode(images[..., :32, :32]), VAECodec(vae_folder).encode(images[..., :32, :32]))


def test_a_copied_vae_is_the_same_codec(vae_folder, make_vae, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "copy")
    here, there = VAECodec(vae_folder), VAECodec(str(tmp_path / "copy"), "bf16")
    there.check(here.describe(), "it was made")
    with pytest.raises(ValueError, match=r"it was made with another codec than .* \(weights \w+ -> \w+\)"):
        VAECodec(str(make_vae(1))).check(here.describe(), "it was made")


@pytest.mark.parametrize(("key", "value"), [("norm_num_groups", 8), ("act_fn", "relu"), ("sample_size", 16)])
def test_the_same_weights_in_another_architecture_are_another_vae(vae_folder, tmp_path, key, value):
    copy = shutil.copytree(vae_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    assert VAECodec(str(copy)).weights != VAECodec(vae_folder).weights


def test_a_description_opens_the_same_vae_and_rejects_another(vae_folder):
    description = VAECodec(vae_folder).describe()
    assert len(description["weights"]) == 64
    assert {key: value for key, value in description.items() if key not in ("source", "weights")} == {
        "kind": "autoencoder_kl",
        "channels": 4,
        "downsample": 2,
        "scale": 0.5,
        "shift": 0.1,
    }
    assert open_codec(description).describe() == description
    with pytest.raises(ValueError, match=r"weights were trained .* codec than .* \(scale 0\.9 -> 0\.5\): give"):
        open_codec(description | {"scale": 0.9})


def test_a_config_without_scaling_factor_gets_that_of_sd_vae(vae_folder, tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        "\n".join(
            line
            for line in config.read_text().splitlines()
            if "scaling_factor" not in line and "shift_factor" not in line
        )
    )
    codec = VAECodec(str(tmp_path))
    assert (codec.scale, codec.shift) == (0.18215, 0.0)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no VAE could be loaded from .*nowhere"):
        VAECodec(str(tmp_path / "nowhere"))
    AutoencoderKL(in_channels=1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="grey takes 1 channels and gives 3: give one"):
        VAECodec(str(tmp_path / "grey"))
    lacking = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    del lacking.decoder.conv_out
    lacking.save_pretrained(tmp_path / "lacking")
    with pytest.raises(ValueError, match=r"not fit its config\.json: decoder\.conv_out\.bias is missing, decoder\."):
        VAECodec(str(tmp_path / "lacking"))
    with pytest.raises(ValueError, match="'jpeg'"):
        open_codec({"kind": "jpeg"})
    codec = IdentityCodec(1)
    codec.downsample = 8
    with pytest.raises(ValueError, match="image size 100"):
        codec.latent_size(100)


def changed(vae_folder, folder, **config) -> str:
    """Copies the VAE and changes values in its config.json; returns the copy's folder."""
    shutil.copytree(vae_folder, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


def test_an_unusable_vae_is_refused_with_its_reason(vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    for folder, message in [
        (tmp_path / "pipe", rf"pipe is a pipeline, not a VAE: give {tmp_path}/pipe/vae$"),
        (
            tmp_path / "tiny",
            "tiny is an AutoencoderTiny: give the folder or hub id of an AutoencoderKL or AutoencoderDC",
        ),
        (tmp_path / "tiny" / "config.json", r"config\.json is a file, and a VAE is a folder"),
        (
            changed(vae_folder, tmp_path / "other", latent_channels=8),
            r"decoder\.conv_in\.weight is \(8, 4, 3, 3\), not \(8, 8, 3, 3\), .* and 4 more",
        ),
        (changed(vae_folder, tmp_path / "null", scaling_factor=None), "null has scaling_factor None in its config"),
        (changed(vae_folder, tmp_path / "half", latents_mean=[0.0] * 4, shift_factor=0.0), "latents_std to 4 values"),
        (changed(vae_folder, tmp_path / "both", latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "remove shift_factor"),
        (
            changed(vae_folder, tmp_path / "short", latents_mean=[0.0], latents_std=[1.0], shift_factor=None),
            "latents_std to 4 values",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            VAECodec(str(folder))


@pytest.fixture(scope="module")
def dc_folder(tmp_path_factory):
    """Returns the folder of a tiny AutoencoderDC: 4 times smaller, 8 channels, random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dc")
    sides = {"block_out_channels": (8, 8, 16), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    both = {f"{side}_{key}": value for key, value in sides.items() for side in ("encoder", "decoder")}
    AutoencoderDC(latent_channels=8, attention_head_dim=4, scaling_factor=0.5, **both).save_pretrained(folder)
    return str(folder)


def test_a_codec_without_a_posterior(dc_folder, tmp_path):
    description = typed_codec(dc_folder, 3)
    codec, images = open_codec(description), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    assert (codec.channels, codec.downsample, codec.stored_shape(16)) == (8, 4, (8, 4, 4))
    stored = codec.encode(images)
    assert stored.shape == (2, 8, 4, 4) and torch.equal(codec.latents(stored), 0.5 * stored)
    assert torch.equal(codec.decode(0.5 * stored), codec.vae.decode(stored).sample)
    assert open_codec(codec.describe()).describe() == codec.describe() and codec.describe()["kind"] == "autoencoder_dc"
    assert type(VAECodec.of(codec.vae)) is type(codec)
    with pytest.raises(ValueError, match="is an AutoencoderDC"):
        VAECodec(dc_folder)


def test_latents_mean_and_std_are_applied_per_channel(vae_folder, tmp_path):
    mean, std = [0.5, 0.0, -0.5, 1.0], [2.0, 3.0, 4.0, 5.0]
    folder = changed(vae_folder, tmp_path / "vae", latents_mean=mean, latents_std=std, shift_factor=None)
    codec, draw = VAECodec(folder), torch.randn(2, 4, 8, 8)
    m, s = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    z = codec.latents(torch.cat([draw, torch.full_like(draw, -30)], dim=1), noise=torch.zeros_like(draw))
    assert torch.allclose(z, (draw - m) * 0.5 / s, atol=1e-6)
    assert torch.allclose(codec.decode(z), codec.vae.decode(draw).sample, atol=1e-4)
    again = json.loads(json.dumps(codec.describe()))
    open_codec(again)
    with pytest.raises(ValueError, match=r"\(scale \[0\.25, .*\] -> 0\.5; shift "):
        VAECodec(vae_folder).check(again | {"weights": VAECodec(vae_folder).weights}, "the weights were trained")


def test_a_local_folder_is_stored_as_its_absolute_path(vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "here" / "vae")
    with working_folder(tmp_path / "here"):
        descriptions = [VAECodec(source).describe() for source in ("vae", "./vae", "../here/vae")]
    assert {description["source"] for description in descriptions} == {str(tmp_path / "here" / "vae")}
    assert open_codec(descriptions[0]).describe() == VAECodec(vae_folder).describe() | {
        "source": str(tmp_path / "here" / "vae")
    }


@pytest.mark.parametrize(
    "source", ["/gone/vae", "./gone", "../gone/vae", "~/vae", "gone", "a/b/c", "a\\b/c", "here/gone"]
)
def test_a_missing_path_is_never_sent_to_the_hub(source, tmp_path, monkeypatch):
    def ask(*args, **options):
        assert options["local_files_only"]
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", ask)
    (tmp_path / "here").mkdir()
    with working_folder(tmp_path), pytest.raises(ValueError, match="there is no folder ") as error:
        open_codec({"kind": "autoencoder_kl", "source": source})
    assert repr(source) in str(error.value) and "--vae" in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["here"]


def test_weights_saved_as_a_variant_are_found(vae_folder, tmp_path):
    AutoencoderKL.from_pretrained(vae_folder).save_pretrained(tmp_path / "variant", variant="fp16")
    assert VAECodec(str(tmp_path / "variant")).weights == VAECodec(vae_folder).weights


def test_tensors_with_old_names_are_found(vae_folder, tmp_path):
    """The published sd-vae-ft-ema uses the names of diffusers 0.4."""
    copy = shutil.copytree(vae_folder, tmp_path / "copy")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(copy / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, copy / "diffusion_pytorch_model.safetensors")
    assert any(".query." in name for name in tensors) and VAECodec(str(copy)).weights == VAECodec(vae_folder).weights
