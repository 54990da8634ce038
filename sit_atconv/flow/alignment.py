"""Alignment of hidden tokens with representations of the clean image, beside any objective.

REPA (arXiv 2410.06940), iREPA (2512.10794), early stop (HASTE, 2505.16792), alignment with the latents themselves
(after 2601.17830), with the model's own EMA (SRA, 2505.02831), and the dispersive loss (2506.09027).

accelerate launch sit_atconv/train.py --auxiliary Alignment --auxiliary.encoder dinov2-vit-b
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.encoders.by_name import canonical, identity_of, open_encoder
from sit_atconv.flow.auxiliary import AuxiliaryInputs, AuxiliaryLoss, Extra
from sit_atconv.runtime.settings import short

# --------------------------------------------------------------------------------------------------- mathematics


def negative_cosine(projected: Tensor, target: Tensor) -> Tensor:
    """Returns minus the mean cosine over tokens (B,), computed in float32; REPA, equation 8.

    Args:
        projected, target: tokens (B, N, width).
    """
    with torch.autocast(projected.device.type, enabled=False):
        cosines = (F.normalize(projected.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)  # (B, N)
        return -cosines.mean(1)


def spatially_normalised(tokens: Tensor, strength: float) -> Tensor:
    """Removes a share of the mean over tokens, and scales to unit deviation over tokens (iREPA).

    Args:
        tokens: (B, N, width).
        strength: in [0, 1]; iREPA uses 0.6.
    """
    tokens = tokens.float()
    return (tokens - strength * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)


def dispersive_loss(hidden: Tensor, temperature: float = 0.5) -> Tensor:
    """Returns log mean_ij exp(-||h_i - h_j||^2 / (d temperature)), 0-d (arXiv 2506.09027).

    Args:
        hidden: tokens (B, N, D); a sample is their vector of length d = N D, and all pairs count.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        h = hidden.float().flatten(1)  # (B, d)
        h = h - h.mean(0)  # changes no distance, and keeps the products small
        squares = h.square().sum(1)  # (B,)
        distances = (squares[:, None] + squares - 2 * h @ h.T).clamp_min(0) / h.shape[1]  # (B, B)
        return torch.logsumexp(-distances.flatten() / temperature, 0) - 2 * math.log(len(h))


def patches(latents: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Returns the patches of latents (B, C, H, W) as tokens (B, N, p * p * C)."""
    h, w = grid_size
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", h=h, w=w)


# ---------------------------------------------------------------------------------------------------- projectors


class MLPProjector(nn.Sequential):
    """Projector of REPA: tokens (B, N, hidden_size) -> (B, N, width)."""

    def __init__(self, hidden_size: int, width: int, grid_size: tuple[int, int], inner: int = 2048):
        super().__init__(
            nn.Linear(hidden_size, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, width)
        )


class ConvProjector(nn.Conv2d):
    """Projector of iREPA, a 3x3 convolution on the grid: tokens (B, N, hidden_size) -> (B, N, width)."""

    def __init__(self, hidden_size: int, width: int, grid_size: tuple[int, int]):
        super().__init__(hidden_size, width, kernel_size=3, padding=1)
        self.grid_size = grid_size

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT.unflatten(2, self.grid_size)).flatten(2).mT


PROJECTORS = {"mlp": MLPProjector, "conv": ConvProjector}


# ---------------------------------------------------------------------------------------------------------- loss


class Alignment(AuxiliaryLoss):
    """Alignment of the tokens after one block with a representation of the clean image.

    Args:
        target: what the tokens are aligned with: "encoder", tokens of frozen image encoders (REPA); "vae", the clean
            latents (or pixels) themselves, without an encoder; "self", a later block of the model's EMA at a time
            nearer to data (SRA).
        encoder: name of the encoder, or several, whose losses are averaged: REPA's names such as dinov2-vit-b, any
            vision transformer of timm, "digits" or "fashion" (shipped), or your own `ImageEncoder` as module.NAME.
        encoder_weights: file of its weights, or one for each encoder; null takes those of timm's hub.
        block: number of the aligned block, counted from 1; null is a third of the depth, at most 8, as in REPA: 4 of 12
            blocks, 8 of 24 or 28.
        projector: "mlp" as REPA (three layers), "conv" as iREPA (one 3x3 convolution).
        spatial_norm: share of the mean over tokens that is removed from the target, before it is scaled to unit
            deviation over tokens: 0.6 as iREPA; 0 changes nothing.
        coefficient: weight of the alignment; 0 switches it off, and loads no encoder.
        last_step: last step with alignment and dispersive loss; null is all steps.
        teacher_block: number of the EMA's block for the target "self"; null is 20 of 28 blocks, and in proportion.
        dispersive: weight of the dispersive loss on the same block, which needs no target; 0.5 as published.
    """

    def __init__(
        self,
        target: Literal["encoder", "vae", "self"] = "encoder",
        encoder: str | list[str] = "dinov2-vit-b",
        encoder_weights: str | list[str] | None = None,
        block: int | None = None,
        projector: Literal["mlp", "conv"] = "mlp",
        spatial_norm: float = 0.0,
        coefficient: float = 0.5,
        last_step: int | None = None,
        teacher_block: int | None = None,
        dispersive: float = 0.0,
    ):
        super().__init__()
        for name, value in (("coefficient", coefficient), ("dispersive", dispersive)):
            if not 0 <= value < math.inf:
                raise ValueError(f"auxiliary.{name} must be finite and not negative, not {value}")
        if not 0 <= spatial_norm <= 1:
            raise ValueError(f"auxiliary.spatial_norm must be in [0, 1], not {spatial_norm}")
        if last_step is not None and last_step < 1:
            raise ValueError(f"auxiliary.last_step must be at least 1, not {last_step}")
        self.target, self.projector, self.spatial_norm = target, projector, spatial_norm
        self.names = [canonical(name) for name in ([encoder] if isinstance(encoder, str) else encoder)]
        given = {"encoder_weights": (encoder_weights, "encoder"), "teacher_block": (teacher_block, "self")}
        for option, (chosen, owner) in given.items():
            if chosen is not None and target != owner:
                raise ValueError(f"auxiliary.{option} is for the target {owner}, not {target}: leave it out")
        if not self.names:
            raise ValueError("auxiliary.encoder names no encoder: give one, or --auxiliary.target vae or self")
        files = [encoder_weights] if isinstance(encoder_weights, str) else encoder_weights
        self.files: Sequence[str | None] = files or [None] * len(self.names)
        if len(self.files) != len(self.names):
            raise ValueError(
                f"auxiliary.encoder_weights must be one file for each encoder: {len(self.names)} encoders, "
                f"{len(self.files)} files"
            )
        self.weights = [identity_of(file) for file in self.files] if coefficient > 0 and target == "encoder" else []
        self.block, self.teacher_block = block, teacher_block
        self.coefficient, self.last_step, self.dispersive = coefficient, last_step, dispersive
        self.enabled, self.couples_samples = coefficient + dispersive > 0, dispersive > 0
        self.stored: Mapping | None = None  # features of the encoder that the data hold
        self.encoders, self.projectors = nn.ModuleList(), nn.ModuleList()  # filled by `build`

    def is_active(self, step: int) -> bool:
        return self.last_step is None or step < self.last_step

    def check(self, net: Any, features: Mapping | None) -> Extra | None:
        """Chooses blocks and source of the target. ValueError: a block or stored features do not fit."""
        depth = net.config.depth
        if self.block is None:
            self.block = min(8, max(1, depth // 3))
        if self.teacher_block is None:
            self.teacher_block = max(1, round(depth * 20 / 28))
        for name in ("block", "teacher_block"):
            if not 1 <= getattr(self, name) <= depth:
                raise ValueError(
                    f"auxiliary.{name} is {getattr(self, name)}, and the model has the blocks 1 to {depth}"
                )
        if self.target != "encoder" or self.coefficient == 0:
            return None
        self.stored = features if features and [features["encoder"]] == self.names else None
        if self.stored is None:
            return "pixels"
        if (grid := tuple(self.stored["grid_size"])) != net.grid_size:
            raise ValueError(
                f"the latents hold features on a grid of {grid[0]}x{grid[1]}, and the model has "
                f"{net.grid_size[0]}x{net.grid_size[1]} tokens: encode with --features-grid {net.grid_size[0]}"
            )
        if self.stored["weights"] != self.weights[0]:
            there, here = (short(weights) for weights in (self.stored["weights"], self.weights[0]))
            raise ValueError(
                f"the latents hold features of {self.names[0]} with other weights, {there} and not {here}: give "
                "the same file to auxiliary.encoder_weights as to --features-weights, or encode again"
            )
        self.features_shape = math.prod(grid), self.stored["width"]
        return "features"

    def build(self, net: Any) -> None:
        """Creates the projectors, whose linear layers start as SiT's, and opens the encoders."""
        hidden_size, self.grid_size = net.config.hidden_size, net.grid_size
        widths = list[int]()
        if self.coefficient > 0 and self.target == "encoder":
            if self.stored is not None:
                widths = [self.stored["width"]]
            else:
                pairs = zip(self.names, self.files, strict=True)
                opened = [open_encoder(*pair, self.grid_size, self.image_shape) for pair in pairs]
                self.encoders.extend(opened)
                widths = [encoder.width for encoder in opened]
        elif self.coefficient > 0:
            widths = [hidden_size if self.target == "self" else net.config.in_channels * net.config.patch_size**2]
        self.projectors.extend(PROJECTORS[self.projector](hidden_size, n, self.grid_size) for n in widths)
        for layer in self.projectors.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def describe(self) -> dict:
        """Returns names and weights of the encoders, and whether their tokens are stored."""
        if self.coefficient == 0 or self.target != "encoder":
            return {}
        encoders = [list(pair) for pair in zip(self.names, self.weights, strict=True)]
        return {"encoders": encoders, "from": "features" if self.stored else "pixels"}

    def train(self, mode: bool = True) -> "Alignment":
        """Sets the mode of the projectors; encoders stay in evaluation mode."""
        super().train(mode)
        self.encoders.eval()
        return self

    def forward(self, inputs: AuxiliaryInputs) -> dict[str, Tensor]:
        assert inputs.hidden is not None
        terms = {}
        if self.coefficient > 0:
            targets = self.targets(inputs)
            losses = [
                self.distance(
                    projector(inputs.hidden), spatially_normalised(z, self.spatial_norm) if self.spatial_norm else z
                )
                for projector, z in zip(self.projectors, targets, strict=True)
            ]
            terms["alignment"] = self.coefficient * torch.stack(losses).mean(0)  # (B,)
        if self.dispersive > 0:
            terms["dispersive"] = self.dispersive * dispersive_loss(inputs.hidden).expand(len(inputs.data))  # (B,)
        return terms

    def distance(self, projected: Tensor, z: Tensor) -> Tensor:
        """Returns minus the cosine, or for the target "self" SRA's smooth L1 distance, of each sample (B,)."""
        if self.target != "self":
            return negative_cosine(projected, z)
        return F.smooth_l1_loss(projected.float(), z.float(), beta=0.05, reduction="none").mean((1, 2))

    @torch.no_grad()
    def targets(self, inputs: AuxiliaryInputs) -> list[Tensor]:
        """Returns the tokens (B, N, width) that each projector is aligned with."""
        if self.target == "vae":
            return [patches(inputs.data, self.grid_size)]
        if self.target == "self":
            draw = inputs.draw
            t = (draw.t + 0.2 * inputs.random).clamp(max=1.0)  # nearer to data than the model's
            x = inputs.objective.interpolant.interpolate(inputs.data, draw.noise, t)
            return [inputs.average(x, t, inputs.y, return_hidden=self.teacher_block)[1]]
        if inputs.features is not None:
            return [inputs.features]
        return [encoder(inputs.pixels) for encoder in self.encoders]

    def multiply_adds(self, net: Any) -> float:
        """Returns the forwards of encoder or EMA, and forward and backward of the projectors, for one image."""
        device, counted = next(net.parameters()).device, SDPBackend.MATH  # fused attention is not counted on a CPU
        with sdpa_kernel(counted), FlopCounterMode(display=False) as frozen, torch.no_grad():
            for encoder in self.encoders:
                encoder(torch.zeros(1, *self.image_shape, device=device))
            if self.target == "self":
                zero, side = torch.zeros(1, device=device), net.config.input_size
                net(torch.zeros(1, net.config.in_channels, side, side, device=device), zero, zero.long())
        with FlopCounterMode(display=False) as trained, torch.no_grad():
            for projector in self.projectors:
                projector(torch.zeros(1, math.prod(self.grid_size), net.config.hidden_size, device=device))
        return (frozen.get_total_flops() + 3 * trained.get_total_flops()) / 2
