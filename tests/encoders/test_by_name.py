"""Image encoders: REPA's preparation of images, tokens of timm's models, shipped ones, and errors."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from sit_atconv.encoders import digit_features
from sit_atconv.encoders.by_name import REPA_NAMES, canonical, open_encoder
from sit_atconv.encoders.image_encoder import ImageEncoder
from tests.conftest import GOLDEN


def tiny(name, patch=14, **traits):
    """Registers a small vision transformer with timm."""

    def model(pretrained=False, **options):
        options = dict(patch_size=patch, embed_dim=6, depth=2, num_heads=1, **traits) | options
        return build_model_with_cfg(
            VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **options
        )

    model.__name__, model.__module__ = name, __name__
    register_model(model)
    return name


for _name in ("vit_golden_dinov2", "vit_golden_mae"):
    tiny(_name, img_size=518)
tiny("vit_golden_reg", img_size=518, reg_tokens=4, no_embed_class=True)


def weights_of(name: str, path: Path, **changes) -> Path:
    torch.manual_seed(0)
    tensors = timm.create_model(name, num_classes=0).state_dict()
    for key, tensor in tensors.items():
        tensors[key] = torch.randn_like(tensor) * 0.3 + tensor
    save_file(tensors | changes, path)
    return path


def test_images_and_positions_are_prepared_as_in_repa(tmp_path):
    given = load_file(GOLDEN / "repa_dinov2_inputs.safetensors")
    file = weights_of("vit_golden_dinov2", tmp_path / "w.safetensors", pos_embed=given["pos_embed.37x37"])
    for side in (16, 32):
        encoder = open_encoder("vit_golden_dinov2", file, (side, side))
        assert (encoder.transformer.pos_embed - given[f"pos_embed.{side}x{side}"]).abs().max() < 1e-4
        encoder.mean.copy_(torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        encoder.std.copy_(torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))
        if side == 16:
            inputs = encoder.prepare(given["image"].float() / 127.5 - 1)
            assert (inputs - given["dinov2_input"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["vit_golden_dinov2", "vit_golden_reg", "vit_golden_mae"])
def test_tokens_are_the_patches_in_order(tmp_path, name):
    file = weights_of(name, tmp_path / "w.safetensors")
    encoder = open_encoder(name, file, (3, 3))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    model = encoder.transformer
    seen = {}
    model.blocks[-1].register_forward_hook(lambda *call: seen.update(last=call[-1]))
    expected = model.forward_features(encoder.prepare(images))
    if "mae" in name:  # before the last norm
        expected = seen["last"]
    expected = expected[:, model.num_prefix_tokens :]
    tokens = encoder(images)
    assert tokens.shape == (2, 9, encoder.width) and not tokens.requires_grad and not encoder.training
    torch.testing.assert_close(tokens, expected)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))


def test_names_of_repa_are_models_of_timm():
    assert {"dinov2-vit-b", "dinov2reg-vit-l", "dinov3-vit-s", "clip-vit-l"} <= REPA_NAMES.keys()
    assert {*REPA_NAMES.values()} <= {*timm.list_pretrained()}
    assert canonical("dinov2-vit-b") == "vit_base_patch14_dinov2.lvd142m" and canonical("digits") == "digits"


def test_shipped_encoders_resize_images_to_the_grid():
    encoder = open_encoder("digits", None, (4, 4))
    images = torch.rand(2, 1, 8, 8)
    trunk = digit_features.DigitClassifier()
    trunk.load_state_dict(load_file(digit_features.WEIGHTS))
    torch.testing.assert_close(encoder(images), trunk.trunk[:6](images).flatten(2).mT)
    assert open_encoder("digits", None, (8, 8))(images).shape == (2, 64, 48)
    assert open_encoder("fashion", None, (8, 8))(torch.rand(1, 3, 32, 32)).shape == (1, 64, 80)


def test_opening_an_encoder_draws_no_random_numbers():
    torch.manual_seed(0)
    open_encoder("digits", None, (4, 4))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "there is no file"),
        ("damaged", r"cannot be read as weights of the encoder vit_golden_dinov2 \(.*: give timm's file"),
        ("convolutions", "resnet18 is no encoder: give a vision transformer of timm"),
        ("no such tag", "vit_tiny_patch16_224.nonsense is no encoder"),
        ("shipped", r"the encoder digits cannot be opened with \S*w\.safetensors \(.*: give the weights of that"),
        ("other width", "does not fit the encoder vit_golden_dinov2 .*size mismatch"),
        ("other patches", "has patches of 16x16 pixels, and the encoder vit_golden_dinov2 14x14"),
        ("incomplete", "does not fit the encoder vit_golden_dinov2 .*Missing key"),
        ("no network", "could not be loaded .* give the path of a downloaded file"),
        ("unknown", "there is no encoder vit_golden_dinov3: known are vit_golden_dinov2"),
    ],
)
def test_unusable_weights_are_one_line(tmp_path, monkeypatch, case, message):
    name, file = "vit_golden_dinov2", tmp_path / "w.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if case == "damaged":
        file.write_text("not weights")
    elif case in ("other width", "other patches"):
        model = timm.create_model(name, num_classes=0, **({"embed_dim": 8} if "width" in case else {"patch_size": 16}))
        save_file(model.state_dict(), file)
    elif case == "incomplete":
        tensors = timm.create_model(name, num_classes=0).state_dict()
        del tensors["blocks.1.attn.qkv.weight"]
        save_file(tensors, file)
    elif case == "no network":
        file = None
    elif case in ("convolutions", "no such tag"):
        name, file = {"convolutions": "resnet18"}.get(case, "vit_tiny_patch16_224.nonsense"), None
    elif case == "shipped":
        name = "digits"
        save_file({"trunk.0.weight": torch.zeros(3)}, file)
    elif case == "unknown":
        name, file = "vit_golden_dinov3", None
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(name, file, (4, 4))
    assert "\n" not in str(error.value)


class Pooled(ImageEncoder):
    """An encoder that returns one token for the whole image, though a grid was asked for."""

    def __init__(self, weights, grid_size):
        super().__init__()
        self.width, self.grid_size = 3, grid_size

    def forward(self, images):
        return images.mean((2, 3))[:, None]


def test_an_encoder_of_ones_own_must_return_a_token_for_each_cell():
    with pytest.raises(ValueError, match=r"returns \(1, 1, 3\) for one image of 3x8x8, and must return \(1, 16, 3\)"):
        open_encoder(f"{__name__}.Pooled", None, (4, 4), (3, 8, 8))
    assert open_encoder(f"{__name__}.Pooled", None, (1, 1), (3, 8, 8)).width == 3
