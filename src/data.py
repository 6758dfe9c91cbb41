"""Images as uint8 tensors: CIFAR-10 and the drawn Shapes on the training device, and any file.

Every data set comes from `load_dataset`, already split: the test images, and of the training images
a stratified part held out for validation, the same part in every run. CIFAR-10 is 184 MB as uint8
and lives on the device as a whole; a batch is one gather, and `normalise` makes it floats there.
"""

import http.client
import math
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # red, green, blue
DOWNLOAD_TIMEOUT = 30  # seconds without a byte until a server counts as stalled
SPLIT_SEED = 0  # the held-out images do not depend on a run's seed, so that runs compare


class DataError(Exception):
    """A data set cannot be had; the message is one line for the user."""


@dataclass(frozen=True)
class Split:
    """One part of a data set, all of it on one device."""

    images: Tensor  # (n, C, H, W) uint8
    labels: Tensor  # (n,) int64
    masks: Tensor | None = None  # (n, H, W) bool: where the object is, when that is known

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> "Split":
        """The images of the given rows, in their order."""
        masks = None if self.masks is None else self.masks[rows]
        return Split(self.images[rows], self.labels[rows], masks)

    def to(self, device: torch.device | str) -> "Split":
        masks = None if self.masks is None else self.masks.to(device)
        return Split(self.images.to(device), self.labels.to(device), masks)


@dataclass(frozen=True)
class Dataset:
    """A data set in three parts, with what is needed to read its images and its labels."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of each channel, with pixels from 0 to 1
    std: tuple[float, ...]
    train: Split
    validation: Split
    test: Split


def load_dataset(
    name: str,
    *,
    validation_images: int,
    device: torch.device | str = "cpu",
    data_dir: str | Path = "data",
    data_url: str | None = None,
) -> Dataset:
    """The one way to a data set.

    Args:
        name: "cifar10" or "shapes".
        validation_images: how many training images to hold out, equally many of each class.
        device: where the tensors will live.
        data_dir: CIFAR-10's folder; what is missing there is downloaded into it.
        data_url: another address of CIFAR-10's archive.

    Raises:
        DataError: the data cannot be had, or the split cannot be made.
    """
    if name == "cifar10":
        classes, training, test = _load_cifar10(Path(data_dir), data_url)
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    elif name == "shapes":
        classes, training, test = (
            tuple(SHAPES),
            draw_shapes(10_000, seed=0),
            draw_shapes(2_000, seed=1),
        )
        mean, std = (0.31, 0.31, 0.31), (0.247, 0.247, 0.247)
    else:
        raise DataError(f"there is no data set {name!r}; there are 'cifar10' and 'shapes'")
    kept, held_out = stratified_split(training.labels, validation_images, len(classes))
    return Dataset(
        name,
        classes,
        mean,
        std,
        train=training.take(kept).to(device),
        validation=training.take(held_out).to(device),
        test=test.to(device),
    )


def stratified_split(labels: Tensor, held_out: int, classes: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out, the latter with equally many of each class.

    Raises:
        DataError: `held_out` is no multiple of the classes, or leaves a class without images.
    """
    each = held_out // classes
    smallest = int(labels.bincount(minlength=classes).min())
    if held_out != each * classes or not 0 <= each < smallest:
        raise DataError(
            f"validation_images {held_out} must be a multiple of the {classes} classes "
            f"below {smallest * classes}"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = [shuffled[labels[shuffled] == label] for label in range(classes)]
    kept = torch.cat([rows[each:] for rows in by_class]).sort().values
    return kept, torch.cat([rows[:each] for rows in by_class]).sort().values


def batch_rows(
    split: Split, batch_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Cuts a split's rows into batches; each comes once, and the last batch may be short.

    Args:
        generator: shuffles, on the CPU, so that the order is the same on every device; without
            one the order is the split's own.

    Returns:
        Row numbers, on the split's device.
    """
    if generator is None:
        rows = torch.arange(len(split))
    else:
        rows = torch.randperm(len(split), generator=generator)
    return rows.to(split.labels.device).split(batch_size)


def batches(split: Split, batch_size: int) -> Iterator[Split]:
    """A split in its own order, batch by batch."""
    return map(split.take, batch_rows(split, batch_size))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (B, C, H, W) to floats with the data set's mean at 0 and deviation at 1.

    The floats are of torch's default type, which is float32.
    """
    shift = _pixel_scale(tuple(mean), images.device, torch.get_default_dtype())
    scale = _pixel_scale(tuple(std), images.device, torch.get_default_dtype())
    return (images.to(scale.dtype) - shift) / scale


@lru_cache
def _pixel_scale(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of each channel as pixels (C, 1, 1); kept, since a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1) * 255


# ---------------------------------------------------------------------------- CIFAR-10


def _load_cifar10(data_dir: Path, data_url: str | None) -> tuple[tuple[str, ...], Split, Split]:
    """CIFAR-10 (Krizhevsky, 2009) by torchvision, which checks the md5 of all it reads."""

    class Source(torchvision.datasets.CIFAR10):
        url = data_url or torchvision.datasets.CIFAR10.url

    try:
        with _stall_limit(DOWNLOAD_TIMEOUT):
            training, test = (
                Source(data_dir, train=train, download=True) for train in (True, False)
            )
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"no CIFAR-10 in {data_dir}, and {Source.url} gave none ({reason}); put "
            f"{Source.filename} from {CIFAR10_PAGE} into {data_dir} by hand, "
            "(python src/trainer.py --recipe demo needs no download)"
        ) from error
    return tuple(training.classes), _as_split(training), _as_split(test)


@contextmanager
def _stall_limit(seconds: float) -> Iterator[None]:
    """Makes sockets opened here give up after so long without a byte; torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _as_split(dataset: torchvision.datasets.CIFAR10) -> Split:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (n, 3, 32, 32)
    return Split(images, torch.tensor(dataset.targets))


# ---------------------------------------------------------------------------- image files


def read_image(path: str | Path, size: tuple[int, int], channels: int = 3) -> Tensor:
    """An image file as a model sees it: uint8 (C, H, W).

    Of an animation the first frame; upright, as its EXIF says; on white where it is transparent; in
    RGB, or grey for one channel; scaled until it covers H x W, and the middle cut out.

    Raises:
        DataError: the file cannot be read as an image, or a model of so many channels takes none.
    """
    if channels not in (1, 3):
        raise DataError(f"{path} cannot be shown to a model of {channels} channels, only to 1 or 3")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            upright = ImageOps.exif_transpose(_eight_bit(file)).convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        what = "too large" if isinstance(error, Image.DecompressionBombError) else "no known format"
        raise DataError(f"{path} is not an image that can be read: {what}") from error
    except Exception as error:  # a damaged file can fail in any way inside a decoder
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} is not an image that can be read: {reason}") from error
    white = Image.new("RGBA", upright.size, "white")
    flat = Image.alpha_composite(white, upright).convert("RGB" if channels == 3 else "L")
    height, width = size
    return pil_to_tensor(ImageOps.fit(flat, (width, height), Image.Resampling.BICUBIC))


def image_files(folder: Path) -> list[Path]:
    """The files in a folder whose names end as those of images do, in the order of their names.

    Raises:
        DataError: there are none, or the folder cannot be read.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    found = [file for file in files if file.suffix.lower() in Image.registered_extensions()]
    if not found:
        raise DataError(f"the folder {folder} holds no image files")
    return found


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would cut off at 255 instead of scaling, in 8 bits."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 2**16 - 1)
    return Image.fromarray((values // 257).astype(np.uint8))


# ---------------------------------------------------------------------------- Shapes


def _regular_polygon(u: Tensor, v: Tensor, corners: int, inner: float) -> Tensor:
    """Star of circumradius 1 whose notches lie at radius `inner`; depth below its edge."""
    sector = math.pi / corners
    angle = torch.atan2(v, u).remainder(2 * sector)
    angle = torch.minimum(angle, 2 * sector - angle)  # the angle to the nearest corner
    radius = torch.hypot(u, v)
    x, y = radius * angle.cos(), radius * angle.sin()
    edge_x, edge_y = inner * math.cos(sector) - 1, inner * math.sin(sector)  # corner to notch
    return (edge_x * y - edge_y * (x - 1)) / math.hypot(edge_x, edge_y)


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.minimum(half_width - u.abs(), half_height - v.abs())


# Each shape is a function of (u, v), the place relative to its centre in units of its radius: how
# deep inside the shape the place is, negative outside.
SHAPES = {
    "disc": lambda u, v: 0.9 - torch.hypot(u, v),
    "ring": lambda u, v: 0.2 - (torch.hypot(u, v) - 0.75).abs(),
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "triangle": lambda u, v: _regular_polygon(u, v, corners=3, inner=0.5),
    "star": lambda u, v: _regular_polygon(u, v, corners=5, inner=0.4),
    "cross": lambda u, v: torch.maximum(_box(u, v, 1, 0.25), _box(u, v, 0.25, 1)),
    "bar": lambda u, v: _box(u, v, 1, 0.25),
    "half-disc": lambda u, v: torch.minimum(0.9 - torch.hypot(u, v + 0.4), v + 0.4),
    "crescent": lambda u, v: torch.minimum(
        0.95 - torch.hypot(u, v), torch.hypot(u - 0.5, v) - 0.75
    ),
    "hourglass": lambda u, v: torch.minimum(0.9 - v.abs(), 0.7 * (v.abs() - u.abs()) + 0.1),
}


def draw_shapes(count: int, seed: int, size: int = 32) -> Split:
    """Draws one shape an image, at a random place, size, angle and colour, on a texture.

    Args:
        count: images to draw, equally many of each of the ten `SHAPES` (in random order).
        seed: the same seed gives the same images.
        size: their height and width in pixels.

    Returns:
        Images (count, 3, size, size) with labels, and the masks of the shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(SHAPES)
    background = _textures(count, size, generator)
    # Bright shapes on dark textures: any hue may meet any other, and the shape always shows.
    colour = 0.5 + 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
    coverage = _shape_coverage(labels, size, generator)[:, None]  # (n, 1, size, size)
    images = torch.lerp(background, colour.expand_as(background), coverage)
    images += 0.03 * torch.randn(images.shape, generator=generator)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Split(pixels, labels, coverage[:, 0] > 0.5)


def _shape_coverage(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """How much of every pixel the shapes cover, 0 to 1, with smooth edges: (n, size, size)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), 1, 1, generator=generator)

    radius = size * uniform(0.25, 0.42)
    room = 0.5 * size - 0.9 * radius  # a corner may leave the image, never more
    centre_x, centre_y = (size / 2 + room * uniform(-1, 1) for _ in range(2))
    angle = uniform(0, 2 * math.pi)
    pixel = torch.arange(size) + 0.5
    x = (pixel.view(1, 1, -1) - centre_x) / radius
    y = (pixel.view(1, -1, 1) - centre_y) / radius
    u = x * angle.cos() + y * angle.sin()
    v = y * angle.cos() - x * angle.sin()
    coverage = torch.empty(len(labels), size, size)
    for label, depth in enumerate(SHAPES.values()):
        rows = labels == label
        coverage[rows] = (depth(u[rows], v[rows]) * radius[rows] + 0.5).clamp(0, 1)
    return coverage


def _textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Two colours in waves of random direction and length: (count, 3, size, size) in 0-1."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    base, other = 0.4 * uniform(3, 1, 1), 0.4 * (uniform(3, 1, 1) - 0.5)
    pixel = torch.arange(size) / size
    turns = 1 + 5 * uniform(1, 1, 1)  # waves across the image
    angle, phase = 2 * math.pi * uniform(1, 1, 1), 2 * math.pi * uniform(1, 1, 1)
    along = pixel.view(1, 1, 1, -1) * angle.cos() + pixel.view(1, 1, -1, 1) * angle.sin()
    wave = torch.sin(2 * math.pi * turns * along + phase)  # (n, 1, size, size)
    return (base + other * wave).clamp(0, 1)
