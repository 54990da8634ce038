import pytest
import torch
from diffusers import AutoencoderKL

from sit_atconv.data.codecs import IdentityCodec, VAECodec, open_codec
from tests.conftest import relative_error


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A tiny autoencoder in the real format, with a scale and a shift of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        block_out_channels=(8, 8), latent_channels=4, layers_per_block=1, scaling_factor=0.5, shift_factor=0.1,
    ).save_pretrained(folder)
    return str(folder)


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


def test_a_description_opens_the_same_vae_and_notices_another(vae_folder):
    description = VAECodec(vae_folder).describe()
    assert description | {"source": ""} == {
        "kind": "autoencoder_kl", "source": "", "channels": 4, "downsample": 2, "scale": 0.5, "shift": 0.1,
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
    with pytest.raises(ValueError, match="'jpeg'"):
        open_codec({"kind": "jpeg"})
    codec = IdentityCodec(1)
    codec.downsample = 8
    with pytest.raises(ValueError, match="image size 100"):
        codec.latent_size(100)
