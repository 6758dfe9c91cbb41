"""Every data set behind one function: those of torchvision, synthetic shapes, your own folder.

A data set is a row of `DATASETS`: a function that returns a `Source` at the size and colors of a
`Preprocessing`. `load_dataset` calls it, holds out validation images, and keeps everything in the
memory of the device where that is small enough.

    folder:PATH     PATH/train/CLASS/*, with PATH/val and PATH/test where they exist; or
                    PATH/CLASS/*, of which a tenth becomes the test set
"""

import http.client
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.datasets as tv
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    Dataset,
    Pictures,
    Preprocessing,
    Split,
    StreamedSplit,
    image_files,
    stratified_split,
)
from distributed import ALONE, World
from shapes import SHAPES, draw_shapes
from utils import UserError, one_line

DOWNLOAD_TIMEOUT = 30  # seconds without a byte until a server counts as stalled
LARGEST_IN_MEMORY = 2**32  # bytes of all splits together
TEST_SHARE = 0.1  # of a folder without a test set
HALF = (0.5, 0.5, 0.5)  # the paper's reference code normalizes every data set to -1 to 1


class Source(NamedTuple):
    """A data set as it is published."""

    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None
    notes: tuple[str, ...] = ()  # what to tell the user
    drawn_from: int = 0  # how many images the test set was drawn from; 0: it was not drawn


# ---------------------------------------------------------------------------- torchvision's


def _torchvision(
    kind: type,
    option: str,
    values: tuple[Any, ...],
    folder: Path,
    wanted: Preprocessing,
) -> Source:
    """A data set of torchvision, which downloads it and checks the md5 of all it reads.

    Args:
        option: of `kind`, with its values for training, validation and test; None: there is none.
    """
    parts = []
    try:
        with _stall_limit(DOWNLOAD_TIMEOUT):
            for value in values:
                more = {option: value, "download": True}
                parts.append(kind(folder, **more) if value is not None else None)
    except ImportError as error:
        raise UserError(f"{kind.__name__} needs scipy: pip install scipy") from error
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException) as error:
        reason = one_line(error) or type(error).__name__
        place = getattr(kind, "url", "its server")
        raise UserError(
            f"no {kind.__name__} in {folder}, and the download from {place} failed ({reason}); "
            f"put {getattr(kind, 'filename', 'its files')} into {folder} yourself "
            "(python src/trainer.py --recipe demo needs no download)"
        ) from error
    classes = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
    return Source(tuple(classes), *(part and _torchvision_split(part, wanted) for part in parts))


def _torchvision_split(dataset: Any, wanted: Preprocessing) -> Split:
    names = ("targets", "labels", "_labels")
    labels = torch.as_tensor(next(getattr(dataset, n) for n in names if hasattr(dataset, n))).long()
    if isinstance(dataset, tv.CIFAR10):  # of which CIFAR100 is one
        return _split(torch.from_numpy(dataset.data).permute(0, 3, 1, 2), labels, wanted)
    return StreamedSplit(Pictures(dataset, partial(_fitted, wanted)), labels)


def _split(images: Tensor, labels: Tensor, wanted: Preprocessing) -> Split:
    """A split of uint8 images (n, C, H, W) of one size, which may not be the wanted one."""
    if wanted.keeps(images.shape[1:]):
        return Split(images.contiguous(), labels)
    return StreamedSplit(Pictures(images, partial(_fitted, wanted)), labels)


def _fitted(wanted: Preprocessing, item: Tensor | tuple[Image.Image, int]) -> Tensor:
    return wanted.fit(to_pil_image(item) if isinstance(item, Tensor) else item[0])


@contextmanager
def _stall_limit(seconds: float) -> Iterator[None]:
    """Makes sockets opened here give up after so long without a byte; torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------------------- a folder


def _folder(path: Path, wanted: Preprocessing) -> Source:
    """Pictures of your own, in a folder for each class.

    Raises:
        UserError: the folder has another layout, or a class without a readable picture.
    """
    train = path / "train" if (path / "train").is_dir() else path
    classes = tuple(class_folders(train))

    def split(folder: Path) -> Split | None:
        if not folder.is_dir():
            return None
        if unknown := set(class_folders(folder)) - set(classes):
            raise UserError(f"{folder} has a class {min(unknown)!r}, which {train} has not")
        files, labels = [], []
        for label, name in enumerate(classes):
            if (folder / name).is_dir():
                found = image_files(folder / name)
                files, labels = files + found, labels + [label] * len(found)
        return StreamedSplit(Pictures(files, wanted.read), torch.tensor(labels))

    if train != path:
        return Source(classes, split(train), split(path / "val"), split(path / "test"))
    whole = split(path)
    kept, out = stratified_split(whole.labels, round(TEST_SHARE * len(whole)))
    note = f"{path} has no folder train: {len(out)} of its pictures are the test set"
    return Source(classes, whole.subset(kept), None, whole.subset(out), (note,), len(whole))


def class_folders(path: Path) -> list[str]:
    """The names of the folders in a folder, in natural order: 2 before 10.

    Raises:
        UserError: there are fewer than two.
    """

    def natural(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    try:
        found = [each.name for each in path.iterdir() if each.is_dir() and each.name[0] != "."]
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from error
    if len(found) < 2:
        raise UserError(
            f"{path} must hold a folder for each of at least 2 classes, not {len(found)}"
        )
    return sorted(found, key=natural)


# ---------------------------------------------------------------------------- the table


def _shapes(folder: Path, wanted: Preprocessing) -> Source:
    """A synthetic data set, small enough to train on in a minute; nothing is downloaded."""
    drawn = (draw_shapes(count, seed)[:2] for count, seed in ((10_000, 0), (2_000, 1)))
    train, test = (_split(*images_and_labels, wanted) for images_and_labels in drawn)
    return Source(tuple(SHAPES), train, None, test)


class Entry(NamedTuple):
    """A data set of the table, and the mean and standard deviation to normalize it with."""

    load: Callable[[Path, Preprocessing], Source]
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


def _of_torchvision(kind: type, option: str, *values: Any) -> Callable[..., Source]:
    return partial(_torchvision, kind, option, values)


DATASETS = {
    "cifar10": Entry(
        _of_torchvision(tv.CIFAR10, "train", True, None, False), CIFAR10_MEAN, CIFAR10_STD
    ),
    "cifar100": Entry(
        _of_torchvision(tv.CIFAR100, "train", True, None, False),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    "fashion_mnist": Entry(_of_torchvision(tv.FashionMNIST, "train", True, None, False)),
    "svhn": Entry(_of_torchvision(tv.SVHN, "split", "train", None, "test")),
    "stl10": Entry(_of_torchvision(tv.STL10, "split", "train", None, "test")),
    "flowers102": Entry(_of_torchvision(tv.Flowers102, "split", "train", "val", "test")),
    "oxford_pets": Entry(_of_torchvision(tv.OxfordIIITPet, "split", "trainval", None, "test")),
    "shapes": Entry(_shapes, (0.31,) * 3, (0.247,) * 3),
}
FOLDER = "folder:"


def preprocessing_for(name: str) -> Preprocessing:
    """What a new model expects of the images of a data set; 32 x 32 pixels.

    Raises:
        UserError: there is no such data set.
    """
    if name.startswith(FOLDER):
        return Preprocessing(size=(32, 32), mean=HALF, std=HALF)
    if name not in DATASETS:
        raise UserError(
            f"there is no data set {name!r}; choose from {', '.join(DATASETS)}, {FOLDER}PATH"
        )
    return Preprocessing(size=(32, 32), mean=DATASETS[name].mean, std=DATASETS[name].std)


def load_dataset(
    name: str,
    preprocessing: Preprocessing | None = None,
    *,
    validation_images: float,
    device: torch.device | str = "cpu",
    data_dir: str | Path = "data",
    world: World = ALONE,
) -> Dataset:
    """Loads a data set and splits it.

    Args:
        name: one of `DATASETS`, or "folder:PATH".
        preprocessing: the size and colors of the images (`preprocessing_for`, 32x32).
        validation_images: how many training images to hold out, or below 1 the share of them; a
            data set's own validation images are used where it has any.
        device: where the images will live.
        data_dir: the folder of data sets; what is missing there is downloaded into it.
        world: one process of each host goes first, to download and decode.

    Raises:
        UserError: the data set cannot be loaded or split.
    """
    default = preprocessing_for(name)  # which refuses a name that is not known
    wanted = preprocessing or default
    with world.one_of_each_host_first():
        if name.startswith(FOLDER):
            source = _folder(Path(name.removeprefix(FOLDER)).expanduser(), wanted)
        else:
            source = DATASETS[name].load(Path(data_dir), wanted)
        (train, validation, test), notes = _readable(source, wanted)
    if absent := set(range(len(source.classes))) - set(train.labels.tolist()):
        raise UserError(f"{name} has no training image of {source.classes[min(absent)]!r}")
    drawn_from = source.drawn_from
    share = validation_images * (len(train) if validation_images < 1 else 1)
    if validation is None and share:
        drawn_from = drawn_from or len(train)
        kept, held_out = stratified_split(train.labels, round(share))
        train, validation = train.subset(kept), train.subset(held_out)
    parts = (split.to(device) if split else None for split in (train, validation, test))
    return Dataset(name, source.classes, wanted, *parts, (*source.notes, *notes), drawn_from)


def _readable(source: Source, wanted: Preprocessing) -> tuple[list[Split | None], list[str]]:
    """The splits of a source without the files that cannot be read, and lines for the user."""
    splits, notes, failed = [source.train, source.validation, source.test], [], []
    count = sum(len(split) for split in splits if split)
    size = count * wanted.channels * wanted.size[0] * wanted.size[1]
    keep = size <= LARGEST_IN_MEMORY
    if not keep:
        notes.append(
            f"{count:,} images are {size / 1e9:.1f} GB, above {LARGEST_IN_MEMORY / 1e9:.1f}: "
            "they are decoded again in every epoch"
        )
    for number, split in enumerate(splits):
        if not isinstance(split, StreamedSplit):
            continue
        if keep or not isinstance(split.pictures.items, Tensor):  # a tensor has no broken images
            splits[number], errors = split.decoded(keep)
            failed += errors
    if failed:
        notes.append(f"{len(failed)} of {count:,} images left out: {'; '.join(failed[:3])}")
    return splits, notes
