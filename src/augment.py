"""Augmentation of whole batches, on the device they are on, with a draw of its own for each image.

Each function takes and returns uint8 images (B, C, H, W). The generator lives on the images'
device; the same state of it gives the same result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Surrounds each image with `padding` black pixels and cuts its size out at a random place."""
    B, _, H, W = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, B, 1), generator=generator, device=device)
    rows = (top + torch.arange(H, device=device)).view(B, 1, H, 1)
    columns = (left + torch.arange(W, device=device)).view(B, 1, 1, W)
    padded = F.pad(images, [padding] * 4)  # (B, C, H + 2 padding, W + 2 padding)
    image = torch.arange(B, device=device).view(B, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
    return padded[image, channel, rows, columns]  # (B, C, H, W)
