"""The Vision Transformer of "An Image is Worth 16x16 Words" (Dosovitskiy et al., arXiv 2010.11929).

    B   images in a batch            D    width, the length of a token
    C   channels of an image         L    depth, the number of encoder blocks
    H   height of an image, pixels   h    attention heads
    W   width of an image, pixels    D_h  length of a head's queries, keys and values, D / h
    P   side of a patch, pixels      T    tokens: N + 1 with a class token, N with mean pooling
    N   patches, H W / P^2           K    classes

The classes stand in the order in which an image meets them, with the paper's equations:

    PatchEmbedding            z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos               Eq. 1
    MultiHeadSelfAttention    q, k, v = z U_qkv;  A = softmax(q k^T / sqrt(D_h));
                              SA(z) = A v;  MSA(z) = [SA_1; ...; SA_h] U_msa               Eqs. 5-8
    MLP                       two linear layers with a GELU between them
    EncoderBlock              z'_l = MSA(LN(z_{l-1})) + z_{l-1};
                              z_l = MLP(LN(z'_l)) + z'_l                                   Eqs. 2-3
    ViT                       y = LN(z_L^0), and a linear head on it                       Eq. 4

    python src/ViT.py                                  every stage of a small model, with its shape
    python src/ViT.py --model base --patch-size 16 --image-size 224
"""

import argparse
import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base import GELU, DropPath

# Base, large and huge are the paper's Table 1, tiny and small DeiT's (arXiv 2012.12877); micro is
# for the demo.
MODELS = {
    "micro": {"width": 64, "depth": 4, "heads": 4},
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}

LAYER_NORM_EPSILON = 1e-6  # the reference code's; torch's default is 1e-5


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Everything that determines a model's shape. The defaults are ViT-Ti/4 for CIFAR-10.

    `image_size` takes a pair (H, W) or one number for a square; it is kept as a pair.

    Raises:
        ValueError: an option, alone or with another, makes no model; the message names the values.
    """

    image_size: Annotated[int | tuple[int, int], "H and W in pixels: one number, or HxW"] = (32, 32)
    patch_size: Annotated[int, "P, the side of a patch in pixels"] = 4
    channels: Annotated[int, "C, channels of an image"] = 3
    classes: Annotated[int, "K, the number of classes"] = 10
    width: Annotated[int, "D, the length of a token"] = 192
    depth: Annotated[int, "L, the number of encoder blocks"] = 12
    heads: Annotated[int, "h, attention heads a block; they share D between them"] = 3
    mlp_ratio: Annotated[float, "hidden width of the MLP over D"] = 4.0
    dropout: Annotated[float, "dropout after the embedding, the attention and the MLP layers"] = 0.0
    attention_dropout: Annotated[float, "dropout on the attention weights A"] = 0.0
    drop_path: Annotated[float, "stochastic depth: rate of the last block, rising from 0"] = 0.0
    qkv_bias: Annotated[bool, "a bias on queries, keys and values"] = True
    pooling: Annotated[
        Literal["class", "mean"], "what the head reads: a class token, or the mean of the patches"
    ] = "class"
    positions: Annotated[
        Literal["learned", "sincos"], "position embedding: learned 1-D, or fixed 2-D sine-cosine"
    ] = "learned"

    def __post_init__(self):
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        object.__setattr__(self, "image_size", tuple(self.image_size))
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be two positive numbers, not {self.image_size}")
        for name in ("patch_size", "channels", "classes", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image_size {height}x{width} must be a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if not 1 <= self.mlp_ratio * self.width < math.inf:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} gives no hidden width at width {self.width}"
            )
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, not {getattr(self, name)}"
                )
        for name, known in (("pooling", ("class", "mean")), ("positions", ("learned", "sincos"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"sincos positions need a width divisible by 4, not {self.width}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across, (H / P, W / P)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """N, the patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """T, the tokens a block sees: the patches, and the class token where there is one."""
        return self.patches + (self.pooling == "class")

    @property
    def hidden(self) -> int:
        """The width inside the MLP."""
        return round(self.mlp_ratio * self.width)


# ---------------------------------------------------------------------------- patches (Eq. 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches, row by row, each flattened channel first.

    Args:
        images: (B, C, H, W), H and W multiples of `patch_size`.

    Returns:
        (B, N, C P P)
    """
    B, C, H, W = images.shape
    P = patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
    return patches.reshape(B, (H // P) * (W // P), C * P * P)  # (B, N, C P P)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D position embedding, as in the plain ViT of Beyer et al. (arXiv 2205.01580).

    A quarter of the dimensions each for sine and cosine of the column and of the row, at D/4
    frequencies from 1 down to 1/10000.

    Returns:
        (N, D) in the order of `patchify`
    """
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64),
        torch.arange(grid[1], dtype=torch.float64),
        indexing="ij",
    )
    steps = torch.arange(width // 4, dtype=torch.float64) / max(width // 4 - 1, 1)
    frequencies = 10_000.0**-steps  # (D/4,)
    angles_x = columns.reshape(-1, 1) * frequencies  # (N, D/4)
    angles_y = rows.reshape(-1, 1) * frequencies
    parts = [angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()]
    return torch.cat(parts, dim=1).float()  # (N, D)


def patches_kept(patches: int, patch_dropout: float) -> int:
    """How many of an image's patches are left in training; one at least."""
    return max(1, round(patches * (1 - patch_dropout)))


class PatchEmbedding(nn.Module):
    """Eq. 1: patches through one linear map E, the class token before them, positions added.

    Raises:
        ValueError: images of another size, whose patches would meet the wrong positions.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.image_shape = (config.channels, *config.image_size)
        self.patch_size = config.patch_size
        self.patch_dropout = 0.0  # a trainer's to set; see `drop_patches`
        self.projection = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.class_token = None
        if config.pooling == "class":
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, config.tokens, config.width))
        else:
            positions = sincos_positions(config.grid, config.width)
            # A class token comes first, and its position is 0.
            positions = F.pad(positions, (0, 0, config.tokens - len(positions), 0))
            self.register_buffer("positions", positions[None], persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images are {tuple(images.shape[1:])}, not {self.image_shape}")
        z = self.projection(patchify(images, self.patch_size))  # (B, N, D)
        if self.class_token is not None:
            z = torch.cat([self.class_token.expand(len(z), -1, -1), z], dim=1)  # (B, N+1, D)
        z = self.dropout(z + self.positions)  # (B, T, D)
        return self.drop_patches(z) if self.training and self.patch_dropout else z

    def drop_patches(self, z: Tensor) -> Tensor:
        """Leaves a share of the patches out, at random in each image; the others know their place.

        PatchDropout (Liu et al., arXiv 2208.07220): a step costs what is left, and each image is
        seen in other parts each time. (B, T, D) to (B, class token and `patches_kept`, D).
        """
        B, T, D = z.shape
        first = 0 if self.class_token is None else 1  # the class token stays
        kept = patches_kept(T - first, self.patch_dropout)
        draw = torch.rand(B, T - first, device=z.device)
        rows = draw.argsort(dim=1)[:, :kept] + first  # (B, kept)
        patches = z.gather(1, rows[:, :, None].expand(-1, -1, D))  # (B, kept, D)
        return torch.cat([z[:, :first], patches], dim=1)


# ---------------------------------------------------------------------------- attention (Eqs. 5-8)


# On a CPU, plain products are quicker than the fused attention up to so many tokens; in bfloat16
# five times at T = 16 (forward + backward, torch 2.14, two Zen 4 cores).
PLAIN_TOKENS = 256


class MultiHeadSelfAttention(nn.Module):
    """Eqs. 5-8: every token asks (q), is found (k) and answers (v), in h heads at once."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)  # U_qkv
        self.output = nn.Linear(config.width, config.width)  # U_msa
        self.dropout = nn.Dropout(config.dropout)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 5: queries, keys and values, each (B, h, T, D_h)."""
        qkv = self.qkv(z).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, h, D_h)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, h, T, D_h)

    def written_out(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. 6-8 step by step: (B, T, D) to (B, T, D), and the weights A (B, h, T, T).

        Row i of A says how much token i takes from every token; it sums to 1.
        """
        q, k, v = self.split(z)
        A = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)  # (B, h, T, T)  Eq. 6
        heads = F.dropout(A, self.attention_dropout, self.training) @ v  # (B, h, T, D_h)  Eq. 7
        return self.merge(heads), A

    def merge(self, heads: Tensor) -> Tensor:
        """Eq. 8: heads (B, h, T, D_h), side by side and mixed, to (B, T, D)."""
        return self.dropout(self.output(heads.transpose(1, 2).flatten(2)))  # (B, T, D)

    def forward(self, z: Tensor) -> Tensor:  # (B, T, D)
        if z.device.type == "cpu" and z.shape[1] <= PLAIN_TOKENS:
            return self.written_out(z)[0]
        rate = self.attention_dropout if self.training else 0.0
        q, k, v = self.split(z)
        return self.merge(F.scaled_dot_product_attention(q, k, v, dropout_p=rate))  # Eqs. 6-7


# ---------------------------------------------------------------------------- encoder (Eqs. 2-3)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, the same for every token."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, config.hidden)
        self.activation = GELU()
        self.contract = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z: Tensor) -> Tensor:  # (B, T, D)
        z = self.dropout(self.activation(self.expand(z)))  # (B, T, mlp_ratio D)
        return self.dropout(self.contract(z))  # (B, T, D)


class EncoderBlock(nn.Module):
    """Eqs. 2-3: tokens exchange (attention), then each thinks alone (MLP); both add to z."""

    def __init__(self, config: ViTConfig, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.attention = MultiHeadSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:  # (B, T, D)
        z = z + self.drop_path(self.attention(self.norm1(z)))  # Eq. 2
        return z + self.drop_path(self.mlp(self.norm2(z)))  # Eq. 3

    def trace(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` with attention written out: tokens (B, T, D) and weights A (B, h, T, T)."""
        mixed, A = self.attention.written_out(self.norm1(z))
        z = z + self.drop_path(mixed)  # Eq. 2
        return z + self.drop_path(self.mlp(self.norm2(z))), A  # Eq. 3


# ---------------------------------------------------------------------------- the model (Eq. 4)


class Trace(NamedTuple):
    """What `ViT.trace` returns; every tensor is part of the graph that led to the logits."""

    logits: Tensor  # (B, K)
    attention: list[Tensor]  # L of (B, h, T, T): A of each block, first to last
    tokens: list[Tensor]  # L + 1 of (B, T, D): z_0, z_1, ..., z_L


class ViT(nn.Module):
    """Vision Transformer: image to class logits.

    Args:
        config: size and options.

    `forward` takes normalised images (B, C, H, W) of the config's size and returns logits (B, K).
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embed = PatchEmbedding(config)
        step = config.drop_path / max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(EncoderBlock(config, i * step) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPSILON)
        self.head = nn.Linear(config.width, config.classes)
        self.initialise()

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        z = self.embed(images)  # (B, T, D)  Eq. 1
        for block in self.blocks:
            z = block(z)  # (B, T, D)  Eqs. 2-3
        return self.head(self.norm(self.pool(z)))  # (B, K)  Eq. 4

    def pool(self, z: Tensor) -> Tensor:
        """The class token, z_L^0 in Eq. 4, or the mean of the patch tokens: (B, T, D) to (B, D).

        The reference code takes the mean after the LayerNorm; here, as in MAE, it is before.
        """
        return z[:, 0] if self.config.pooling == "class" else z.mean(dim=1)

    def trace(self, images: Tensor) -> Trace:
        """`forward` by the written-out attention, keeping what the pictures need."""
        tokens, attention = [self.embed(images)], []
        for block in self.blocks:
            z, A = block.trace(tokens[-1])
            tokens.append(z)
            attention.append(A)
        return Trace(self.head(self.norm(self.pool(tokens[-1]))), attention, tokens)

    @torch.no_grad()
    def initialise(self) -> None:
        """The paper's reference code (google-research/vision_transformer, models_vit.py).

        E: LeCun normal. q, k, v, output and MLP weights: Xavier uniform, q, k and v each as a D x D
        matrix of its own. MLP biases: normal, deviation 1e-6. Positions: normal, deviation 0.02.
        Class token, head and every other bias: zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        projection = self.embed.projection.weight
        # Cutting a normal at 2 deviations shrinks its deviation to 0.8796; dividing restores it.
        deviation = projection.shape[1] ** -0.5 / 0.87962566
        nn.init.trunc_normal_(projection, std=deviation, a=-2 * deviation, b=2 * deviation)
        if self.config.positions == "learned":
            nn.init.normal_(self.embed.positions, std=0.02)
        for block in self.blocks:
            for matrix in block.attention.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)
            nn.init.xavier_uniform_(block.attention.output.weight)
            for linear in (block.mlp.expand, block.mlp.contract):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def mimic_trained_attention(self) -> None:
        """Gives attention weights the products that trained ones have.

        Mimetic initialisation (Trockman & Kolter, arXiv 2305.09828): with Z of random numbers of
        variance 1/D, W_q W_k^T of each head is near 0.7 Z + 0.7 I, so that alike tokens attend to
        each other, and W_v W_msa is near 0.4 Z - 0.4 I. (These W stand right of z, as U_qkv and
        U_msa do; nn.Linear holds them transposed.)
        """
        D, heads = self.config.width, self.config.heads
        identity = torch.eye(D)
        for block in self.blocks:
            q, k, v = block.attention.qkv.weight.chunk(3)  # each (D, D), h times D_h rows
            for q_h, k_h in zip(q.chunk(heads), k.chunk(heads), strict=True):  # (D_h, D)
                left, right = _factors(0.7 * torch.randn(D, D) * D**-0.5 + 0.7 * identity)
                q_h.copy_(left.T[: len(q_h)])
                k_h.copy_(right[: len(k_h)])
            left, right = _factors(0.4 * torch.randn(D, D) * D**-0.5 - 0.4 * identity)
            v.copy_(left.T)
            block.attention.output.weight.copy_(right.T)


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of equal singular values whose product is the given one, the largest first."""
    U, S, Vh = torch.linalg.svd(matrix)
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


# ---------------------------------------------------------------------------- a first look


class Stage(NamedTuple):
    """A row of the table that `python src/ViT.py` prints."""

    name: str
    shape: tuple[int, ...]
    equation: str
    parameters: int


def stages(model: ViT) -> list[Stage]:
    """Every stage that one image goes through, with the shape it has there."""
    config, block = model.config, model.blocks[0]
    image = torch.zeros(1, config.channels, *config.image_size)
    logits, attention, tokens = model.trace(image)
    z = block.norm1(tokens[0])
    q, _, v = block.attention.split(z)
    count = parameters_of
    return [
        Stage("image", image.shape, "", 0),
        Stage("patches x_p", patchify(image, config.patch_size).shape, "1", 0),
        Stage("tokens z_0", tokens[0].shape, "1", count(model.embed)),
        Stage("block 1: LN(z)", z.shape, "2", count(block.norm1)),
        Stage("  q, k, v, each", q.shape, "5", count(block.attention.qkv)),
        Stage("  attention A", attention[0].shape, "6", 0),
        Stage("  heads A v", (attention[0] @ v).shape, "7", 0),
        Stage("  MSA, added to z", block.attention(z).shape, "8, 2", count(block.attention.output)),
        Stage("  LN(z')", block.norm2(z).shape, "3", count(block.norm2)),
        Stage("  GELU in the MLP", block.mlp.expand(z).shape, "3", count(block.mlp.expand)),
        Stage("  MLP, added to z'", block.mlp(z).shape, "3", count(block.mlp.contract)),
        Stage(f"blocks 2 to {config.depth}", tokens[-1].shape, "2-3", count(model.blocks[1:])),
        Stage("y = LN(pooled z_L)", model.pool(tokens[-1]).shape, "4", count(model.norm)),
        Stage("logits", logits.shape, "", count(model.head)),
    ]


def parameters_of(module: nn.Module) -> int:
    """How many numbers training changes in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prints every stage of a Vision Transformer.",
        usage=argparse.SUPPRESS,  # so that an error is one line
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--patch-size", type=int, default=4, metavar="P")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--classes", type=int, default=10, metavar="K")
    arguments = parser.parse_args()
    sizes = {name: value for name, value in vars(arguments).items() if name != "model"}
    try:
        config = ViTConfig(**MODELS[arguments.model], **sizes)
    except ValueError as error:
        parser.error(str(error))
    with torch.device("meta"):  # shapes alone: nothing is computed, whatever the size
        model = ViT(config).eval()
        table = stages(model)
    print(f"{'stage':22}{'shape':22}{'equation':>9}{'parameters':>14}")
    for name, shape, equation, parameters in table:
        held = f"{parameters:,}" if parameters else ""
        print(f"{name:22}{tuple(shape)!s:22}{equation:>9}{held:>14}")
    print(f"{'total':53}{parameters_of(model):>14,}")


if __name__ == "__main__":
    main()
