"""The training options, and recipes: named sets of them with the accuracy to expect."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from config import Config
from datasets import DATASETS, FOLDER
from utils import ROOT, UserError
from ViT import MODELS, ViTConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Everything besides the model that determines a run; RunOptions says where it is saved."""

    dataset: Annotated[str, f"data set: {', '.join(DATASETS)}, {FOLDER}PATH"] = "cifar10"
    validation_images: Annotated[float, "training images held out, or a share", "[0, 1e9]"] = 0.1
    initialization: Annotated[Literal["paper", "mimetic"], "mimetic: for attention"] = "paper"
    whiten_patches: Annotated[bool, "begin with a patch embedding that whitens pixels"] = False
    init_from: Annotated[str | None, "weights: FILE, timm:NAME, torchvision:NAME[:WEIGHTS]"] = None
    # What those weights expect of images, if that would be assumed.
    mean: Annotated[tuple[float, ...] | None, "for --init-from: one, or one per channel"] = None
    std: Annotated[tuple[float, ...] | None, "standard deviation, likewise"] = None
    crop: Annotated[float | None, "share of each side of an image file kept, likewise"] = None
    freeze: Annotated[bool | int, "all but the head; with N: up to block N", "[0, 1e6]"] = False
    epochs: Annotated[int, "times each training image is seen", "[0, 1e6]"] = 100
    steps: Annotated[int, "steps in place of epochs; 5 epochs at least", "[0, 1e9]"] = 0
    batch_size: Annotated[int, "images per step; 0: a fifth of the set or 50", "[0, 1e7]"] = 500
    accumulate: Annotated[int, "parts of a batch, one by one, to save memory", "[1, 1e7]"] = 1
    # Muon updates all matrices but the head's, and AdamW the rest.
    optimizer: Annotated[Literal["adamw", "muon", "sgd"], "muon for matrices, else adamw"] = "adamw"
    learning_rate: Annotated[float, "peak learning rate of AdamW or SGD", "[0, 1000]"] = 1e-3
    muon_learning_rate: Annotated[float, "Muon's peak learning rate", "[0, 1000]"] = 0.02
    layer_decay: Annotated[float, "learning rate of a block over the next one's", "(0, 1]"] = 1.0
    weight_decay: Annotated[float, "for matrices; decoupled except for SGD", "[0, 1000]"] = 0.05
    warmup_epochs: Annotated[float, "epochs of linear warm-up", "[0, 1e6]"] = 5.0
    schedule: Annotated[Literal["cosine", "linear"], "decay to 0 after the warm-up"] = "cosine"
    schedule_over: Annotated[Literal["steps", "operations"], "decay by step or by cost"] = "steps"
    gradient_clip: Annotated[float, "maximum gradient norm; 0: no clipping", "[0, 1e6]"] = 1.0
    label_smoothing: Annotated[float, "label smoothing", "[0, 1)"] = 0.1
    balance: Annotated[bool, "weight the loss so that all classes count alike"] = False
    flip: Annotated[Literal["off", "random", "alternating"], "alternating: by epoch"] = "random"
    crop_padding: Annotated[int, "pixels of padding for a random crop; 0: none", "[0, 1024]"] = 4
    resized_crop: Annotated[float, "least share of a random resized crop; 0: none", "[0, 1]"] = 0.0
    policy: Annotated[Literal["off", "trivial"], "TrivialAugmentWide, as in torchvision"] = "off"
    mixup: Annotated[float, "Mixup alpha; 0 disables", "[0, 1000]"] = 0.0
    cutmix: Annotated[float, "CutMix alpha; 0 disables; with Mixup, either one", "[0, 1000]"] = 0.0
    patch_dropout: Annotated[float, "share of patches left out in training", "[0, 1)"] = 0.0
    # How many epochs before the end something is turned off.
    whole_epochs: Annotated[int, "epochs at the end without patch dropout", "[0, 1e6]"] = 0
    policy_off_epochs: Annotated[int, "epochs at the end without the policy", "[0, 1e6]"] = 0
    mixing_off_epochs: Annotated[int, "epochs at the end without mixing", "[0, 1e6]"] = 0
    validate_every: Annotated[int, "epochs between validations", "[1, 1e6]"] = 1
    # auto: bf16 if the hardware multiplies it, else fp16 on a CUDA GPU (not yet run there).
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], "auto: by the hardware"] = "auto"
    compile: Annotated[
        Literal["auto", "on", "graphs", "off"],
        "torch.compile; auto: for long runs; graphs: on, with CUDA graphs (not yet run on a GPU)",
    ] = "auto"
    deterministic: Annotated[bool, "deterministic CUDA kernels; a CPU's always are"] = False
    seed: Annotated[int, "for initialization, order, augmentation and dropout", "[0, 1e18]"] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.init_from and (self.initialization != "paper" or self.whiten_patches):
            raise UserError("initialization and whiten_patches are for a model without init_from")
        for name in ("mean", "std", "crop"):
            if (value := getattr(self, name)) is not None and not self.init_from:
                raise UserError(f"{name} {value} is of the weights of --init-from: give both")
        if bool(self.epochs) == bool(self.steps):
            raise UserError(f"give epochs or steps, not {self.epochs} and {self.steps}")
        if self.batch_size and self.accumulate > self.batch_size:
            raise UserError(f"accumulate {self.accumulate} is above batch_size {self.batch_size}")
        if self.compile == "graphs" and self.accumulate > 1:
            raise UserError(f"compile graphs needs accumulate 1, not {self.accumulate}")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs {self.warmup_epochs} is not below epochs {self.epochs}")

    def for_images(self, count: int) -> "TrainConfig":
        """This config with a missing batch size or epochs set for `count` training images."""
        batch_size = self.batch_size or min(50, max(1, count // 5))
        epochs = self.epochs or max(5, math.ceil(self.steps / math.ceil(count / batch_size)))
        return replace(self, batch_size=batch_size, epochs=epochs, steps=0)

    def patch_dropout_in(self, epoch: int) -> float:
        """The share of patches left out in an epoch, counted from 0."""
        return self.patch_dropout if epoch < self.epochs - self.whole_epochs else 0.0


def patches_kept(patches: int, patch_dropout: float) -> int:
    """How many of an image's patches patch dropout keeps; at least one."""
    return max(1, round(patches * (1 - patch_dropout)))


@dataclass(frozen=True, kw_only=True)
class RunOptions(Config):
    """Where a run reads and writes, when, and on which device."""

    name: Annotated[str | None, "the run's folder (the recipe's name)"] = None
    overwrite: Annotated[bool, "replace a run of that name, or an exported file"] = False
    output_dir: Annotated[Path, "where the folders of runs are"] = ROOT / "checkpoints"
    data_dir: Annotated[Path, "where data sets are, or are downloaded to"] = ROOT / "data"
    test: Annotated[bool, "--no-test skips the test set; use it while tuning"] = True
    save_minutes: Annotated[float, "minutes between checkpoints; 0: every step", "[0, 1e6]"] = 1.0
    wait_minutes: Annotated[float, "how long torchrun processes wait", "(0, 1e4]"] = 5.0
    keep_best: Annotated[bool, "keep the best epoch by validation accuracy in best.pt"] = False
    tensorboard: Annotated[bool, "also write metrics.csv and a batch of images for it"] = False
    library: Annotated[Literal["timm", "torchvision", "onnx"] | None, "for --export"] = None
    split: Annotated[Literal["test", "val"], "for --evaluate; val: validation images"] = "test"
    device: Annotated[str | None, "cuda, cuda:1, mps or cpu (the best available)"] = None

    def __post_init__(self):
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name):
            raise UserError(f"--name {self.name!r} must be letters, digits, '.', '_' and '-'")


@dataclass(frozen=True)
class Recipe:
    """A model, how to train it, and the accuracy to expect."""

    about: str  # a summary; then, if known, the time and the accuracy to expect
    model: ViTConfig
    train: TrainConfig


# What results/ablation and results/trend found best on two CPU cores (docs/recipe.md).
_MUON = TrainConfig(
    initialization="mimetic",
    whiten_patches=True,
    optimizer="muon",
    learning_rate=3e-3,
    muon_learning_rate=0.01,
    schedule="linear",
    gradient_clip=0,
    label_smoothing=0.0,
    patch_dropout=0.75,
)

# More augmentation for more epochs. No GPU was available for the recipes that target one: they
# scale up what was found on a CPU, and are untested.
_STRONG = replace(
    _MUON,
    warmup_epochs=2.0,
    policy="trivial",
    cutmix=1.0,
    whole_epochs=4,
    schedule_over="operations",
    validate_every=5,
)
_LONG = replace(_STRONG, muon_learning_rate=0.014, flip="alternating", validate_every=10)

_SHIPPED = ViTConfig(patch_size=4, width=256, depth=6, heads=8, pooling="mean", positions="sincos")

_SGD = TrainConfig(
    init_from="checkpoints/vit_cifar10.pt", optimizer="sgd", weight_decay=0.0, label_smoothing=0.0
)

# Unless stated, the command is `python src/trainer.py --recipe NAME`. Times are of two cores of
# an Intel Xeon with AMX, in bfloat16, with torch 2.14.1; accuracies are means over the seeds.
RECIPES = {
    "default": Recipe(
        about="For a GPU, untested: `shipped`, for 300 epochs.",
        model=replace(_SHIPPED, drop_path=0.1),
        train=replace(
            _LONG, epochs=300, whole_epochs=20, policy_off_epochs=20, mixing_off_epochs=20
        ),
    ),
    # Many epochs on few patches, as the studies in results/speed94 found best at equal operations,
    # and the size that they extrapolate to (docs/speed94.md). 1.3e16 operations on all 50,000
    # images, which an H200 does in a minute at 22% of its specified rate.
    "speed94": Recipe(
        about="For a GPU, untested: aims at 94% in a minute, on a quarter of the patches.",
        model=replace(_SHIPPED, width=320, heads=5),
        train=replace(
            _STRONG,
            epochs=360,
            batch_size=2000,
            muon_learning_rate=0.02,
            flip="alternating",
            policy="off",
            mixing_off_epochs=72,
        ),
    ),
    # The size and length that the records of results/ extrapolate to for 5e16 operations.
    "best": Recipe(
        about="For a GPU, untested: aims at the best accuracy in half an hour, patches 2 x 2.",
        model=replace(_SHIPPED, patch_size=2, width=384, depth=8, heads=6, drop_path=0.1),
        train=replace(
            _STRONG,
            epochs=172,
            batch_size=1000,
            muon_learning_rate=0.014,
            whole_epochs=8,
            policy_off_epochs=8,
            mixing_off_epochs=8,
        ),
    ),
    "baseline": Recipe(
        about="The paper's choices at CIFAR scale, untested: ViT-Ti/4, AdamW, cosine, flip, crop.",
        model=ViTConfig(**MODELS["tiny"], patch_size=4, dropout=0.1),
        train=TrainConfig(validate_every=5),
    ),
    "finetune": Recipe(
        about="""Fine-tune weights on other data: AdamW, a lower rate for lower layers.

        Command   python src/trainer.py --recipe finetune --init-from WEIGHTS --dataset folder:PATH
        Time      48 s of one thread of an AMD EPYC on 500 pictures of 32 pixels
        Expect    81.8% validation accuracy on those, ten classes of CIFAR-100 (3 draws)
        """,
        model=ViTConfig(),
        train=TrainConfig(
            init_from="checkpoints/vit_cifar10.pt",
            epochs=0,
            steps=200,
            batch_size=0,
            layer_decay=0.75,
            warmup_epochs=1.0,
            patch_dropout=0.5,
            validate_every=5,
        ),
    ),
    "finetune-paper": Recipe(
        about="""Fine-tune as the paper does (B.1.1): SGD, cosine, no weight decay.

        Command   python src/trainer.py --recipe finetune-paper --init-from WEIGHTS
        Steps     10,000 on CIFAR-10, as in the paper's Table 4; 500 of warm-up, as in its code
        Expect    not known: not run yet; 9.7e15 operations with the included model
        """,
        model=ViTConfig(),
        train=replace(_SGD, epochs=114, batch_size=512, learning_rate=0.01, warmup_epochs=5.7),
    ),
    "linear-probe": Recipe(
        about="""A linear classifier on the frozen weights' features, which it standardizes as MAE.

        Command   python src/trainer.py --recipe linear-probe --init-from WEIGHTS --dataset NAME
        Expect    75.2% validation accuracy, on the pictures that finetune states it for
        """,
        model=ViTConfig(),
        train=replace(
            _SGD,
            epochs=0,
            steps=400,
            batch_size=0,
            freeze=True,
            learning_rate=0.02,
            warmup_epochs=0.0,
            gradient_clip=0,
            flip="off",
            crop_padding=0,
            validate_every=20,
        ),
    ),
    "demo": Recipe(
        about="""A synthetic data set and a micro model: no download, no GPU, under a minute.

        Time      32 s the whole process, 29 s of it training steps
        Expect    97.6% validation, 97.7% test accuracy (3 seeds)
        """,
        model=replace(_SHIPPED, **MODELS["micro"]),
        train=TrainConfig(
            dataset="shapes",
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
        about="""CIFAR-10 on two CPU cores in about ten minutes.

        Time      1078 to 1896 s the whole process, on one thread of an AMD EPYC with AVX-512, three
                  runs at once on two cores; with 7% fewer operations, 586 s on the Xeon
        Expect    86.6% validation, 86.4% test accuracy (3 seeds)
        """,
        model=replace(_SHIPPED, width=80, depth=4, heads=5),
        train=replace(
            _MUON,
            epochs=54,
            muon_learning_rate=0.014,
            warmup_epochs=0.5,
            schedule_over="operations",
            flip="alternating",
            crop_padding=2,
            whole_epochs=3,
            validate_every=10,
        ),
    ),
    "core": Recipe(
        about="""CIFAR-10 on one CPU core in two hours; the rate decays over operations.

        Time      6880 s the whole process, 6722 s of it training, on one thread of an AMD EPYC with
                  AVX-512 (bfloat16), other work on the other core
        Expect    91.1% validation, 90.9% test accuracy (1 seed)
        """,
        model=replace(_SHIPPED, width=192, heads=6, drop_path=0.1),
        train=replace(_LONG, epochs=107, whole_epochs=7, policy_off_epochs=7, mixing_off_epochs=7),
    ),
    "shipped": Recipe(
        about="""The model in checkpoints/vit_cifar10.pt: a quarter of the patches, CutMix.

        Time      7800 s the whole process, 7619 s of it training, light work beside it
        Expect    92.2% validation, 91.1% test accuracy (1 seed, begun for 145 epochs)
        """,
        model=replace(_SHIPPED, drop_path=0.1),
        train=replace(_LONG, epochs=128, whole_epochs=8, policy_off_epochs=8, mixing_off_epochs=8),
    ),
}
