"""Batches of uint8 images, and what a model expects of an image; datasets.py has the data sets.

A `Dataset` has three splits: training, validation and test images. If a data set has no
validation images, a stratified part of the training images is held out, the same in every run.
A `Split` has `len`, `labels` and `batches(rows)`, and hides whether its images are in memory or
decoded on demand.
"""

import hashlib
import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from config import Config
from utils import UserError, complain, copied, one_line

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # red, green, blue
SPLIT_SEED = 0  # not the run's: all runs hold out the same images, so they can be compared
AHEAD = 2  # batches that are decoded ahead of the one in use
HINTS = dict.fromkeys((".heic", ".heif"), " (pip install pillow-heif)")  # on unread files
MOST_BROKEN = 0.1  # largest share of streamed images that may be unreadable


# ---------------------------------------------------------------------------- preprocessing


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Config):
    """What a model expects of an image; a checkpoint holds it beside the weights."""

    size: Annotated[tuple[int, int], "H and W in pixels"]
    mean: Annotated[tuple[float, ...], "of each channel, for pixels from 0 to 1"]
    std: Annotated[tuple[float, ...], "standard deviation of each channel"]
    interpolation: Annotated[Literal["bicubic", "bilinear"], "for resized files"] = "bicubic"
    crop: Annotated[float, "share of the image that the center crop keeps", "(0, 1]"] = 1.0
    # For gray of more than 8 bits, by Pillow's mode: the values that become black and white.
    ranges: dict = field(default_factory=dict)

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
        """uint8 images (B, C, H, W) as floats of mean 0 and std 1, in torch's default dtype."""
        shift = _pixel_scale(self.mean, images.device, torch.get_default_dtype())
        scale = _pixel_scale(self.std, images.device, torch.get_default_dtype())
        return (images.to(scale.dtype) - shift) / scale

    def read(self, path: str | Path, use: Callable[[Image.Image], Any] | None = None) -> Any:
        """An image file as the model sees it: uint8 (C, H, W); an animation's first frame.

        With `use`, what that returns for the open file.

        Raises:
            UserError: the file cannot be read as an image, or the model takes no image files.
        """
        if self.channels not in (1, 3):
            raise UserError(f"{path} needs a model of 1 or 3 channels, not {self.channels}")
        try:
            if Path(path).exists() and not Path(path).is_file():
                raise OSError("it is not a regular file")
            with Image.open(path, formats=raster_formats()) as file:
                return (use or self.fit)(file)
        except Exception as error:  # a damaged file can fail in any way inside a decoder
            reason = getattr(error, "strerror", None) or one_line(error)
            kind = Path(path).suffix.lower()
            hint = "" if kind in Image.registered_extensions() else HINTS.get(kind, "")
            raise UserError(f"cannot read {path} as an image: {reason}{hint}") from error

    def fit(self, image: Image.Image) -> Tensor:
        """An image as the model sees it: uint8 (C, H, W).

        It is turned upright by its EXIF data, put on white where transparent, converted to RGB,
        or to gray for one channel, resized to cover the size, then center-cropped.
        """
        (H, W), method = self.size, Image.Resampling[self.interpolation.upper()]
        enough = math.ceil(2 * max(H, W) / self.crop)
        flat = self.flat(image, enough)
        return pil_to_tensor(ImageOps.fit(flat, (W, H), method, bleed=(1 - self.crop) / 2))

    def flat(self, image: Image.Image, enough: int) -> Image.Image:
        """An image upright, on white, RGB or gray; JPEGs at about `enough` pixels a side."""
        image.draft(None, (enough, enough))
        image.load()  # turns a TIFF upright, and then drops its orientation
        with suppress(Exception):  # damaged EXIF, as some cameras and editors write it
            ImageOps.exif_transpose(image, in_place=True)
        flat = self._eight_bit(image)
        if flat.has_transparency_data:
            flat = flat.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat)
        return flat.convert("RGB" if self.channels == 3 else "L")

    def measured(self, files: Sequence[Path]) -> tuple["Preprocessing", list[str]]:
        """A copy with one range per mode of gray above 8 bits, over all files; a line on each.

        A mode that already has a range, from what a model was trained on, keeps it.
        """

        def extent(file: Path) -> tuple[str, float, float] | None:
            with suppress(UserError):  # whoever reads it later reports it
                mode, values = self.read(file, _deep_gray)
                return (mode, float(values.min()), float(values.max())) if mode else None

        may_be = [each for each in files if each.suffix.lower() not in (".jpg", ".jpeg")]
        extents = sorted(filter(None, read_all(extent, may_be, "looking for more than 8 bits")))
        ranges, notes = dict(self.ranges), []
        for mode, group in groupby(extents, key=itemgetter(0)):
            _, lows, highs = zip(*group, strict=True)
            low, high = min(lows), max(highs)
            black, white = ranges.setdefault(mode, value_range(mode, low, high))
            cut = ", what is outside is cut off" if low < black or high > white else ""
            notes.append(
                f"gray of more than 8 bits (mode {mode}) in {len(lows):,} of {len(files):,} files: "
                f"of {low:g} to {high:g}, {black:g} becomes black and {white:g} white{cut}"
            )
        return replace(self, ranges=ranges), notes

    def _eight_bit(self, image: Image.Image) -> Image.Image:
        """Scales gray of more than 8 bits, which Pillow would clip at 255, to 8 bits."""
        mode, values = _deep_gray(image)
        if not mode:
            return image
        black, white = self.ranges.get(mode) or value_range(mode, values.min(), values.max())
        scaled = (values - black) * (255 / (white - black))
        if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF in which 0 is white
            scaled = 255 - scaled
        return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


@lru_cache
def _pixel_scale(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Channel values on the scale of pixels (C, 1, 1); cached, as a copy to a GPU waits."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1) * 255


@cache
def raster_formats() -> tuple[str, ...]:
    """Pillow's picture formats.

    Without those that another program renders by running them, or that Pillow cannot decode.
    """
    warnings.filterwarnings("ignore", module="PIL")  # unreadable files are errors instead
    Image.init()
    with suppress(ImportError):  # without it, .heic is left out
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(sorted(Image.OPEN.keys() - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}))


def _deep_gray(image: Image.Image) -> tuple[str, np.ndarray]:
    """The mode of gray of more than 8 bits: "I;16", "I" (signed 32-bit) or "F"; its values."""
    if (mode := image.mode[:4]) not in ("I;16", "I", "F"):  # "I;16B" has another byte order
        return "", np.empty(0)
    return mode, np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)


def value_range(mode: str, low: float, high: float) -> tuple[float, float]:
    """The values that become black and white, for gray from `low` to `high`.

    Floats up to 1 are shares; integers get the smallest of 8, 10, 12 and 16 bits that holds
    all. If some are negative (a CT) or larger, the least becomes black and the largest white.
    """
    tops = (1, 255) if mode == "F" else (255, 1023, 4095, 65535)
    if low < 0 and not (mode == "F" and -1 <= low and high <= 1):
        return low, max(high, low + 1)
    return -1.0 if low < 0 else 0.0, next((top for top in tops if high <= top), high)


def nearly_constant(images: Tensor) -> Tensor:
    """Which uint8 images (n, C, H, W) show next to nothing, as if misread: (n,) bool."""
    return images.flatten(1).amax(1) - images.flatten(1).amin(1) < 16


def image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files in a folder and its subfolders, at least one; and counts of other files.

    Image files are recognized by extension; hidden ones do not count.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    formats = raster_formats()
    extensions = {e for e, name in Image.registered_extensions().items() if name in formats}
    found, others, seen = [], Counter(), set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link back to a seen folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [each for each in folders if each[0] != "."]
        for file in (Path(place, name) for name in names):
            if file.name[0] == ".":
                others["hidden"] += 1
            elif file.suffix.lower() in extensions:
                found.append(file)
            else:
                others[file.suffix.lower() or "without an extension"] += 1
    if not found:
        holds = f", but {by_kind(others)}" if others else ""
        raise UserError(f"the folder {folder} holds no image files{holds}")
    return sorted(found), others


def by_kind(others: Counter[str]) -> str:
    """The files left out of a folder, in a line."""
    return ", ".join(f"{n:,} {kind}{HINTS.get(kind, '')}" for kind, n in sorted(others.items()))


# ---------------------------------------------------------------------------- splits


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8
    labels: Tensor  # (B,) int64


class Split:
    """Images (n, C, H, W) uint8 and labels (n,) int64 in the memory of one device."""

    def __init__(self, images: Tensor, labels: Tensor):
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each tensor of row numbers, which are on the labels' device."""
        return (Batch(self._images[each], self.labels[each]) for each in rows)

    def take(self, rows: Tensor) -> Batch:
        """One batch of the given rows."""
        return next(self.batches([rows]))

    def subset(self, rows: Tensor) -> "Split":
        return Split(*self.take(rows))

    def to(self, device: torch.device | str) -> "Split":
        return Split(self._images.to(device), self.labels.to(device))


class StreamedSplit(Split):
    """Images that threads `read` on demand, uint8 (C, H, W); only the labels are in memory.

    An image that cannot be read is replaced by the next readable one of its class.
    """

    def __init__(self, items: Sequence[Any], read: Callable[[Any], Tensor], labels: Tensor):
        self.items, self.read, self.labels = items, read, labels
        self.broken: dict[int, str] = {}  # unreadable rows found so far, and why

    def _attempt(self, row: int) -> Tensor | None:
        """An image, or None if it cannot be read; `broken` then says why."""
        try:
            return self.read(self.items[row])
        except Exception as error:  # ours, or of a library that opens the file itself
            self.broken[row] = one_line(error)

    def image(self, row: int) -> Tensor:
        """An image or its stand-in; UserError if there is none, or too many are broken."""
        for step in range(len(self)):
            each = (row + step) % len(self)
            if each in self.broken or (step and self.labels[each] != self.labels[row]):
                continue
            if (image := self._attempt(each)) is not None:
                return image
            if len(self.broken) > MOST_BROKEN * len(self):
                break
        first = next(iter(self.broken.values()))
        raise UserError(f"too many images cannot be read: {len(self.broken)}, first {first}")

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Batch]:
        """As in `Split`, in the same order; reports unreadable images at the end."""
        rows, known = list(rows), len(self.broken)
        numbers = [each.tolist() for each in rows]  # now, as this waits for a GPU
        try:
            for each, images in zip(rows, in_threads(self.image, numbers), strict=True):
                yield Batch(copied(torch.stack(images), self.labels.device), self.labels[each])
        finally:
            if new := [*self.broken.values()][known:]:
                complain(
                    f"{len(new):,} of {len(self):,} images cannot be read, and others of their "
                    f"class stand in for them: {'; '.join(new[:3])}"
                )

    def subset(self, rows: Tensor) -> "StreamedSplit":
        return StreamedSplit(Subset(self.items, rows.tolist()), self.read, self.labels[rows])

    def to(self, device: torch.device | str) -> "StreamedSplit":
        return StreamedSplit(self.items, self.read, self.labels.to(device))

    def decoded(self, shape: tuple[int, ...]) -> tuple[Split, list[int]]:
        """A split of `shape` in memory, without `broken` rows; and nearly constant rows."""
        images = torch.zeros(len(self), *shape, dtype=torch.uint8)
        for row, image in enumerate(read_all(self._attempt, range(len(self)), "decoding")):
            if image is not None:
                images[row] = image
        good = torch.tensor([row not in self.broken for row in range(len(self))])
        split = Split(images, self.labels)
        constant = (good & nearly_constant(images)).nonzero().flatten().tolist()
        return split.subset(good) if self.broken else split, constant


def read_all(read: Callable[[Any], Any], items: Sequence[Any], doing: str) -> Iterator[Any]:
    """Reads all items in threads, in order; shows a progress bar if that takes long."""
    chunks = (items[start : start + 64] for start in range(0, len(items), 64))
    found = chain.from_iterable(in_threads(read, chunks))
    yield from tqdm(found, doing, len(items), delay=1, disable=None, leave=False)


def in_threads(read: Callable[[Any], Any], batches: Iterable[Sequence[Any]]) -> Iterator[list[Any]]:
    """Reads each item of each batch, in order; threads work `AHEAD` batches ahead.

    Threads are enough: Pillow decodes and resizes without Python's lock. Processes would need
    their own shared memory, signals and locks.
    """
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool, begun = ThreadPoolExecutor(may_use), deque()
    try:
        for batch in batches:
            begun.append(pool.map(read, batch))
            if len(begun) > AHEAD:
                yield list(begun.popleft())
        yield from map(list, begun)
    finally:
        pool.shutdown(cancel_futures=True)


def shuffled_batches(
    split: Split, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """A split's row numbers in shuffled batches, each row once; the last batch may be short."""
    rows = torch.randperm(len(split), generator=generator)  # on the CPU: same for all devices
    return rows.to(split.labels.device).split(batch_size)


def stratified_split(labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out; each class is held out in proportion to its size.

    If the shares are not whole numbers, those with the largest fractions are rounded up.
    """
    counts = labels.bincount()  # (K,)
    shares = counts.double() * held_out / len(labels)
    quotas = shares.floor().long()
    rounded_up = (shares - quotas).argsort(descending=True, stable=True)
    quotas[rounded_up[: held_out - int(quotas.sum())]] += 1
    if held_out < 0 or ((quotas >= counts) & (counts > 0)).any():
        raise UserError(
            f"the number of held-out images, {held_out}, must be from 0 to less than the "
            f"{len(labels):,} images, and leave some of each class"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas):
        out[shuffled[labels[shuffled] == label][:quota]] = True
    return (~out).nonzero().flatten(), out.nonzero().flatten()


def digest(name: str) -> int:
    """A 63-bit hash that depends only on a name."""
    hashed = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 1


def split_by_name(
    names: Sequence[str], labels: Tensor, share: float, salt: str
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out: those whose name hashes into the lowest `share`.

    So no name affects another, except in a class that would be held out whole or not at all: of
    two or more, the lowest hash is held out and the highest is not; a single one is trained on.
    """
    places = torch.tensor([digest(f"{salt}/{name}") for name in names])
    out = places < share * 2**63
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        ordered = rows[places[rows].argsort()]
        out[ordered[0]], out[ordered[-1]] = True, False
    return (~out).nonzero().flatten(), out.nonzero().flatten()


# ---------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Dataset:
    """A data set in three splits; the validation or test split is None if it has none."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    validation: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()  # lines for the user
    drawn_from: int = 0  # how many images the held-out ones were drawn from, by row; 0: none were
    # Only for a folder, by the `digest` of a picture's path relative to it:
    trained: Tensor | None = None  # (n,) int64, the pictures to train on
    held_out: dict[int, str] = field(default_factory=dict)  # the names of those drawn as held out

    def splits(self) -> dict[str, Split]:
        """The splits that exist, by the names of their fields."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in parts.items() if split}
