"""SiT, Scalable Interpolant Transformer (arXiv 2401.08740), with ATConv or attention as the token mixer of each block.

Parameter names and initialisation are those published, so that published weights load as they are.
"""

import math

import torch
import torch.nn as nn
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from torch import Tensor

from sit_atconv.models.constants import kept
from sit_atconv.models.mixers import MIXERS, mixer_names
from sit_atconv.models.presets import preset_config
from sit_atconv.runtime.tables import Table

# ---------------------------------------------------------------------------------------------------- embeddings

class TimestepEmbedder(nn.Module):
    """Times t in [0, 1] as cosines and sines of geometric frequencies, then an MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D), of features in `dtype`"""
        exponents = torch.arange(self.num_frequencies, device=t.device, dtype=torch.float32) / self.num_frequencies
        angles = t[:, None].float() * torch.exp(-math.log(10000.0) * exponents)     # (B, F)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)                  # (B, 2F)
        return self.mlp(features.to(dtype))                                         # (B, D)


class LabelEmbedder(nn.Module):
    """A learned row for each label; the row after the last class, if there is one, is the null label's."""

    def __init__(self, num_rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) -> (B, D)"""
        return self.embedding_table(y)


def sincos_pos_embed(hidden_size: int, grid_size: tuple[int, int]) -> Tensor:
    """The fixed position table (1, H*W, D): sines and cosines of the column, then of the row."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    row, column = torch.meshgrid(rows, columns, indexing="ij")                      # (H, W) each
    exponents = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4)
    frequencies = 10000.0**-exponents                                               # (D/4,)
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies                              # (H*W, D/4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1)[None].float()


@kept
def pos_embed_on(hidden_size: int, grid_size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`sincos_pos_embed` on a device."""
    return sincos_pos_embed(hidden_size, grid_size).to(device, dtype)


# --------------------------------------------------------------------------------------------------------- block

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) scaled and shifted for each sample by (B, D): x * (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch (B, N, D), with a gate (B, D) for each sample, in one pass."""
    with torch.autocast(x.device.type, enabled=False):  # which would first copy the branch into the dtype of x
        return torch.addcmul(x, gate[:, None], branch)


class Block(nn.Module):
    """A transformer block conditioned by adaLN-zero (DiT, arXiv 2212.09748), with any token mixer."""

    def __init__(self, hidden_size: int, mlp_ratio: float, mixer: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = mixer  # the published name, whatever the mixer
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, grid_size: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)       # (B, D) each
        x = add_gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), grid_size))        # (B, N, D)
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))                 # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p*p*C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# --------------------------------------------------------------------------------------------------------- model

class SiT(ModelMixin, ConfigMixin):
    """Predicts the velocity (or what the objective asks for) of noisy images or latents, conditioned on time and class.

    A diffusers model: `save_pretrained`, `from_pretrained`, dtype and device handling come from there. Labels are
    never dropped in here, so `train()` and `eval()` give the same output. `enable_gradient_checkpointing()` has each
    block computed again in the backward: training keeps the blocks' inputs alone, for a third more arithmetic.

    Args:
        input_size: side of the square input seen in training; only the position table depends on it.
        patch_size: side of a patch; a token is one patch.
        in_channels: channels of the input (4 for SD-VAE latents).
        hidden_size: width D of the tokens.
        depth: number of blocks.
        num_heads: attention heads; blocks with ATConv have none.
        mlp_ratio: hidden width of the MLPs over D.
        num_classes: number of classes; labels are 0 ... num_classes - 1.
        learn_sigma: doubles the output channels; the second half is computed and dropped, as published.
        mixer: "atconv", "attention", another name in `mixers.MIXERS`, the path of an entry of yours, "my_module.NAME",
            in a module that is imported, "hybrid" (blocks 1, 3, 5, ... are ATConv) or a list of `depth` mixers.
        kernel_size: ATConv's kernel, odd.
        kernel_act: ATConv's activation, "gelu_tanh" or "silu".
        kernel_pool: ATConv's pooling, "raster" or "grid".
        use_pos_embed: sin-cos position embedding; None is the published rule: as soon as one block is attention,
            or another mixer that needs positions.
        qk_norm: layer norm on queries and keys.
        has_null_label: whether there is a null label for guidance, `null_label` = num_classes.

    Raises:
        ValueError: names or sizes that do not fit each other.
    """

    _supports_gradient_checkpointing = True  # what diffusers asks

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        mixer: str | list[str] = "atconv",
        kernel_size: int = 3,
        kernel_act: str = "gelu_tanh",
        kernel_pool: str = "raster",
        use_pos_embed: bool | None = None,
        qk_norm: bool = False,
        has_null_label: bool = True,
    ):
        super().__init__()
        names = mixer_names(mixer, depth)
        if use_pos_embed is None:
            use_pos_embed = any(MIXERS.find(name).needs_positions for name in names)
        if use_pos_embed and hidden_size % 4:
            raise ValueError(f"a position embedding needs a hidden_size divisible by 4, not {hidden_size}")

        out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(None, patch_size, in_channels, hidden_size, strict_img_size=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + int(has_null_label), hidden_size)
        self.grid_size = self._grid_size(input_size, input_size)
        if use_pos_embed:
            self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, self.grid_size), requires_grad=False)
        else:
            self.register_parameter("pos_embed", None)
        self.blocks = nn.ModuleList(
            Block(hidden_size, mlp_ratio, MIXERS.find(name).build(hidden_size, self.config)) for name in names
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        self.gradient_checkpointing = False  # diffusers' switch, set by enable_gradient_checkpointing()
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SiT":
        """Builds a preset, e.g. `SiT.from_preset("SiT-ATConv-XL/2", num_classes=10)`.

        Raises:
            ValueError: there is no such preset; the message names the nearest.
        """
        return cls(**{**preset_config(name), **overrides})

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, for guidance; None in a model trained without one."""
        return self.config.num_classes if self.config.has_null_label else None

    def initialize_weights(self) -> None:
        """SiT's initialisation: every block starts as the identity and the whole model as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the linear map that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_hidden: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: noisy images or latents (B, C, H, W), on any grid; a floating type of any width.
            t: times (B,) in [0, 1]; 0 is noise, 1 is data.
            y: labels (B,), integers below num_classes, or `null_label`.
            return_hidden: number of a block, counted from 1, whose output to return as well.

        Returns:
            (B, C, H, W) in the dtype of `x`; with `return_hidden` also the tokens (B, N, D) after that block.

        Raises:
            ValueError: H or W is not divisible by the patch size.
        """
        grid_size = self._grid_size(*x.shape[-2:])
        dtype = self.x_embedder.proj.weight.dtype  # of the residual stream, under autocast too
        tokens = self.x_embedder(x.to(dtype)).to(dtype)                     # (B, N, D)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(grid_size)                    # (B, N, D)
        c = self.t_embedder(t, dtype) + self.y_embedder(y)                  # (B, D)
        hidden = None
        for number, block in enumerate(self.blocks, start=1):
            tokens = self._apply_block(block, tokens, c, grid_size)         # (B, N, D)
            hidden = tokens if number == return_hidden else hidden
        patches = self.final_layer(tokens, c)                               # (B, N, p*p*C_out)
        image = self._unpatchify(patches, grid_size)                        # (B, C_out, H, W)
        image = image[:, : self.config.in_channels].to(x.dtype)             # (B, C, H, W)
        return image if return_hidden is None else (image, hidden)

    def _apply_block(self, block: Block, tokens: Tensor, c: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, tokens, c, grid_size)
        return block(tokens, c, grid_size)

    def _grid_size(self, height: int, width: int) -> tuple[int, int]:
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"the input is {height}x{width}, and its sides must be divisible by patch_size {p}")
        return height // p, width // p

    def _positions(self, grid_size: tuple[int, int]) -> Tensor:
        if grid_size == self.grid_size:
            return self.pos_embed
        return pos_embed_on(self.config.hidden_size, grid_size, self.pos_embed.device, self.pos_embed.dtype)

    def _unpatchify(self, patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
        (h, w), p = grid_size, self.config.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


# A user's own is a subclass of SiT with the constructor's arguments that data and codec fill in, FROM_DATA.
BACKBONES = Table("backbone", type, {"SiT": SiT})
FROM_DATA = {"num_classes", "in_channels", "input_size"}
