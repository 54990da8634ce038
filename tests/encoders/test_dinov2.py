"""Tests of the DINOv2 network; tests/evaluation/test_extractors.py tests its files and the extractor."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sit_atconv.encoders.dinov2 import DINOv2
from tests.conftest import relative_error


@pytest.fixture(scope="module")
def images():
    """Returns noise, uint8 (2, 3, 250, 270), on which every filter has an effect."""
    return torch.randint(0, 256, (2, 3, 250, 270), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_dinov2(width=128, depth=2, side=37):
    """Returns random weights under Meta's names, large enough that each has an effect."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, std=0.05):
        return std * torch.randn(shape, generator=generator)

    weights = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, 1 + side**2, width, std=0.5),
        "mask_token": draw(1, width),
        "patch_embed.proj.weight": draw(width, 3, 14, 14),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    for i in range(depth):
        for layer, out, into in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)]:
            weights[f"blocks.{i}.{layer}.weight"] = draw(out * width, into * width)
            weights[f"blocks.{i}.{layer}.bias"] = draw(out * width)
        for j in (1, 2):
            weights[f"blocks.{i}.norm{j}.weight"] = 1 + draw(width)
            weights[f"blocks.{i}.norm{j}.bias"] = draw(width)
            weights[f"blocks.{i}.ls{j}.gamma"] = 1 + draw(width)
    return weights


def as_timm(weights):
    return {name: tensor for name, tensor in weights.items() if name != "mask_token"}


def bicubic(size, new_size, scale):
    """Returns (new_size, size) whose rows hold the four taps of a cubic, a = -0.75, at (i + 0.5) * scale - 0.5."""
    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for i in range(new_size):
        x = (i + 0.5) * scale - 0.5
        for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d, a = abs(x - tap), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), size - 1)] += near if d <= 1 else far
    return matrix


def cls_token(weights, images):
    """Returns the normalised CLS token (B, C) for uint8 (B, 3, H, W), written out in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    pixels = np.stack(
        [  # Pillow resizes as torch does with antialiasing; mode F does not round
            [
                np.asarray(Image.fromarray(plane.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC))
                for plane in image
            ]
            for image in images.numpy()
        ]
    )
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (torch.from_numpy(pixels).double() / 255 - mean) / std
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14)  # (B, 3, 16, 16, 14, 14)
    x = torch.einsum("bcijhw,dchw->bijd", patches, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"]
    side, width = round((w["pos_embed"].shape[1] - 1) ** 0.5), x.shape[-1]
    matrix = bicubic(side, 16, side / 16.1)
    positions = w["pos_embed"][0, 1:].view(side, side, width)
    x = (x + torch.einsum("ip,jq,pqd->ijd", matrix, matrix, positions)).flatten(1, 2)
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)  # (B, 257, C)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(len([name for name in w if name.endswith("ls1.gamma")])):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        heads = []
        for h in range(0, width, 64):
            scores = q[..., h : h + 64] @ k[..., h : h + 64].mT / 8
            heads.append(scores.softmax(-1) @ v[..., h : h + 64])
        x = x + w[f"blocks.{i}.ls1.gamma"] * linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + w[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def encode(weights, images):
    with torch.inference_mode():
        return DINOv2(weights).eval()(images)[0]


def test_the_cls_token_equals_that_of_the_written_out_network(images):
    weights = make_dinov2()
    token = encode(weights, images)
    assert token.shape == (2, 128) and torch.equal(token, encode(as_timm(weights), images))
    assert relative_error(token, cls_token(weights, images)) < 1e-5


def test_small_images_are_enlarged(images):
    weights, small = make_dinov2(depth=1), images[:, :, :8, :8]
    assert relative_error(encode(weights, small), cls_token(weights, small)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"register_tokens": torch.zeros(1, 4, 128)}, r"its register_tokens is \(1, 4, 128\), not absent"),
        ({"reg_token": torch.zeros(1, 4, 128), "pos_embed": torch.zeros(1, 1369, 128)}, "its reg_token is"),
        ({"blocks.0.mlp.fc1.weight": None, "blocks.0.mlp.w12.weight": torch.zeros(512, 128)}, "fc1.weight is absent"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(680, 128)}, r"fc1.weight is \(680, 128\)"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(400, 100)}, "C a multiple of 64"),
        ({"pos_embed": torch.zeros(1, 1300, 128)}, r"its pos_embed is \(1, 1300, 128\), not \(1, 257, 128\)"),
        ({"pos_embed": None}, r"its pos_embed is absent, not \(1, 257, 128\)"),
        ({"patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}, r"is \(128, 3, 16, 16\), not \(128, 3, 14, 14\)"),
        ({"blocks.0.ls1.gamma": None}, r"its blocks\.0\.ls1\.gamma is absent"),
        ({"head.weight": torch.zeros(10, 128)}, r"its head\.weight is \(10, 128\), not absent"),
    ],
)
def test_weights_of_other_transformers_are_refused(change, message):
    weights = {name: tensor for name, tensor in (make_dinov2(depth=1) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=rf"{message}.*without registers"):
        DINOv2(weights)
