import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from sklearn.datasets import load_sample_image

from sit_atconv.data.codecs import IdentityCodec, VAECodec, open_codec
from sit_atconv.data.pixels import to_float
from tests.conftest import relative_error


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


def test_slicing_and_bf16_change_rounding_alone_and_tiling_what_is_larger_than_a_tile(vae_folder):
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


def test_the_same_weights_are_the_same_wherever_they_lie(vae_folder, make_vae, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "copy")
    here, there = VAECodec(vae_folder), VAECodec(str(tmp_path / "copy"), "bf16")
    there.check(here.describe(), "it was made")
    with pytest.raises(ValueError, match=r"has weights [0-9a-f]{12}, but it was made with [0-9a-f]{12}$"):
        VAECodec(str(make_vae(1))).check(here.describe(), "it was made")


@pytest.mark.parametrize(("key", "value"), [("norm_num_groups", 8), ("act_fn", "relu"), ("sample_size", 16)])
def test_the_same_weights_in_another_architecture_are_another_vae(vae_folder, tmp_path, key, value):
    copy = shutil.copytree(vae_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    assert VAECodec(str(copy)).weights != VAECodec(vae_folder).weights


def test_a_description_opens_the_same_vae_and_notices_another(vae_folder):
    description = VAECodec(vae_folder).describe()
    assert len(description["weights"]) == 64
    assert {key: value for key, value in description.items() if key not in ("source", "weights")} == {
        "kind": "autoencoder_kl", "channels": 4, "downsample": 2, "scale": 0.5, "shift": 0.1,
    }
    assert open_codec(description).describe() == description
    with pytest.raises(ValueError, match=r"scale 0\.5, but the weights were trained with 0\.9"):
        open_codec(description | {"scale": 0.9})


def test_the_scale_that_sd_vae_says_nothing_of(vae_folder, tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("\n".join(line for line in config.read_text().splitlines()
                                if "scaling_factor" not in line and "shift_factor" not in line))
    codec = VAECodec(str(tmp_path))
    assert (codec.scale, codec.shift) == (0.18215, 0.0)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no VAE could be loaded from .*nowhere"):
        VAECodec(str(tmp_path / "nowhere"))
    AutoencoderKL(in_channels=1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="grey takes 1 channels and gives 3: images have 3"):
        VAECodec(str(tmp_path / "grey"))
    lacking = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    del lacking.decoder.conv_out
    lacking.save_pretrained(tmp_path / "lacking")
    with pytest.raises(ValueError, match=r"no VAE could be loaded from .*lacking"):
        VAECodec(str(tmp_path / "lacking"))
    with pytest.raises(ValueError, match="'jpeg'"):
        open_codec({"kind": "jpeg"})
    codec = IdentityCodec(1)
    codec.downsample = 8
    with pytest.raises(ValueError, match="image size 100"):
        codec.latent_size(100)
