"""How to train: the options, and named sets of them that were tried."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ViT import MODELS, ViTConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything besides the model that determines a run's weights.

    Raises:
        ValueError: a value cannot be; the message names it.
    """

    dataset: Annotated[Literal["cifar10", "shapes"], "what to train on"] = "cifar10"
    validation_images: Annotated[int, "training images held out; 0 trains on all of them"] = 5000
    initialisation: Annotated[
        Literal["paper", "mimetic"], "the reference code's, or with attention as if it were trained"
    ] = "paper"
    epochs: Annotated[int, "times each training image is seen"] = 100
    batch_size: Annotated[int, "images a step, over all devices"] = 500
    accumulate: Annotated[
        int, "parts in which a batch goes through the model; the gradients add up to the same"
    ] = 1
    optimizer: Annotated[
        Literal["adamw", "muon"], "adamw for all, or muon for the matrices inside the blocks"
    ] = "adamw"
    learning_rate: Annotated[float, "AdamW's highest learning rate"] = 1e-3
    muon_learning_rate: Annotated[float, "Muon's highest learning rate"] = 0.02
    weight_decay: Annotated[float, "decoupled decay of the weight matrices, times the rate"] = 0.05
    warmup_epochs: Annotated[float, "epochs of linear warm-up from 0"] = 5.0
    schedule: Annotated[Literal["cosine", "linear"], "decay to 0 after the warm-up"] = "cosine"
    gradient_clip: Annotated[float, "longest gradient, over all weights; 0 is any"] = 1.0
    label_smoothing: Annotated[float, "share of a label that is spread over all classes"] = 0.1
    flip: Annotated[
        Literal["off", "random", "alternating"], "mirror half of the images, or all in turn"
    ] = "random"
    crop_padding: Annotated[int, "pad by so many pixels and crop at random; 0 is off"] = 4
    colour: Annotated[float, "change of brightness, contrast and saturation; 0 is off"] = 0.0
    policy: Annotated[
        Literal["off", "trivial", "rand"], "torchvision's TrivialAugmentWide or RandAugment"
    ] = "off"
    policy_epochs: Annotated[float, "share of the epochs, from the first, with the policy"] = 1.0
    magnitude: Annotated[int, "how strong RandAugment is, 0 to 30"] = 9
    erase: Annotated[float, "share of the images in which a box is erased"] = 0.0
    mixup: Annotated[float, "a of Beta(a, a), the shares of mixed images; 0 is off"] = 0.0
    cutmix: Annotated[float, "the same for CutMix; with both, either for each image"] = 0.0
    mixed_epochs: Annotated[float, "share of the epochs, from the first, in which images mix"] = 1.0
    patch_dropout: Annotated[float, "share of the patches left out of each training image"] = 0.0
    whole_epochs: Annotated[int, "epochs at the end that leave no patches out"] = 0
    averaging: Annotated[
        float, "decay a step of the averaged weights that are evaluated; 0 is none"
    ] = 0.0
    validate_every: Annotated[int, "epochs to the next validation; the last has one always"] = 1
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], "auto is bf16 autocast where the hardware multiplies bf16"
    ] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"], "torch.compile; auto is a GPU, or a CPU with a long run"
    ] = "auto"
    deterministic: Annotated[
        bool, "on CUDA, only kernels that repeat bit for bit; a CPU's always do"
    ] = False
    seed: Annotated[int, "the run's seed: initialisation, order, augmentation, dropout"] = 0

    def __post_init__(self):
        positive = ("epochs", "batch_size", "validate_every")
        least = dict.fromkeys(positive, 1) | dict.fromkeys(
            ("crop_padding", "whole_epochs", "seed"), 0
        )
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {self.seed}")
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(
                f"accumulate must be from 1 to the batch_size {self.batch_size}, "
                f"not {self.accumulate}"
            )
        unlimited = ("learning_rate", "muon_learning_rate", "weight_decay", "gradient_clip")
        for name in (*unlimited, "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs must be at least 0 and below the {self.epochs} epochs, "
                f"not {self.warmup_epochs}; --warmup-epochs sets them"
            )
        for name in ("label_smoothing", "averaging", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, not {getattr(self, name)}"
                )
        shares = ("colour", "erase", "policy_epochs", "mixed_epochs")
        for name, most in (dict.fromkeys(shares, 1) | {"magnitude": 30}).items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 0 to {most}, not {getattr(self, name)}")

    def patch_dropout_in(self, epoch: int) -> float:
        """The share of the patches that an epoch leaves out; epochs count from 0."""
        return self.patch_dropout if epoch < self.epochs - self.whole_epochs else 0.0


@dataclass(frozen=True)
class Recipe:
    """A model, how to train it, and what came of it."""

    about: str  # command, hardware, time and the accuracy to expect; the first line is a summary
    model: ViTConfig
    train: TrainConfig


DEFAULT_RECIPE = "default"

# No GPU was at hand for the three recipes that are made for one. They take what results/ablation
# found on a CPU to the size of a GPU, with more augmentation for more epochs; untried.
_STRONG = TrainConfig(
    batch_size=1000,
    initialisation="mimetic",
    optimizer="muon",
    learning_rate=3e-3,
    schedule="linear",
    gradient_clip=0,
    policy="trivial",
    mixup=0.8,
    cutmix=1.0,
    mixed_epochs=0.9,
    averaging=0.999,
)

RECIPES = {
    "default": Recipe(
        about="""For a GPU, untried: ViT-S/4 with Muon and strong augmentation.

        Command   python src/trainer.py
        Hardware  made for a GPU
        Expect    not known: no GPU was at hand
        """,
        model=ViTConfig(
            **MODELS["small"], patch_size=4, pooling="mean", positions="sincos", drop_path=0.1
        ),
        train=replace(_STRONG, epochs=150),
    ),
    # Many epochs on few patches, as the studies in results/speed94 found best at equal operations,
    # and the size to which they point from far below (README). 1.3e16 operations, which an H200
    # does in a minute at 23% of its specified rate.
    "speed94": Recipe(
        about="""For a GPU, untried: aims at 94% in a minute, on a quarter of the patches.

        Command   python src/trainer.py --recipe speed94
        Hardware  made for a GPU
        Expect    not known: no GPU was at hand
        """,
        model=ViTConfig(
            patch_size=4, width=320, depth=6, heads=5, pooling="mean", positions="sincos"
        ),
        train=TrainConfig(
            epochs=360,
            batch_size=2000,
            initialisation="mimetic",
            optimizer="muon",
            learning_rate=3e-3,
            warmup_epochs=2.0,
            schedule="linear",
            gradient_clip=0,
            flip="alternating",
            colour=0.2,
            cutmix=1.0,
            mixed_epochs=0.8,
            patch_dropout=0.75,
            whole_epochs=4,
        ),
    ),
    "best": Recipe(
        about="""For a GPU, untried: aims at the most accurate in half an hour, on patches of 2 x 2.

        Command   python src/trainer.py --recipe best
        Hardware  made for a GPU
        Expect    not known: no GPU was at hand
        """,
        model=ViTConfig(
            **MODELS["small"], patch_size=2, pooling="mean", positions="sincos", drop_path=0.1
        ),
        train=replace(_STRONG, epochs=200, patch_dropout=0.5),
    ),
    "baseline": Recipe(
        about="""The paper's choices at CIFAR scale: ViT-Ti/4, AdamW, cosine, flip and crop.

        Command   python src/trainer.py --recipe baseline
        Hardware  made for a GPU
        Expect    not known: not yet trained to its end
        """,
        model=ViTConfig(**MODELS["tiny"], patch_size=4, dropout=0.1),
        train=TrainConfig(),
    ),
    "demo": Recipe(
        about="""A drawn data set and a micro model: no download, no GPU, about a minute.

        Command   python src/trainer.py --recipe demo
        Hardware  two cores of an AMD EPYC (Zen 4), bfloat16; torch 2.14.1
        Time      38 s the whole process, 32 s of it training steps
        Expect    96.7% validation, 96.6% test accuracy (mean of 3 seeds)
        """,
        model=ViTConfig(**MODELS["micro"], patch_size=4, pooling="mean", positions="sincos"),
        train=TrainConfig(
            dataset="shapes",
            validation_images=1000,
            epochs=4,
            batch_size=100,
            optimizer="muon",
            learning_rate=3e-3,
            warmup_epochs=0.5,
            schedule="linear",
            gradient_clip=0,
            label_smoothing=0.0,
            crop_padding=2,
        ),
    ),
    "cpu": Recipe(
        about="""CIFAR-10 on two CPU cores in ten minutes.

        Command   python src/trainer.py --recipe cpu
        Hardware  two cores of an AMD EPYC (Zen 4), bfloat16; torch 2.14.1
        Time      519 s the whole process, 435 s of it training steps
        Expect    82.7% validation, 82.1% test accuracy (1 seed)
        """,
        model=ViTConfig(
            patch_size=4, width=128, depth=4, heads=4, pooling="mean", positions="sincos"
        ),
        train=TrainConfig(
            initialisation="mimetic",
            epochs=11,
            batch_size=250,
            optimizer="muon",
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            warmup_epochs=0.5,
            schedule="linear",
            gradient_clip=0,
            crop_padding=2,
            patch_dropout=0.5,
            whole_epochs=1,
            validate_every=2,
        ),
    ),
    "shipped": Recipe(
        about="""The model in checkpoints/vit_cifar10.pt: what two CPU cores do in 90 minutes.

        Command   python src/trainer.py --recipe shipped
        Hardware  two cores of an AMD EPYC (Zen 4), bfloat16; torch 2.14.1
        Time      5606 s the whole process, 5428 s of it training steps, other work beside it
        Expect    88.8% validation, 88.4% test accuracy (1 seed)
        """,
        model=ViTConfig(
            patch_size=4, width=192, depth=6, heads=6, pooling="mean", positions="sincos"
        ),
        train=TrainConfig(
            initialisation="mimetic",
            epochs=46,
            batch_size=250,
            optimizer="muon",
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            warmup_epochs=1.0,
            schedule="linear",
            gradient_clip=0,
            policy="trivial",
            policy_epochs=0.7,
            patch_dropout=0.5,
            whole_epochs=4,
            validate_every=5,
        ),
    ),
}
