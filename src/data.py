"""Data sets and image files as batches of uint8 images, and what a model expects of an image.

Every data set comes from `load_dataset`, already split: the test images, and of the training images
a stratified part held out for validation, the same part in every run. A new one is a function that
returns a `Source`, and its name in `DATASETS`.
"""

import http.client
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from config import Config, UserError
from shapes import SHAPES, draw_shapes

CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # red, green, blue
DOWNLOAD_TIMEOUT = 30  # seconds without a byte until a server counts as stalled
SPLIT_SEED = 0  # the held-out images do not depend on a run's seed, so that runs compare


class DataError(UserError):
    """A data set or an image cannot be read."""


# ---------------------------------------------------------------------------- preprocessing


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Config):
    """What a model expects of an image; a checkpoint holds it beside the weights."""

    size: Annotated[tuple[int, int], "H and W in pixels"]
    mean: Annotated[tuple[float, ...], "of each channel, of pixels from 0 to 1"]
    std: Annotated[tuple[float, ...], "standard deviation of each channel"]
    interpolation: Annotated[Literal["bicubic", "bilinear"], "of resized image files"] = "bicubic"
    crop: Annotated[float, "share of the image, from its center, that is kept", "(0, 1]"] = 1.0

    def __post_init__(self):
        super().__post_init__()
        if min(self.size) < 1:
            raise UserError(f"size must be two positive numbers, not {self.size}")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(f"std must be {len(self.mean)} positive numbers, not {self.std}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as floats of mean 0 and standard deviation 1.

        The floats are of torch's default type, which is float32.
        """
        shift = _pixel_scale(self.mean, images.device, torch.get_default_dtype())
        scale = _pixel_scale(self.std, images.device, torch.get_default_dtype())
        return (images.to(scale.dtype) - shift) / scale

    def read(self, path: str | Path) -> Tensor:
        """An image file as the model sees it: uint8 (C, H, W).

        The first frame of an animation; upright, as its EXIF says; on white where it is
        transparent; in RGB, or in gray for one channel; resized to cover the size, then
        center-cropped.

        Raises:
            DataError: the file cannot be read as an image, or the model takes no image files.
        """
        if self.channels not in (1, 3):
            raise DataError(f"{path} needs a model of 1 or 3 channels, not {self.channels}")
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
                upright = _eight_bit(ImageOps.exif_transpose(file)).convert("RGBA")
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            bomb = isinstance(error, Image.DecompressionBombError)
            reason = "too large" if bomb else "not of a known format"
            raise DataError(f"cannot read {path} as an image: {reason}") from error
        except Exception as error:  # a damaged file can fail in any way inside a decoder
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DataError(f"cannot read {path} as an image: {reason}") from error
        white = Image.new("RGBA", upright.size, "white")
        flat = Image.alpha_composite(white, upright).convert("RGB" if self.channels == 3 else "L")
        H, W = self.size
        method = Image.Resampling[self.interpolation.upper()]
        return pil_to_tensor(ImageOps.fit(flat, (W, H), method, bleed=(1 - self.crop) / 2))


@lru_cache
def _pixel_scale(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of each channel as pixels (C, 1, 1); kept, since a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1) * 255


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit gray, which Pillow would cut off at 255 instead of scaling, in 8 bits."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 2**16 - 1)
    return Image.fromarray((values // 257).astype(np.uint8))


def image_files(folder: Path) -> list[Path]:
    """The files in a folder with an image's file name extension, sorted by name.

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


# ---------------------------------------------------------------------------- splits


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8
    labels: Tensor  # (B,) int64


class Split:
    """Images and labels in the memory of one device.

    Args:
        images: (n, C, H, W) uint8.
        labels: (n,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each tensor of row numbers, which are on the device of the labels."""
        return (Batch(self._images[each], self.labels[each]) for each in rows)

    def take(self, rows: Tensor) -> Batch:
        """One batch of the given rows."""
        return next(self.batches([rows]))

    def subset(self, rows: Tensor) -> "Split":
        return Split(*self.take(rows))

    def to(self, device: torch.device | str) -> "Split":
        return Split(self._images.to(device), self.labels.to(device))


def batch_rows(
    split: Split, batch_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """The rows of a split in batches; each row comes once, and the last batch may be short.

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


def stratified_split(labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out; every class gives its share of the latter.

    Where the shares are no whole numbers, those with the largest fractions are rounded up.

    Raises:
        DataError: `held_out` is negative, or leaves a class without training images.
    """
    counts = labels.bincount()  # (K,)
    shares = counts.double() * held_out / len(labels)
    quotas = shares.floor().long()
    rounded_up = (shares - quotas).argsort(descending=True, stable=True)
    quotas[rounded_up[: held_out - int(quotas.sum())]] += 1
    if held_out < 0 or ((quotas >= counts) & (counts > 0)).any():
        raise DataError(
            f"validation_images {held_out} must be from 0 to less than the {len(labels):,} "
            "training images, and leave some of each class"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = [shuffled[labels[shuffled] == label] for label in range(len(counts))]
    parts = [(rows[quota:], rows[:quota]) for rows, quota in zip(by_class, quotas, strict=True)]
    kept, out = (torch.cat(part).sort().values for part in zip(*parts, strict=True))
    return kept, out


# ---------------------------------------------------------------------------- data sets


class Source(NamedTuple):
    """A data set as it is published."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    test: Split | None


@dataclass(frozen=True)
class Dataset:
    """A data set in three parts; without validation or test images that part is None."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    validation: Split | None
    test: Split | None


def load_dataset(
    name: str,
    *,
    validation_images: int,
    device: torch.device | str = "cpu",
    data_dir: str | Path = "data",
    data_url: str | None = None,
) -> Dataset:
    """Loads a data set and splits it.

    Args:
        name: one of `DATASETS`.
        validation_images: how many training images to hold out.
        device: where the images will live.
        data_dir: the folder of data sets; what is missing there is downloaded into it.
        data_url: another address of the data set's archive.

    Raises:
        DataError: the data set cannot be loaded or split.
    """
    if name not in DATASETS:
        raise DataError(f"there is no data set {name!r}; choose from {', '.join(DATASETS)}")
    source = DATASETS[name](Path(data_dir), data_url)
    kept, held_out = stratified_split(source.train.labels, validation_images)
    return Dataset(
        name,
        source.classes,
        source.preprocessing,
        train=source.train.subset(kept).to(device),
        validation=source.train.subset(held_out).to(device) if len(held_out) else None,
        test=source.test.to(device) if source.test else None,
    )


# ---------------------------------------------------------------------------- CIFAR-10


def _cifar10(data_dir: Path, data_url: str | None) -> Source:
    """CIFAR-10 (Krizhevsky, 2009) by torchvision, which checks the md5 of all it reads."""

    class Torchvisions(torchvision.datasets.CIFAR10):
        url = data_url or torchvision.datasets.CIFAR10.url

    try:
        with _stall_limit(DOWNLOAD_TIMEOUT):
            train, test = (
                Torchvisions(data_dir, train=part, download=True) for part in (True, False)
            )
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"no CIFAR-10 in {data_dir}, and the download from {Torchvisions.url} failed "
            f"({reason}); put {Torchvisions.filename} from {CIFAR10_PAGE} into {data_dir} yourself "
            "(python src/trainer.py --recipe demo needs no download)"
        ) from error
    preprocessing = Preprocessing(size=(32, 32), mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return Source(tuple(train.classes), preprocessing, _as_split(train), _as_split(test))


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


# ---------------------------------------------------------------------------- the table


def _shapes(data_dir: Path, data_url: str | None) -> Source:
    """A synthetic data set of the size of a minute's training; nothing is read or downloaded."""
    preprocessing = Preprocessing(size=(32, 32), mean=(0.31,) * 3, std=(0.247,) * 3)
    train, test = (Split(*draw_shapes(n, seed)[:2]) for n, seed in ((10_000, 0), (2_000, 1)))
    return Source(tuple(SHAPES), preprocessing, train, test)


DATASETS: dict[str, Callable[[Path, str | None], Source]] = {
    "cifar10": _cifar10,
    "shapes": _shapes,
}
