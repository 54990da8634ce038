"""AttNet (arXiv 2510.20092), the paper's family of CNNs with ATConv as token mixer, as a timm model.

Importing this module registers `attnet_xxs`, `attnet_xs`, `attnet_s` and `attnet_t1` ... `attnet_t4`:

    import timm, sit_atconv.models.attnet
    model = timm.create_model("attnet_t2", num_classes=10)

Images are (B, C, H, W). Inside, all tensors are channels-last in memory, so that images and tokens are views of each
other, and every 1x1 convolution is a linear map of tokens.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerScale, NormMlpClassifierHead
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from timm.utils.model import reparameterize_model
from torch import Tensor

from sit_atconv.models.atconv import ATConv

__all__ = ["AttNet", "checkpoint_filter_fn", "official_state_dict"]  # the decorator adds the registered functions

register_notrace_module(ATConv)  # fx takes it as one operation: it computes with the sizes of the grid


class ConvNorm(nn.Sequential):
    """Convolution 3x3 with stride 2, and BatchNorm: (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__(nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_chans))

    def fuse(self) -> nn.Conv2d:
        """Returns one convolution that computes the same in evaluation mode."""
        return torch.nn.utils.fuse_conv_bn_eval(*self)


@register_notrace_module  # it asks for the device
class GateAndValue(nn.Linear):
    """Linear map to gate and value, whose weights are one matrix: (B, H, W, C) -> twice (B, H, W, hidden).

    On a CPU they are two 1x1 convolutions, whose results are contiguous. A matrix product would write the bias before
    it adds to it, and takes up to 1.6 times as long for widths such as the published 682 = 2 * 341.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if x.device.type != "cpu":
            gate, value = super().forward(x).chunk(2, dim=-1)
        else:
            image = x.permute(0, 3, 1, 2)
            weights, biases = self.weight[:, :, None, None].chunk(2), self.bias.chunk(2)
            gate, value = (F.conv2d(image, w, b).permute(0, 2, 3, 1) for w, b in zip(weights, biases, strict=True))
        return gate, value


@register_notrace_module  # it asks for the device and the size of the grid
class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 convolution: (B, C, H, W), channels-last in memory -> the same.

    On a CPU, gradients on grids of up to four positions are ten times as fast if all samples are stacked to one tall
    image, with a row of zeros below each.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if not self.training or x.device.type != "cpu" or H * W > 4:
            y = super().forward(x)
        else:
            rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, 0, 1)).reshape(1, B * (H + 1), W, C)
            y = super().forward(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = y.reshape(B, H + 1, W, C)[:, :H].permute(0, 3, 1, 2)
        return y


class GatedMLP(nn.Module):
    """Gated MLP with a depthwise 3x3 convolution of the gate: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, norm: bool):
        super().__init__()
        self.fc1 = GateAndValue(dim, 2 * hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.norm_layer: nn.Module = nn.RMSNorm(hidden, eps=1e-6) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.norm_layer(self.act(gate) * value))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds the norm into `fc2`, and adds channels of zeros up to a multiple of 16.

        Products of such matrices are faster, and the values stay the same.
        """
        fc1, dwconv, missing = self.fc1, self.dwconv, -self.dwconv.groups % 16
        assert dwconv.bias is not None
        if isinstance(self.norm_layer, nn.RMSNorm):
            self.fc2 = NormedLinear(self.norm_layer, self.fc2)  # type: ignore[assignment]
            self.norm_layer = nn.Identity()
        fc1.weight = nn.Parameter(F.pad(fc1.weight.unflatten(0, (2, -1)), (0, 0, 0, missing)).flatten(0, 1))
        fc1.bias = nn.Parameter(F.pad(fc1.bias.unflatten(0, (2, -1)), (0, missing)).flatten())
        dwconv.weight = nn.Parameter(F.pad(dwconv.weight, (0, 0, 0, 0, 0, 0, 0, missing)))
        dwconv.bias = nn.Parameter(F.pad(dwconv.bias, (0, missing)))
        self.fc2.weight = nn.Parameter(F.pad(self.fc2.weight, (0, missing)))
        dwconv.in_channels = dwconv.out_channels = dwconv.groups = len(dwconv.bias)
        fc1.out_features, self.fc2.in_features = len(fc1.bias), len(dwconv.bias)


class Block(nn.Module):
    """ATConv and gated MLP, both pre-norm and residual: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int, layer_scale: bool, mlp_norm: bool, drop_path: float):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.token_mixer = ATConv(dim, kernel_size, act="gelu")
        self.layer_scale_1 = LayerScale(dim, 1e-6) if layer_scale else nn.Identity()
        self.drop_path_1 = DropPath(drop_path)
        self.norm_2 = nn.LayerNorm(dim, eps=1e-6)
        self.channel_mixer = GatedMLP(dim, hidden, mlp_norm)
        self.layer_scale_2 = LayerScale(dim, 1e-6) if layer_scale else nn.Identity()
        self.drop_path_2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm_1(x).flatten(1, 2)  # (B, N, C), no copy
        mixed = self.token_mixer(tokens, (x.shape[1], x.shape[2])).reshape_as(x)
        x = x + self.drop_path_1(self.layer_scale_1(mixed))
        return x + self.drop_path_2(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds affine parts of norms and layer scales into the linear maps beside them, exactly."""
        mixer, mlp = self.token_mixer, self.channel_mixer
        _fold_before(self.norm_1, mixer.kernel_proj, mixer.x_proj)
        _fold_before(self.norm_2, mlp.fc1)
        self.layer_scale_1 = _fold_after(mixer.proj, self.layer_scale_1)
        self.layer_scale_2 = _fold_after(mlp.fc2, self.layer_scale_2)


class NormedLinear(nn.Module):
    """RMSNorm and the linear map after it, as one: it divides the outputs, which are fewer."""

    def __init__(self, norm: nn.RMSNorm, linear: nn.Linear):
        super().__init__()
        self.eps, self.width = norm.eps, linear.in_features  # channels of zeros may follow, and are not counted
        self.weight = nn.Parameter(linear.weight * norm.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(length.square() / self.width + self.eps)  # (B, H, W, 1)
        return torch.addcmul(self.bias, F.linear(x, self.weight), scale.to(x.dtype))


def _fold_before(norm: nn.LayerNorm, *linears: nn.Linear) -> None:
    """Moves weight and bias of a norm into the linear maps that follow.

    The norm keeps ones and zeros: torch's norm without weight and bias takes twice as long on a CPU.
    """
    for linear in linears:
        linear.bias.add_(linear.weight @ norm.bias)
        linear.weight.mul_(norm.weight)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def _fold_after(linear: nn.Linear, scale: nn.Module) -> nn.Module:
    """Moves a layer scale into the linear map before it; returns what remains of it, the identity."""
    if isinstance(scale, LayerScale):
        linear.weight.mul_(scale.gamma[:, None])
        linear.bias.mul_(scale.gamma)
    return nn.Identity()


class Stage(nn.Module):
    """Downsampling and blocks: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()  # a copy only if x was not channels-last
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2)


class AttNet(nn.Module):
    """AttNet: images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    Args:
        in_chans: channels of the images.
        num_classes: number of classes; 0 leaves out the classifier.
        global_pool: timm's name of the pooling over positions; "" leaves features (B, C, H / 32, W / 32).
        depths: number of blocks of each stage.
        dims: channels of each stage.
        mlp_ratios: expansion of the gated MLPs of each stage; their hidden width is floor(2 * floor(ratio * dim) / 3).
        layer_scale: whether each residual branch is multiplied by a learned factor a channel, initially 1e-6.
        mlp_norm: whether the gated MLPs hold an RMSNorm.
        kernel_size: side of ATConv's kernel, odd.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rates rise linearly from 0.

    Raises:
        ValueError: the stages of `depths`, `dims` and `mlp_ratios` are not as many, or `kernel_size` is even.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (32, 64, 128, 240),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        layer_scale: bool = False,
        mlp_norm: bool = False,
        kernel_size: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(depths) == len(dims) == len(mlp_ratios):
            raise ValueError(
                f"depths, dims and mlp_ratios must have one value a stage, not {len(depths)}, {len(dims)} and "
                f"{len(mlp_ratios)}"
            )
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.stem = nn.Sequential(ConvNorm(in_chans, dims[0] // 2), nn.GELU(), ConvNorm(dims[0] // 2, dims[0]))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages, self.feature_info = nn.Sequential(), []
        for i, (depth, dim, ratio) in enumerate(zip(depths, dims, mlp_ratios, strict=True)):
            hidden = 2 * int(ratio * dim) // 3
            blocks = [Block(dim, hidden, kernel_size, layer_scale, mlp_norm, next(rates)) for _ in range(depth)]
            self.stages.append(Stage(ConvNorm(dims[i - 1], dim) if i else nn.Identity(), blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = NormMlpClassifierHead(
            dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=functools.partial(LayerNorm2d, eps=1e-5),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(_accept_official_names)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the features of the last stage: (B, in_chans, H, W) -> (B, C, H / 32, W / 32)."""
        return self.stages(self.stem(_channels_last(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools, normalises and classifies features; with `pre_logits`, only the first two."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the features of the last stage and those of chosen stages.

        Args:
            x: images (B, in_chans, H, W).
            indices: the stages: the last n, a list of them, or None for all.
            norm: ignored, as there is no norm between the stages and the pooling.
            stop_early: compute no stage after the last chosen one, whose features are then the first result.
            output_fmt: "NCHW".
            intermediates_only: return only the list of chosen features.

        Raises:
            ValueError: `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        chosen, last = feature_take_indices(len(self.stages), indices)
        intermediates, x = [], self.stem(_channels_last(x))
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in chosen:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last of `indices`, and the head; returns the stages of `indices`."""
        chosen, last = feature_take_indices(len(self.stages), indices)
        if prune_head or last + 1 < len(self.stages):
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True)
        self.stages = self.stages[: last + 1]
        return chosen

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one of `num_classes`, or removes it if that is 0."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, which saves memory and costs one more forward."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict:
        """Returns timm's patterns of layer groups, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def fuse(self) -> "AttNet":
        """Folds all norms' and scales' constants into the maps beside them, in place, for faster inference.

        Raises:
            ValueError: the model is in training mode, whose batch statistics cannot be folded.
        """
        if self.training:
            raise ValueError("fuse() folds the statistics of evaluation: call model.eval() first")
        return reparameterize_model(self, inplace=True)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- weights

LINEAR = ("kernel_proj.weight", "x_proj.weight", ".proj.weight", "fc1.weight", "fc2.weight")  # 1x1 convolutions there


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Translates official weights to this module's names and shapes; other weights are unchanged.

    Args:
        state_dict: weights, or an official training file's content, whose trained weights are taken.
        model: unused; timm passes it.
    """
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    if not any(name.startswith("downsample_layers.") for name in state_dict):
        return dict(state_dict)
    translated = {}
    for name, tensor in state_dict.items():
        kind, _, rest = name.partition(".")
        if kind == "downsample_layers":
            stage, _, rest = rest.partition(".")
            name = f"stages.{stage}.downsample.{rest}" if stage != "0" else f"stem.{rest}"
        elif kind == "stages":
            stage, _, rest = rest.partition(".")
            name = f"stages.{stage}.blocks.{rest}"
        elif kind == "norm":
            name = f"head.{name}"
        elif kind == "head":
            name = f"head.fc.{rest}"
        translated[name] = tensor.flatten(1) if name.endswith(LINEAR) else tensor
    return translated


def official_state_dict(model: AttNet) -> dict[str, Tensor]:
    """Returns the weights by the official names and shapes, which the published code loads."""
    translated = {}
    for name, tensor in model.state_dict().items():
        official = name.replace("stem.", "downsample_layers.0.", 1)
        kind, _, rest = name.partition(".")
        if kind == "stages":
            stage, part, rest = rest.split(".", 2)
            official = f"downsample_layers.{stage}.{rest}" if part == "downsample" else f"stages.{stage}.{rest}"
        elif kind == "head":
            official = rest if rest.startswith("norm.") else f"head.{rest.removeprefix('fc.')}"
        translated[official] = tensor[:, :, None, None] if name.endswith(LINEAR) else tensor
    return translated


def _accept_official_names(model, state_dict, prefix, *_):
    """Lets `load_state_dict`, and with it all of timm's loaders, take official weights."""
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    translated = checkpoint_filter_fn({name.removeprefix(prefix): tensor for name, tensor in own.items()})
    for name in own:
        del state_dict[name]
    state_dict.update({prefix + name: tensor for name, tensor in translated.items()})


# ------------------------------------------------------------------------------------------------------- presets


def _cfg(**kwargs) -> dict:
    return dict(
        url="",  # the published weights are not at an address that a program can read
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stem.0.0",
        classifier="head.fc",
        license="mit",
        origin_url="https://github.com/price112/Attentive-Convolution",
        paper_ids="arXiv:2510.20092",
        **kwargs,
    )


PRESETS: dict[str, dict] = {  # the published table, in which XXS, XS and S differ in layer scale
    "attnet_xxs": dict(depths=(2, 2, 4, 2), dims=(32, 64, 128, 240)),
    "attnet_xs": dict(depths=(2, 2, 7, 2), dims=(40, 80, 160, 320), layer_scale=True),
    "attnet_s": dict(depths=(2, 3, 10, 3), dims=(40, 80, 160, 320)),
    "attnet_t1": dict(depths=(2, 3, 12, 3), dims=(48, 96, 224, 384), layer_scale=True, mlp_norm=True),
    "attnet_t2": dict(depths=(3, 3, 16, 3), dims=(64, 128, 288, 512), layer_scale=True, mlp_norm=True),
    "attnet_t3": dict(depths=(4, 4, 26, 4), dims=(72, 144, 320, 576), layer_scale=True, mlp_norm=True),
    "attnet_t4": dict(depths=(5, 5, 28, 5), dims=(96, 192, 384, 768), layer_scale=True, mlp_norm=True),
}
default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg() for name in PRESETS})


def _create(
    name: str,
    pretrained: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> AttNet:
    with contextlib.nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            AttNet,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
            **{**PRESETS[name], **kwargs},
        )
    return model if dtype is None else model.to(dtype)


@register_model
def attnet_xxs(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-XXS: 2.9M parameters, 0.50 GMACs at 224 px."""
    return _create("attnet_xxs", pretrained, **kwargs)


@register_model
def attnet_xs(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-XS: 5.6M parameters, 0.94 GMACs at 224 px."""
    return _create("attnet_xs", pretrained, **kwargs)


@register_model
def attnet_s(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-S: 7.7M parameters, 1.24 GMACs at 224 px."""
    return _create("attnet_s", pretrained, **kwargs)


@register_model
def attnet_t1(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-T1: 13.7M parameters, 2.26 GMACs at 224 px."""
    return _create("attnet_t1", pretrained, **kwargs)


@register_model
def attnet_t2(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-T2: 27.0M parameters, 4.73 GMACs at 224 px."""
    return _create("attnet_t2", pretrained, **kwargs)


@register_model
def attnet_t3(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-T3: 49.2M parameters, 8.70 GMACs at 224 px."""
    return _create("attnet_t3", pretrained, **kwargs)


@register_model
def attnet_t4(pretrained: bool = False, **kwargs) -> AttNet:
    """Builds AttNet-T4: 87.3M parameters, 15.55 GMACs at 224 px."""
    return _create("attnet_t4", pretrained, **kwargs)
