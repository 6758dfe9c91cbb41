"""Images as batches of uint8, and what a model expects of an image; datasets.py has the data sets.

A `Dataset` has three splits: training, validation and test images. Where a data set has no
validation images, a stratified part of the training images is held out, the same in every run. A
`Split` answers `len`, `labels` and `batches(rows)`; whether its images lie in memory or are decoded
when they are needed is its own business.
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
SPLIT_SEED = 0  # the held-out images do not depend on a run's seed, so that runs compare
AHEAD = 2  # batches that are decoded while one is used
HINTS = dict.fromkeys((".heic", ".heif"), " (pip install pillow-heif)")  # on what is not read
MOST_BROKEN = 0.1  # share of streamed images that may turn out not to be readable


# ---------------------------------------------------------------------------- preprocessing


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Config):
    """What a model expects of an image; a checkpoint holds it beside the weights."""

    size: Annotated[tuple[int, int], "H and W in pixels"]
    mean: Annotated[tuple[float, ...], "of each channel, of pixels from 0 to 1"]
    std: Annotated[tuple[float, ...], "standard deviation of each channel"]
    interpolation: Annotated[Literal["bicubic", "bilinear"], "of resized image files"] = "bicubic"
    crop: Annotated[float, "share of the image, from its center, that is kept", "(0, 1]"] = 1.0
    # Of gray of more than 8 bits, by Pillow's mode: the values that become black and white.
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
        """uint8 images (B, C, H, W) as floats of mean 0 and std 1, of torch's default type."""
        shift = _pixel_scale(self.mean, images.device, torch.get_default_dtype())
        scale = _pixel_scale(self.std, images.device, torch.get_default_dtype())
        return (images.to(scale.dtype) - shift) / scale

    def read(self, path: str | Path, use: Callable[[Image.Image], Any] | None = None) -> Any:
        """An image file as the model sees it: uint8 (C, H, W); of an animation the first frame.

        Or what `use` makes of the open file.

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

        Upright, as its EXIF says; on white where it is transparent; in RGB, or in gray for one
        channel; resized to cover the size, then center-cropped.
        """
        (H, W), method = self.size, Image.Resampling[self.interpolation.upper()]
        enough = math.ceil(2 * max(H, W) / self.crop)
        flat = self.flat(image, enough)
        return pil_to_tensor(ImageOps.fit(flat, (W, H), method, bleed=(1 - self.crop) / 2))

    def flat(self, image: Image.Image, enough: int) -> Image.Image:
        """An image upright, on white, in RGB or gray; a JPEG of about `enough` pixels each way."""
        image.draft(None, (enough, enough))
        image.load()  # turns a TIFF, and then drops its orientation
        with suppress(Exception):  # damaged EXIF, as some cameras and editors write it
            ImageOps.exif_transpose(image, in_place=True)
        flat = self._eight_bit(image)
        if flat.has_transparency_data:
            flat = flat.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat)
        return flat.convert("RGB" if self.channels == 3 else "L")

    def measured(self, files: Sequence[Path]) -> tuple["Preprocessing", list[str]]:
        """With one range for all the files of each deep kind of gray, and a line on each.

        The range of a kind that has one, from what a model was trained on, stays.
        """

        def extent(file: Path) -> tuple[str, float, float] | None:
            with suppress(UserError):  # who reads it will say so
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
        """Gray of more than 8 bits, which Pillow would cut off at 255, in 8 bits."""
        mode, values = _deep_gray(image)
        if not mode:
            return image
        black, white = self.ranges.get(mode) or value_range(mode, values.min(), values.max())
        scaled = (values - black) * (255 / (white - black))
        if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF in which white is the least
            scaled = 255 - scaled
        return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


@lru_cache
def _pixel_scale(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of each channel as pixels (C, 1, 1); kept, since a copy to a GPU waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1) * 255


@cache
def raster_formats() -> tuple[str, ...]:
    """Pillow's formats of pictures.

    Not those that another program draws, which runs what they hold, or that Pillow only recognizes.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what it cannot read is an error
    Image.init()
    with suppress(ImportError):  # .heic is then left out
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(sorted(Image.OPEN.keys() - {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}))


def _deep_gray(image: Image.Image) -> tuple[str, np.ndarray]:
    """The mode "I;16", "I" (32 bits, signed) or "F" of gray of more than 8 bits, and its values."""
    if (mode := image.mode[:4]) not in ("I;16", "I", "F"):  # "I;16B" has another byte order
        return "", np.empty(0)
    return mode, np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)


def value_range(mode: str, low: float, high: float) -> tuple[float, float]:
    """The values that become black and white, of gray from `low` to `high`.

    Floats up to 1 are shares; integers have the smallest of 8, 10, 12 and 16 bits that holds all.
    Where some are negative (a CT) or larger, the least becomes black and the largest white.
    """
    tops = (1, 255) if mode == "F" else (255, 1023, 4095, 65535)
    if low < 0 and not (mode == "F" and -1 <= low and high <= 1):
        return low, max(high, low + 1)
    return -1.0 if low < 0 else 0.0, next((top for top in tops if high <= top), high)


def nearly_constant(images: Tensor) -> Tensor:
    """Which of some uint8 images (n, C, H, W) show next to nothing, as if misread: (n,)."""
    return images.flatten(1).amax(1) - images.flatten(1).amin(1) < 16


def image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files in a folder and its subfolders, at least one, and how many others of a kind.

    Image files have the extension of a format; what is hidden is none.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    formats = raster_formats()
    extensions = {e for e, name in Image.registered_extensions().items() if name in formats}
    found, others, seen = [], Counter(), set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
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
    """What is left out of a folder, in a line."""
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
        """A batch for each tensor of row numbers, which are on the device of the labels."""
        return (Batch(self._images[each], self.labels[each]) for each in rows)

    def take(self, rows: Tensor) -> Batch:
        """One batch of the given rows."""
        return next(self.batches([rows]))

    def subset(self, rows: Tensor) -> "Split":
        return Split(*self.take(rows))

    def to(self, device: torch.device | str) -> "Split":
        return Split(self._images.to(device), self.labels.to(device))


class StreamedSplit(Split):
    """Images that threads `read` as they are needed, uint8 (C, H, W); only labels are in memory.

    In place of an image that cannot be read stands the next one of its class that can.
    """

    def __init__(self, items: Sequence[Any], read: Callable[[Any], Tensor], labels: Tensor):
        self.items, self.read, self.labels = items, read, labels
        self.broken: dict[int, str] = {}  # rows found so far, with what is wrong

    def _attempt(self, row: int) -> Tensor | None:
        """An image, or None where it cannot be read, and a note of why."""
        try:
            return self.read(self.items[row])
        except Exception as error:  # ours, or that of a library which opens the file itself
            self.broken[row] = one_line(error)

    def image(self, row: int) -> Tensor:
        """An image; UserError where none of its class can be read, or too many cannot."""
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
        """As of a `Split`, in the same order; says at the end what could not be read."""
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
        """In memory, each of `shape`, without `broken` rows; and those that are nearly constant."""
        images = torch.zeros(len(self), *shape, dtype=torch.uint8)
        for row, image in enumerate(read_all(self._attempt, range(len(self)), "decoding")):
            if image is not None:
                images[row] = image
        good = torch.tensor([row not in self.broken for row in range(len(self))])
        split = Split(images, self.labels)
        constant = (good & nearly_constant(images)).nonzero().flatten().tolist()
        return split.subset(good) if self.broken else split, constant


def read_all(read: Callable[[Any], Any], items: Sequence[Any], doing: str) -> Iterator[Any]:
    """What `read` gives for each item, by threads; with a progress bar where it takes long."""
    chunks = (items[start : start + 64] for start in range(0, len(items), 64))
    found = chain.from_iterable(in_threads(read, chunks))
    yield from tqdm(found, doing, len(items), delay=1, disable=None, leave=False)


def in_threads(read: Callable[[Any], Any], batches: Iterable[Sequence[Any]]) -> Iterator[list[Any]]:
    """What `read` gives for each item of each batch, in order; threads are `AHEAD` batches ahead.

    Pillow decodes and resizes without Python's lock. Processes would need shared memory, signals
    and locks of their own.
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
    """The row numbers of a split in batches; each comes once, and the last batch may be short."""
    rows = torch.randperm(len(split), generator=generator)  # on the CPU: alike for every device
    return rows.to(split.labels.device).split(batch_size)


def stratified_split(labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out; every class gives its share of the latter.

    Where the shares are no whole numbers, those with the largest fractions are rounded up.
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
    """63 bits that depend only on a name."""
    hashed = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 1


def split_by_name(
    names: Sequence[str], labels: Tensor, share: float, salt: str
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold out: those whose name has a hash in the lowest `share`.

    So no name depends on another, but in a class of which all or none would be held out: of two
    and more, the lowest is held out and the highest is not; a single one is trained on.
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
    """A data set in three parts; without validation or test images that part is None."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    validation: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()  # lines for the user
    drawn_from: int = 0  # how many images the held-out ones were drawn from, by row; 0: none were
    # Of a folder, by the `digest` of a picture's name relative to it:
    trained: Tensor | None = None  # (n,) int64, of those to train on
    held_out: dict[int, str] = field(default_factory=dict)  # the names of those drawn as held out

    def splits(self) -> dict[str, Split]:
        """The parts that there are, by the names of their fields."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in parts.items() if split}
