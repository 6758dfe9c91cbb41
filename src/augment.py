"""Augmentation of whole batches on their device, with a separate random draw for each image.

Each function takes and returns uint8 images (B, C, H, W); those that mix two images also take
and return targets (B, K), the probability of each class. A generator is on the images' device;
the same generator state gives the same result. Nothing waits for the device. `Augmentation`
combines the functions as a recipe says.
`python visualization/vis.py data` draws what a checkpoint's recipe does to some images.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes import TrainConfig, patches_kept
from trivial_augment import trivial_augment
from utils import copied, generator_for, seed_for
from ViT import ViTConfig

# ---------------------------------------------------------------------------- geometry


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors the images whose entry in `mirrored` (B,) is true, left to right."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pads each image with black and crops a random window of the original size."""
    B, _, H, W = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, B), generator=generator, device=device)
    padded = F.pad(images, [padding] * 4)  # (B, C, H + 2 padding, W + 2 padding)
    crops = padded.unfold(2, H, 1).unfold(3, W, 1)  # a view: (B, C, top, left, H, W)
    return crops[torch.arange(B, device=device), :, top, left]  # (B, C, H, W)


def random_resized_crop(images: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Resizes a random window of each image to the image's size, by bilinear interpolation.

    Its area is `least` to 1 of the image's, its aspect ratio 3/4 to 4/3, as in Inception
    (Szegedy et al., arXiv 1409.4842); its sides are at most the image's.
    """
    B = len(images)
    draw = torch.rand(4, B, generator=generator, device=images.device)
    area, aspect = least + (1 - least) * draw[0], (4 / 3) ** (2 * draw[1] - 1)
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    top, left = draw[2] * (1 - height), draw[3] * (1 - width)  # all as shares of the image
    return resized_crop(images, torch.stack([top, left, height, width]))


def resized_crop(images: Tensor, windows: Tensor) -> Tensor:
    """Resizes windows (4, B), as shares: top, left, height, width, to the images' size."""
    top, left, height, width = windows
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = width, 2 * left + width - 1  # affine_grid spans -1 to 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    for axis, size in enumerate(reversed(images.shape[2:])):  # outside, repeat the border
        grid[..., axis].clamp_(1 / size - 1, 1 - 1 / size)  # MPS has no padding_mode="border"
    found = F.grid_sample(images.float(), grid, align_corners=False)
    return found.round().to(torch.uint8)


# ---------------------------------------------------------------------------- mixing


def mixup(images: Tensor, targets: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., arXiv 1710.09412): blends images with others, by shares (B,)."""
    others, other_targets = images.roll(1, 0), targets.roll(1, 0)  # the batch is shuffled
    kept = shares[:, None, None, None]
    mixed = (kept * images + (1 - kept) * others).round().to(torch.uint8)
    return mixed, torch.lerp(other_targets, targets, shares[:, None])


def cutmix(images: Tensor, shares: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al., arXiv 1905.04899): pastes a box of the previous image into each.

    An image keeps its share (B,) of itself, or more if the box is cut off. Returns the images
    and a mask of the boxes, (B, 1, H, W) bool.
    """
    B, _, H, W = images.shape
    center_y, center_x = torch.rand(2, B, generator=generator, device=images.device)
    inside_y = _inside(center_y, (1 - shares).sqrt(), H)  # (B, H)
    inside_x = _inside(center_x, (1 - shares).sqrt(), W)  # (B, W)
    box = inside_y[:, None, :, None] & inside_x[:, None, None, :]  # (B, 1, H, W)
    return torch.where(box, images.roll(1, 0), images), box


def _inside(center: Tensor, length: Tensor, side: int) -> Tensor:
    """Which pixels of a side lie in intervals; center and length (B,) are shares: (B, side)."""
    center, half = (center * side).floor()[:, None], (length * side / 2).floor()[:, None]
    pixel = torch.arange(side, device=center.device)
    return (pixel >= center - half) & (pixel < center + half)


# ---------------------------------------------------------------------------- a batch


OPERATIONS = {  # of `Augmentation`, by the recipe field that turns each on
    "flip": "flip",
    "crop_padding": "random crop",
    "resized_crop": "random resized crop",
    "policy": "TrivialAugment",
    "mixup": "Mixup",
    "cutmix": "CutMix",
}


class Seen(NamedTuple):
    """A batch as the model sees it, or a part of one."""

    images: Tensor  # (B, C, H, W) uint8
    targets: Tensor  # (B, K), the probability of each class
    kept: Tensor | None  # (B, n), the numbers of the patches to keep; None: all

    def part(self, rows: Tensor) -> "Seen":
        return Seen(*(each if each is None else each[rows] for each in self))


class Augmentation:
    """Everything that a recipe does to a batch before the model sees it.

    It takes sizes from `model`; `count` is the number of training images.
    """

    def __init__(self, config: TrainConfig, model: ViTConfig, count: int, device: torch.device):
        self.config, self.model = config, model
        draw = torch.rand(count, generator=generator_for(config.seed))
        self.coins = draw.to(device) < 0.5  # which alternating flips mirror in even epochs

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor, epoch: int, seed: int) -> Seen:
        """A batch as the model sees it.

        Args:
            images: (B, C, H, W) uint8.
            labels: (B,)
            rows: (B,), the images' rows in the training set.
            epoch: counted from 0.
            seed: for all draws of the batch.
        """
        config, left = self.config, self.config.epochs - epoch  # epochs left, with this one
        generator = generator_for(seed, device=images.device)
        targets = F.one_hot(labels, self.model.classes).to(torch.get_default_dtype())
        if config.flip == "random":
            draw = torch.rand(len(images), generator=generator, device=images.device)
            images = flip(images, draw < 0.5)
        elif config.flip == "alternating":  # two epochs show both views (Jordan, arXiv 2404.00498)
            images = flip(images, self.coins[rows] ^ bool(epoch % 2))
        if config.crop_padding:
            images = random_crop(images, config.crop_padding, generator)
        if config.resized_crop:
            images = random_resized_crop(images, config.resized_crop, generator)
        if config.policy == "trivial" and left > config.policy_off_epochs:
            images = trivial_augment(images, np.random.default_rng(seed_for(seed, 3)))
        kept, N = None, self.model.patches
        if patch_dropout := config.patch_dropout_in(epoch):
            draw = torch.rand(len(images), N, generator=generator, device=images.device)
            kept = draw.argsort(dim=1)[:, : patches_kept(N, patch_dropout)]  # (B, n)
        if (config.mixup or config.cutmix) and left > config.mixing_off_epochs:
            return self._mix(Seen(images, targets, kept), seed, generator)
        return Seen(images, targets, kept)

    def _mix(self, batch: Seen, seed: int, generator: torch.Generator) -> Seen:
        """Mixup or CutMix; with both, each image gets one of them."""
        config, (images, targets, kept) = self.config, batch
        host = np.random.default_rng(seed_for(seed, 2))  # torch's Beta takes no generator

        def shares(alpha: float) -> Tensor:
            draw = torch.from_numpy(host.beta(alpha, alpha, len(images))).to(targets.dtype)
            return copied(draw, images.device)

        if not config.cutmix:
            return Seen(*mixup(images, targets, shares(config.mixup)), kept)
        cut, box = cutmix(images, shares(config.cutmix), generator)
        # Labels follow what the model sees: the box's share of the kept patches varies.
        of_patches = F.avg_pool2d(box.float(), self.model.patch_size).flatten(1)  # (B, N)
        seen = of_patches if kept is None else of_patches.gather(1, kept)
        others = seen.mean(dim=1, keepdim=True).to(targets.dtype)  # (B, 1)
        cut_targets = torch.lerp(targets, targets.roll(1, 0), others)
        if not config.mixup:
            return Seen(cut, cut_targets, kept)
        blended, blended_targets = mixup(images, targets, shares(config.mixup))
        choice = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        images = torch.where(choice[:, None, None, None], cut, blended)
        return Seen(images, torch.where(choice[:, None], cut_targets, blended_targets), kept)
