"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al., arXiv 2010.11929).

    B   images in a batch            D    width, the length of a token
    C   channels of an image         L    depth, the number of encoder blocks
    H   height of an image, pixels   h    attention heads
    W   width of an image, pixels    D_h  length of a head's queries, keys and values, D / h
    P   side of a patch, pixels      T    tokens: N + 1 with a class token, N with mean pooling
    N   patches, H W / P^2           K    classes
    z_l tokens after block l         A    attention weights, a row for each query

The classes follow the data flow, with the paper's equations:

    PatchEmbedding            z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos               Eq. 1
    MultiHeadSelfAttention    q, k, v = z U_qkv;  A = softmax(q k^T / sqrt(D_h));
                              SA(z) = A v;  MSA(z) = [SA_1; ...; SA_h] U_msa               Eqs. 5-8
    MLP                       two linear layers with a GELU between them
    EncoderBlock              z'_l = MSA(LN(z_{l-1})) + z_{l-1};
                              z_l = MLP(LN(z'_l)) + z'_l                                   Eqs. 2-3
    ViT                       y = LN(z_L^0), and a linear head on it                       Eq. 4

`ViTConfig`, after the classes, holds the sizes; `MODELS` lists named ones, such as the paper's.
"""

from __future__ import annotations  # the config is defined after the classes that use it

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base import GELU, DropPath
from config import Config
from utils import UserError

# ---------------------------------------------------------------------------- patches (Eq. 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images (B, C, H, W) into N patches, row by row, each flattened channel by channel."""
    B, C, H, W = images.shape
    P = patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P)  # (B, C, H/P, P, W/P, P)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
    return patches.reshape(B, (H // P) * (W // P), C * P * P)  # (B, N, C P P)


class PatchEmbedding(nn.Module):
    """Maps patches through one matrix E, prepends the class token and adds positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.image_shape = (config.channels, *config.image_size)
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.channels * config.patch_size**2, config.width)  # E
        # The class token belongs to no patch: attention collects in it what the head needs.
        self.cls_token = None
        if config.pooling == "class":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # Attention ignores the order of the tokens, so each carries its position.
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width))
        else:
            positions = sincos_positions(config.grid, config.width)  # (N, D)
            # The class token comes first; it is not in the grid, so its position is zeros.
            positions = F.pad(positions, (0, 0, config.tokens - len(positions), 0))  # (T, D)
            self.register_buffer("pos_embed", positions[None], persistent=False)  # (1, T, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:  # (B, C, H, W)
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images are {tuple(images.shape[1:])}, not {self.image_shape}")
        x = patchify(images, self.patch_size)  # (B, N, C P P)
        positions = self.pos_embed  # (1, T, D)
        if kept is not None:  # patch dropout: see ViT
            x, positions = self.only(kept, x)  # from here on, N and T count what is kept
        z = self.proj(x)  # (B, N, D)
        if self.cls_token is not None:
            z = torch.cat([self.cls_token.expand(len(z), -1, -1), z], dim=1)  # (B, N+1, D)
        return self.dropout(z + positions)  # (B, T, D)  Eq. 1

    def only(self, kept: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The patches that `kept` (B, n) lists, and the positions of the remaining tokens."""
        x = x.take_along_dim(kept[:, :, None], dim=1)  # (B, n, C P P)
        first = 0 if self.cls_token is None else 1  # the class token stays
        rows = F.pad(kept + first, (first, 0))  # (B, first + n)
        return x, self.pos_embed[0, rows]  # (B, n, C P P), (B, first + n, D)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D position embedding of Beyer et al. (arXiv 2205.01580), (N, D).

    The D dimensions are four quarters: sine and cosine of the column, sine and cosine of the
    row, each at D/4 frequencies from 1 down to 1/10000.
    """
    down, across = (torch.arange(n, dtype=torch.float64) for n in grid)
    rows, columns = torch.meshgrid(down, across, indexing="ij")  # (H/P, W/P) each
    steps = torch.arange(width // 4, dtype=torch.float64) / max(width // 4 - 1, 1)  # (D/4,)
    frequencies = 10_000.0**-steps  # (D/4,)
    x = columns.reshape(-1, 1) * frequencies  # (N, D/4)
    y = rows.reshape(-1, 1) * frequencies  # (N, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()  # (N, D)


# ---------------------------------------------------------------------------- attention (Eqs. 5-8)


class MultiHeadSelfAttention(nn.Module):
    """Each token asks with its query, is found by its key and answers with its value.

    The h heads have their own queries, keys and values, so they can look for different things.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.implementation = config.attention
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)  # U_qkv
        self.softmax = nn.Softmax(dim=-1)  # over the keys
        self.proj = nn.Linear(config.width, config.width)  # U_msa
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z: Tensor) -> Tensor:  # (B, T, D)
        qkv = self.qkv(z).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, h, D_h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 of (B, h, T, D_h)  Eq. 5
        rate = self.attention_dropout if self.training else 0.0
        # The softmax and the product with v are the only place where tokens exchange information.
        if self.is_plain(z):
            # With independent entries of variance 1, the product of q and k has variance D_h.
            # Dividing by sqrt(D_h) brings that back to 1; otherwise the softmax would saturate.
            A = self.softmax(q @ k.mT * q.shape[-1] ** -0.5)  # (B, h, T, T)  Eq. 6
            heads = F.dropout(A, rate) @ v  # (B, h, T, D_h)  Eq. 7
        else:  # the same in one kernel, which never holds all of A in memory
            heads = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)  # (B, h, T, D_h)
        # U_msa mixes what the heads found.
        return self.dropout(self.proj(heads.transpose(1, 2).flatten(2)))  # (B, T, D)  Eq. 8

    def is_plain(self, z: Tensor) -> bool:
        """Whether to compute A explicitly: on request, or where faster (`PLAIN_TOKENS`)."""
        short = z.device.type == "cpu" and z.shape[1] <= PLAIN_TOKENS
        return self.implementation == "plain" or (self.implementation == "auto" and short)


# ---------------------------------------------------------------------------- encoder (Eqs. 2-3)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, the same for every token."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.act = GELU()  # without it the two layers would collapse into one linear map
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z: Tensor) -> Tensor:  # (B, T, D)
        z = self.dropout(self.act(self.fc1(z)))  # (B, T, mlp_ratio D)
        return self.dropout(self.fc2(z))  # (B, T, D)


class EncoderBlock(nn.Module):
    """Attention mixes the tokens, then the MLP acts on each of them: two residual branches."""

    def __init__(self, config: ViTConfig, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.attn = MultiHeadSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:  # (B, T, D)
        # Residual: a branch only learns a change to z, and gradients flow past it unchanged.
        # Norm first: it keeps a branch's input at one scale and leaves the residual path alone.
        z = z + self.drop_path(self.attn(self.norm1(z)))  # Eq. 2
        z = z + self.drop_path(self.mlp(self.norm2(z)))  # Eq. 3
        return z


# ---------------------------------------------------------------------------- the model (Eq. 4)


class ViT(nn.Module):
    """Vision Transformer: normalized images (B, C, H, W) of the config's size to logits (B, K).

    With `kept` (B, n), it sees only the n patches of each image that `kept` lists. This makes a
    training step cheaper, and augments (PatchDropout, Liu et al., arXiv 2208.07220).
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embed = PatchEmbedding(config)
        step = config.drop_path / max(config.depth - 1, 1)  # rates rise linearly from 0
        self.blocks = nn.ModuleList(EncoderBlock(config, i * step) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.head = nn.Linear(config.width, config.classes)
        self.initialize()

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:  # (B, C, H, W)
        z = self.embed(images, kept)  # (B, T, D)
        for block in self.blocks:
            if self.config.checkpoint_activations and self.training:  # same numbers, less memory
                z = checkpoint(block, z, use_reentrant=False)  # (B, T, D)
            else:
                z = block(z)  # (B, T, D)
        # Nothing has normalized the residual sum z_L so far; the last norm does.
        return self.head(self.norm(self.pool(z)))  # (B, K)  Eq. 4

    def pool(self, z: Tensor) -> Tensor:  # (B, T, D)
        """The class token, z_L^0 in Eq. 4; in a model without one, the mean of the patches.

        With the mean, the head's gradient reaches every patch directly; small models here train
        better with it. It precedes the LayerNorm, as in MAE; in the reference code, it follows.
        """
        return z[:, 0] if self.config.pooling == "class" else z.mean(dim=1)  # (B, D)

    @torch.no_grad()
    def initialize(self) -> None:
        """As in the paper's reference code (google-research/vision_transformer, models_vit.py).

        E: LeCun normal. The blocks' matrices: Xavier uniform, with q, k and v as separate D x D
        matrices. MLP biases: normal, std 1e-6. Positions: normal, std 0.02. Class token, head
        and all other biases: zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Truncating a normal at 2 std shrinks its std to 0.8796; dividing restores it.
        std = self.embed.proj.in_features**-0.5 / 0.87962566
        nn.init.trunc_normal_(self.embed.proj.weight, std=std, a=-2 * std, b=2 * std)
        if self.config.positions == "learned":
            nn.init.normal_(self.embed.pos_embed, std=0.02)
        for block in self.blocks:
            for matrix in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)
            nn.init.xavier_uniform_(block.attn.proj.weight)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)


def parameters_of(module: nn.Module) -> int:
    """A module's parameter count."""
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------- the config

# Base, large and huge are from the paper's Table 1; tiny and small are from DeiT
# (arXiv 2012.12877); micro is for the demo.
MODELS = {
    "micro": {"width": 64, "depth": 4, "heads": 4},
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}
LAYER_NORM_EPSILON = 1e-6  # the reference code's; torch's default is 1e-5
# On a CPU, plain matrix products are faster than the fused kernel up to this many tokens: 5 times
# as fast at T = 16 in bfloat16 (forward + backward, torch 2.14, two Zen 4 cores).
PLAIN_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Config):
    """The model's shape and dropout. The defaults are ViT-Ti/4 for CIFAR-10.

    `image_size` takes a pair (H, W), or one number for a square; it is stored as a pair.
    """

    image_size: Annotated[int | tuple[int, int], "H and W in pixels: one number, or HxW"] = (32, 32)
    patch_size: Annotated[int, "P, the side of a patch in pixels", "[1, 8192]"] = 4
    channels: Annotated[int, "C, channels of an image", "[1, 1024]"] = 3
    classes: Annotated[int, "K, the number of classes", "[1, 1e6]"] = 10
    width: Annotated[int, "D, the length of a token", "[1, 32768]"] = 192
    depth: Annotated[int, "L, the number of encoder blocks", "[1, 1024]"] = 12
    heads: Annotated[int, "h, attention heads; D / h is the width of each", "[1, 1024]"] = 3
    mlp_ratio: Annotated[float, "the MLP's hidden width over D", "(0, 64]"] = 4.0
    dropout: Annotated[float, "after the embedding, attention and MLP layers", "[0, 1)"] = 0.0
    attention_dropout: Annotated[float, "dropout on the attention weights A", "[0, 1)"] = 0.0
    drop_path: Annotated[float, "stochastic depth: rate of the last block", "[0, 1)"] = 0.0
    qkv_bias: Annotated[bool, "a bias on queries, keys and values"] = True
    attention: Annotated[
        Literal["auto", "plain", "fused"],
        f"matrix products or the fused kernel; auto: plain on a CPU up to {PLAIN_TOKENS} tokens",
    ] = "auto"
    pooling: Annotated[Literal["class", "mean"], "class token, or mean of the patches"] = "class"
    positions: Annotated[Literal["learned", "sincos"], "learned, or fixed sine-cosine"] = "learned"
    checkpoint_activations: Annotated[
        bool, "recompute the blocks in the backward pass: less memory, a third more operations"
    ] = False

    def __post_init__(self):
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size,) * 2)  # as self is frozen
        super().__post_init__()
        (H, W), P = self.image_size, self.patch_size
        if min(H, W) < 1 or H % P or W % P:
            raise UserError(f"image_size {H}x{W} must be a multiple of patch_size {P}")
        if max(H, W) > 8192 or self.patches > 2**16:
            raise UserError(f"image_size {H}x{W} is above 8192, or above 65,536 patches of {P}x{P}")
        if (weights := self.depth * self.width * (4 * self.width + 2 * self.hidden)) > 1e11:
            raise UserError(f"{weights:,} weights of width {self.width} are more than 1e11")
        if self.width % self.heads:
            raise UserError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.positions == "sincos" and self.width % 4:
            raise UserError(f"sincos positions need a width divisible by 4, not {self.width}")
        if self.hidden < 1:
            raise UserError(f"mlp_ratio {self.mlp_ratio} times width {self.width} rounds to 0")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across, (H / P, W / P)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """N, the number of patches in an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """T, the number of tokens a block sees: the patches, and any class token."""
        return self.patches + (self.pooling == "class")

    @property
    def hidden(self) -> int:
        """The width inside the MLP."""
        return round(self.mlp_ratio * self.width)
