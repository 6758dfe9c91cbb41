"""TrivialAugment (Müller and Hutter, arXiv 2103.10158) with a separate draw for each image.

Operations, magnitudes and results are those of torchvision's TrivialAugmentWide, except for
pixels whose source lies halfway between two, such as the diagonals at 45 degrees. torchvision
draws once for all images of a call and waits for a GPU; here the host draws and never waits.

Images are uint8 (B, C, H, W), RGB or gray. On the host, op (B,) int64 indexes OPS, and magnitude is
(B,) float32.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from utils import copied

BINS = 31  # magnitudes of an operation, weakest first

# ---------------------------------------------------------------------------- operations

# Each takes images, `drawn` (k, B) bool, which of its k operations an image gets, magnitudes.


def _warp(images: Tensor, drawn: Tensor, magnitude: Tensor) -> Tensor:
    """Affine maps: each pixel becomes the one nearest to its source, or black outside the image."""
    H, W = images.shape[2:]
    center_x, center_y = (W - 1) / 2, (H - 1) / 2
    x = torch.arange(W, device=images.device) - center_x
    y = torch.arange(H, device=images.device)[:, None] - center_y
    # For each image, all but one are 0: (5, B, 1, 1).
    shear_x, shear_y, shift_x, shift_y, degrees = (magnitude * drawn)[..., None, None]
    angle = degrees.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    # Rotations leave the center in place, shears the top left corner. As a sum of a term in x
    # (B, 1, W) and one in y (B, H, 1), most of the arithmetic is on a row or a column.
    from_x = cos * x + (shear_x * (H / 2) - shift_x.trunc() + center_x) + (shear_x - sin) * y
    from_y = (shear_y + sin) * x + (shear_y * (W / 2) - shift_y.trunc() + center_y) + cos * y
    # The nearest pixel; a black border around the image stands for all that lies outside.
    column, row = from_x.round_().clamp_(-1, W), from_y.round_().clamp_(-1, H)
    index = (row * (W + 2) + column + (W + 3)).long().flatten(1)[:, None]  # (B, 1, H W)
    padded = F.pad(images, [1, 1, 1, 1]).flatten(2)
    return padded.gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)


def _blend(images: Tensor, drawn: Tensor, magnitude: Tensor) -> Tensor:
    """Extrapolates from, or blends toward, black, the image in gray, or its mean gray."""
    _, color, contrast = drawn[..., None, None, None]
    values = images.float()
    luma = functional.rgb_to_grayscale(images).float()  # (B, 1, H, W)
    mean = luma.mean(dim=(1, 2, 3), keepdim=True)
    other = torch.where(color, luma, mean * contrast)  # (B, 1, H, W)
    magnitude = magnitude[:, None, None, None]
    # This order of operations gives torchvision's result.
    blended = values.mul_(1 + magnitude).addcmul_(other, -magnitude).clamp_(0, 255)
    blended = blended.to(torch.uint8)
    return blended if images.shape[1] == 3 else torch.where(color, images, blended)


def _sharpen(images: Tensor, drawn: Tensor, magnitude: Tensor) -> Tensor:
    """Extrapolates from, or blends toward, the blurred image; the border stays as it is."""
    if min(images.shape[2:]) < 3:
        return images
    images = images.float()
    inner = images[:, :, 1:-1, 1:-1]
    # A kernel of ones around a five. cuDNN's convolution may round; these sums are exact.
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    blurred = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round()
    inner.addcmul_(blurred - inner, -magnitude[:, None, None, None])
    return images.clamp_(0, 255).to(torch.uint8)


def _posterize(images: Tensor, drawn: Tensor, magnitude: Tensor) -> Tensor:
    """Keeps as many upper bits as the magnitude says."""
    dropped = (8 - magnitude).to(torch.uint8)[:, None, None, None]
    return images >> dropped << dropped


def _solarize(images: Tensor, drawn: Tensor, magnitude: Tensor) -> Tensor:
    """Inverts pixels at least as bright as the magnitude."""
    threshold = (255 * magnitude).ceil().to(torch.uint8)[:, None, None, None]
    return images ^ (images >= threshold).to(torch.uint8).mul_(255)  # 255 flips all bits


def _autocontrast(images: Tensor, drawn: Tensor, magnitude: Tensor) -> Tensor:
    """Stretches each channel to 0 to 255."""
    values = images.float()  # torchvision's function waits for a GPU
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    flat = low == high  # stays as it is
    scale = ((high - low) * (1 / 255)).masked_fill_(flat, 1)
    low.masked_fill_(flat, 0)
    return values.sub_(low).div_(scale).clamp_(0, 255).to(torch.uint8)


STAGES = (
    (lambda images, *_: images, ("Identity",)),
    (_warp, ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")),
    (_blend, ("Brightness", "Color", "Contrast")),
    (_sharpen, ("Sharpness",)),
    (_posterize, ("Posterize",)),
    (_solarize, ("Solarize",)),
    (_autocontrast, ("AutoContrast",)),
    (lambda images, *_: functional.equalize(images), ("Equalize",)),
)
OPS = tuple(name for _, names in STAGES for name in names)  # in torchvision's order
STAGE = np.array([n for n, (_, names) in enumerate(STAGES) for _ in names])  # of each of OPS


def apply(images: Tensor, op: np.ndarray, magnitude: np.ndarray) -> Tensor:
    """Applies its own operation to each image; each is computed only for its own images."""
    device, stage = images.device, STAGE[op]  # (B,)
    order = stage.argsort(kind="stable")
    counts = np.bincount(stage, minlength=len(STAGES)).tolist()
    host = (order, order.argsort(), op[order], magnitude[order])
    order, back, op, magnitude = (copied(torch.from_numpy(each), device) for each in host)
    sorted_by_stage = (images.index_select(0, order), op, magnitude)
    parts = zip(STAGES, *(each.split(counts) for each in sorted_by_stage), strict=True)
    changed, first = [], 0
    for (change, names), some, mine, strength in parts:
        drawn = mine == torch.arange(first, first + len(names), device=device)[:, None]  # (k, b)
        changed.append(change(some, drawn, strength) if len(some) else some)
        first += len(names)
    return torch.cat(changed).index_select(0, back)


# ---------------------------------------------------------------------------- draws


def _wide_space() -> Tensor:
    """The magnitudes of TrivialAugmentWide: (sign, operation, bin)."""

    def ramp(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, BINS)

    none = ramp(0, 0)
    signed = torch.stack(
        [ramp(0, end) for end in (0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99)]
    )
    kept_bits = (8 - torch.arange(BINS) / ((BINS - 1) / 6)).round()
    unsigned = torch.stack([kept_bits, ramp(1, 0), none, none])
    return torch.stack([torch.cat([none[None], s, unsigned]) for s in (signed, -signed)])


MAGNITUDES = _wide_space().numpy()


def trivial_augment(images: Tensor, host: np.random.Generator) -> Tensor:
    """Applies one random operation to each image, at a random magnitude of the wide space.

    The host draws, so that it knows how many images get each operation.
    """
    sign, op, bins = (host.integers(n, size=len(images)) for n in (2, len(OPS), BINS))
    return apply(images, op, MAGNITUDES[sign, op, bins])
