"""SiT, Scalable Interpolant Transformer (arXiv 2401.08740), with a choice of token mixers.

Parameter names and initialisation are the published ones, so that published weights load unchanged.
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
    """Embedding of times t in [0, 1]: cosines and sines of geometric frequencies, then an MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeds times (B,) as (B, D); the MLP sees features in `dtype`."""
        exponents = torch.arange(self.num_frequencies, device=t.device, dtype=torch.float32) / self.num_frequencies
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angles = t[:, None] * torch.exp(-math.log(10000.0) * exponents)  # (B, F)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 2F)
        return self.mlp(features.to(dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """Embedding of labels: one learned row for each class, and one for the null label if the model has it."""

    def __init__(self, num_rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Embeds labels (B,) as (B, D)."""
        return self.embedding_table(y)


def sincos_pos_embed(hidden_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Returns the fixed position embedding (1, H*W, D): sines and cosines of the column, then of the row."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    row, column = torch.meshgrid(rows, columns, indexing="ij")  # (H, W) each
    exponents = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4)
    frequencies = 10000.0**-exponents  # (D/4,)
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies  # (H*W, D/4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1)[None].float()


@kept
def pos_embed_on(hidden_size: int, grid_size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns `sincos_pos_embed` on a device, cached."""
    return sincos_pos_embed(hidden_size, grid_size).to(device, dtype)


# --------------------------------------------------------------------------------------------------------- block


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x * (1 + scale) + shift for x (B, N, D), with scale and shift (B, D), in one pass."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Returns x + gate * branch (B, N, D), with a gate (B, D) per sample, in one pass."""
    with torch.autocast(x.device.type, enabled=False):  # autocast would first copy the branch to the dtype of x
        return torch.addcmul(x, gate[:, None], branch)


class Block(nn.Module):
    """Transformer block with adaLN-zero conditioning (DiT, arXiv 2212.09748) and any token mixer."""

    def __init__(self, hidden_size: int, mlp_ratio: float, mixer: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = mixer  # the published name, for any mixer
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, grid_size: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (B, D) each
        x = add_gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), grid_size))  # (B, N, D)
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))  # (B, N, D)


class FinalLayer(nn.Module):
    """Output layer: tokens (B, N, D) -> patches (B, N, p*p*C)."""

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
    """SiT: predicts the velocity of noisy images or latents from time and class.

    It is a diffusers model with its `save_pretrained`, `from_pretrained`, dtype and device handling. The model never
    drops labels (the objective does), so `train()` and `eval()` give the same output. With
    `enable_gradient_checkpointing()`, training keeps only the inputs of blocks and computes each block again in the
    backward, which costs a third more arithmetic.

    Args:
        input_size: side of the square training inputs; only the position embedding depends on it.
        patch_size: side of a patch; each patch is one token.
        in_channels: channels of the input (4 for SD-VAE latents).
        hidden_size: width D of the tokens.
        depth: number of blocks.
        num_heads: number of attention heads; ATConv blocks ignore it.
        mlp_ratio: hidden width of the MLPs, in units of D.
        num_classes: number of classes; labels are 0 ... num_classes - 1.
        learn_sigma: double the output channels, as published; the second half is computed and dropped.
        mixer: token mixer of the blocks: "atconv", "attention", another name in `mixers.MIXERS`, the path
            "my_module.NAME" of your own entry in an imported module, "hybrid" (blocks 1, 3, 5, ... are ATConv),
            "sparse-hybrid" (blocks 3, 9, 15, ... are attention), or a
            list of `depth` of these.
        kernel_size: side of ATConv's kernel, odd.
        kernel_act: activation in ATConv's kernel generator, "gelu_tanh", "gelu" or "silu".
        kernel_pool: pooling in ATConv's kernel generator, "raster" or "grid".
        kernel_inhibition: lateral inhibition of ATConv's kernels, "learned" or "none".
        kernels: ATConv's kernels, "dynamic" (generated from the content) or "static" (learned, one for each channel,
            without `kernel_act` and `kernel_pool`).
        use_pos_embed: add a sin-cos position embedding; None adds it if any mixer needs positions, as attention does
            (the published rule).
        qk_norm: apply layer norm to queries and keys.
        has_null_label: add a null label for guidance, `null_label` = num_classes.
        two_times: add an embedding of r - t, for models that jump from time t to r (MeanFlow, arXiv 2505.13447). It
            starts as zero, so that the model first computes what it computes without it.

    Raises:
        ValueError: a name is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True  # read by diffusers

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
        kernel_inhibition: str = "learned",
        kernels: str = "dynamic",
        use_pos_embed: bool | None = None,
        qk_norm: bool = False,
        has_null_label: bool = True,
        two_times: bool = False,
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
        self.r_embedder = TimestepEmbedder(hidden_size) if two_times else None
        self.gradient_checkpointing = False  # diffusers' switch, set by enable_gradient_checkpointing()
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SiT":
        """Builds a preset, e.g. `SiT.from_preset("SiT-ATConv-XL/2", num_classes=10)`.

        Raises:
            ValueError: there is no such preset; the message names similar ones.
        """
        return cls(**{**preset_config(name), **overrides})

    @property
    def null_label(self) -> int | None:
        """Label for "no class" in classifier-free guidance; None if the model has none."""
        return self.config.num_classes if self.config.has_null_label else None

    def initialize_weights(self) -> None:
        """Initialises as SiT: every block starts as the identity, and the model outputs zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        if self.r_embedder is not None:
            nn.init.normal_(self.r_embedder.mlp[0].get_parameter("weight"), std=0.02)
            nn.init.zeros_(self.r_embedder.mlp[2].get_parameter("weight"))
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, return_hidden: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts the velocity, or whatever else the objective trains.

        Args:
            x: noisy images or latents (B, C, H, W) of any size and floating dtype.
            t: times (B,) in [0, 1]; 0 is noise, 1 is data.
            y: integer labels (B,) below num_classes, or `null_label`.
            r: ends (B,) of the intervals that begin at t, for a model with two times, which then predicts the average
                velocity from t to r. None means r = t, the velocity itself.
            return_hidden: also return the tokens after this block, counted from 1.

        Returns:
            (B, C, H, W) in the dtype of `x`; with `return_hidden` also the tokens (B, N, D).

        Raises:
            ValueError: H or W is not divisible by the patch size, or `r` is given to a model with one time.
        """
        grid_size = self._grid_size(*x.shape[-2:])
        dtype = self.x_embedder.proj.weight.dtype  # dtype of the residual stream, also under autocast
        tokens = self.x_embedder(x.to(dtype)).to(dtype)  # (B, N, D)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(grid_size)  # (B, N, D)
        c = self.t_embedder(t, dtype) + self.y_embedder(y)  # (B, D)
        if self.r_embedder is not None:
            c = c + self.r_embedder(torch.zeros_like(t) if r is None else r - t, dtype)  # (B, D)
        elif r is not None:
            raise ValueError("this model has one time: build it with two_times=True")
        hidden = tokens
        for number, block in enumerate(self.blocks, start=1):
            tokens = self._apply_block(block, tokens, c, grid_size)  # (B, N, D)
            hidden = tokens if number == return_hidden else hidden
        patches = self.final_layer(tokens, c)  # (B, N, p*p*C_out)
        image = self._unpatchify(patches, grid_size)  # (B, C_out, H, W)
        image = image[:, : self.config.in_channels].to(x.dtype)  # (B, C, H, W)
        return image if return_hidden is None else (image, hidden)

    def _apply_block(self, block: nn.Module, tokens: Tensor, c: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, tokens, c, grid_size)
        return block(tokens, c, grid_size)

    def _grid_size(self, height: int, width: int) -> tuple[int, int]:
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"the sides of the {height}x{width} input must be divisible by patch_size {p}")
        return height // p, width // p

    def _positions(self, grid_size: tuple[int, int]) -> Tensor:
        if grid_size == self.grid_size:
            return self.pos_embed
        return pos_embed_on(self.config.hidden_size, grid_size, self.pos_embed.device, self.pos_embed.dtype)

    def _unpatchify(self, patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
        (h, w), p = grid_size, self.config.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


# A user's backbone is a subclass of SiT whose constructor takes FROM_DATA, the arguments that data and codec fill in.
BACKBONES = Table("backbone", type, {"SiT": SiT})
FROM_DATA = {"num_classes", "in_channels", "input_size"}
# Options that earlier versions did not record, and what they computed: records leave out these values, to stay equal.
LATER_OPTIONS = {"kernel_inhibition": "learned", "kernels": "dynamic", "two_times": False}
