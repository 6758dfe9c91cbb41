"""Every data set behind one function: torchvision's, synthetic shapes, your own folder.

A data set is a row of `DATASETS`: a function that loads it at the size and colors of a
`Preprocessing`. `load_dataset` calls it, holds out validation images, and keeps everything in
device memory if it is small enough.

    folder:PATH     PATH/train/CLASS/**, with PATH/val (or valid, validation, dev) and PATH/test
                    where they exist; or PATH/CLASS/**, of which a tenth becomes the test set
"""

import math
import re
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import torch
import torchvision.datasets as tv
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    Dataset,
    Preprocessing,
    Split,
    StreamedSplit,
    by_kind,
    digest,
    image_files,
    split_by_name,
    stratified_split,
)
from distributed import ALONE, World
from shapes import SHAPES, draw_shapes
from utils import UserError, named_path, one_line

DOWNLOAD_TIMEOUT = 30  # seconds without a byte before a server counts as stalled
LARGEST_IN_MEMORY = 2**32  # bytes of all splits together
TEST_SHARE = 0.1  # of a folder without a test set
HALF = (0.5, 0.5, 0.5)  # the paper's reference code normalizes every data set to -1 to 1


# ---------------------------------------------------------------------------- torchvision's


def _torchvision(
    kind: type, option: str, *values: Any, name: str, folder: Path, wanted: Preprocessing
) -> Dataset:
    """A torchvision data set; torchvision downloads it and checks the MD5 of all it reads.

    The `values` of `kind`'s `option` name its training, validation and test set; None: no set.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
    try:
        parts = [v if v is None else kind(folder, **{option: v}, download=True) for v in values]
    except ImportError as error:
        raise UserError(f"{kind.__name__} needs scipy: pip install scipy") from error
    except Exception as error:  # failed downloads and wrong files can raise anything
        raise UserError(
            f"no usable {kind.__name__} in {folder}, and none from "
            f"{getattr(kind, 'url', 'its server')} ({one_line(error) or type(error).__name__}); "
            f"put {getattr(kind, 'filename', 'its files')} into {folder} yourself "
            "(python src/trainer.py --recipe demo needs no download)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    classes = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
    splits = (part and _torchvision_split(part, wanted) for part in parts)
    return Dataset(name, tuple(classes), wanted, *splits)


def _torchvision_split(dataset: Any, wanted: Preprocessing) -> Split:
    names = ("targets", "labels", "_labels")
    labels = torch.as_tensor(next(getattr(dataset, n) for n in names if hasattr(dataset, n))).long()
    if isinstance(dataset, tv.CIFAR10):  # or CIFAR100, a subclass
        return _split(torch.from_numpy(dataset.data).permute(0, 3, 1, 2), labels, wanted)
    return StreamedSplit(dataset, lambda item: wanted.fit(item[0]), labels)


def _split(images: Tensor, labels: Tensor, wanted: Preprocessing) -> Split:
    """A split of uint8 images (n, C, H, W), resized on demand unless of the wanted size."""
    if images.shape[1:] == (wanted.channels, *wanted.size) and wanted.crop == 1:
        return Split(images.contiguous(), labels)
    return StreamedSplit(images, lambda image: wanted.fit(to_pil_image(image)), labels)


# ---------------------------------------------------------------------------- a folder


PARTS = {  # names of the splits' folders, in upper or lower case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def _folder(name: str, path: Path, wanted: Preprocessing, validation_images: float) -> Dataset:
    """Your own pictures, in a folder for each class."""
    folders = part_folders(path)
    undivided = folders == {"train": path}
    classes, others = class_folders(folders["train"]), Counter()
    listed = {part: _listed(folder, classes, others) for part, folder in folders.items()}
    wanted, notes = wanted.measured([file for files, _ in listed.values() for file in files])
    parts = {part: StreamedSplit(f, wanted.read, labels) for part, (f, labels) in listed.items()}

    def names(part: str) -> list[str]:
        return [normalize("NFC", file.relative_to(path).as_posix()) for file in parts[part].items]

    held_out: dict[int, str] = {}
    for part, share in (("test", TEST_SHARE * undivided), ("validation", validation_images)):
        if part in parts or not share:
            continue
        train = parts["train"]
        count = len(train)
        if share >= count:
            raise UserError(f"{share:g} held-out images must be less than the {count:,} images")
        share /= count if share >= 1 else 1
        kept, out = split_by_name(names("train"), train.labels, share, part)
        parts |= {"train": train.subset(kept), part: train.subset(out)}
        held_out |= {digest(each): each for each in names(part)}
        if few := set(range(len(classes))) - set(train.labels[out].tolist()):
            alone = ", ".join(repr(list(classes)[label]) for label in sorted(few)[:3])
            notes.append(f"no {part} image of {len(few)} classes with a single image: {alone}")
    if undivided:
        each = f"its {len(classes)} folders, such as {next(iter(classes))!r}, are the classes"
        count = f"{len(parts['test'])} of its pictures the test set, chosen by their names"
        notes.append(f"{path} has no folder train: {each}, and {count}")
    if others:
        notes.append(f"left out of {path}: {by_kind(others)}")
    trained = torch.tensor([digest(each) for each in names("train")])
    about = {"notes": tuple(notes), "trained": trained, "held_out": held_out}
    return Dataset(name, tuple(classes), wanted, **parts, **about)


def _listed(
    folder: Path, classes: dict[str, Path], others: Counter[str]
) -> tuple[list[Path], Tensor]:
    """The image files and labels of a split; counts what is left out in `others`."""
    own = class_folders(folder)
    if unknown := own.keys() - classes.keys():
        train = next(iter(classes.values())).parent
        raise UserError(f"{folder} has a class {min(unknown)!r}, which {train} does not have")
    if loose := sum(each.is_file() for each in folder.iterdir()):
        others["beside the class folders"] += loose
    files, labels = [], []
    for label, each in enumerate(classes):
        if each in own:
            found, left_out = image_files(own[each])
            files, labels = files + found, labels + [label] * len(found)
            others.update(left_out)
    return files, torch.tensor(labels)


def part_folders(path: Path) -> dict[str, Path]:
    """Folders of training, validation and test pictures; just `path` if that holds classes."""
    names = _folders_in(path)
    if "train" not in map(PARTS.get, map(str.lower, names)):
        if parts := sorted(name for name in names if name.lower() in PARTS):  # not classes
            raise UserError(f"{path} has {', '.join(parts)}, but no folder train")
        return {"train": path}
    found: dict[str, Path] = {}
    for name in sorted(names):
        if (part := PARTS.get(name.lower())) is None:
            raise UserError(
                f"{path / name} lies beside a folder train and is none of {', '.join(PARTS)}; "
                "rename it, or move it away"
            )
        if part in found:
            raise UserError(f"{found[part]} and {path / name} are both {part}; move one away")
        found[part] = path / name
    return found


def _folders_in(path: Path) -> list[str]:
    try:
        return [each.name for each in path.iterdir() if each.is_dir() and each.name[0] != "."]
    except OSError as error:
        hint = f"--dataset {FOLDER}PATH says where it is"
        raise UserError(f"cannot read the folder {path}: {error.strerror} ({hint})") from error


def class_folders(path: Path) -> dict[str, Path]:
    """A folder's subfolders by name, at least two, in natural order: 2 before 10."""

    def natural(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    found = _folders_in(path)
    if len(found) < 2:
        raise UserError(
            f"{path} must hold a folder for each of at least 2 classes, not {len(found)}"
        )
    named = {normalize("NFC", name): path / name for name in found}  # macOS may use NFD
    if twice := {path / name for name in found} - {*named.values()}:
        raise UserError(f"{min(twice)} has another folder's name, in other bytes; rename one")
    return {name: named[name] for name in sorted(named, key=natural)}


# ---------------------------------------------------------------------------- the table


def _shapes(name: str, folder: Path, wanted: Preprocessing) -> Dataset:
    """A synthetic data set, small enough to train on in a minute; nothing is downloaded."""
    train, test = (
        _split(*draw_shapes(n, seed)[:2], wanted) for n, seed in ((10_000, 0), (2_000, 1))
    )
    return Dataset(name, tuple(SHAPES), wanted, train, None, test)


class Entry(NamedTuple):
    """A row of `DATASETS`, with the mean and standard deviation to normalize images with."""

    load: Callable[..., Dataset]  # takes its name, the folder of data sets, a `Preprocessing`
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


DATASETS = {
    "cifar10": Entry(
        partial(_torchvision, tv.CIFAR10, "train", True, None, False), CIFAR10_MEAN, CIFAR10_STD
    ),
    "cifar100": Entry(
        partial(_torchvision, tv.CIFAR100, "train", True, None, False),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    "fashion_mnist": Entry(partial(_torchvision, tv.FashionMNIST, "train", True, None, False)),
    "svhn": Entry(partial(_torchvision, tv.SVHN, "split", "train", None, "test")),
    "stl10": Entry(partial(_torchvision, tv.STL10, "split", "train", None, "test")),
    "flowers102": Entry(partial(_torchvision, tv.Flowers102, "split", "train", "val", "test")),
    "oxford_pets": Entry(
        partial(_torchvision, tv.OxfordIIITPet, "split", "trainval", None, "test")
    ),
    "shapes": Entry(_shapes, (0.31,) * 3, (0.247,) * 3),
}
FOLDER = "folder:"


def anchored(name: str) -> str:
    """A data set's name; a folder's path is made absolute."""
    path = named_path(name.removeprefix(FOLDER)).absolute()
    return f"{FOLDER}{path}" if name.startswith(FOLDER) else name


def preprocessing_for(name: str) -> Preprocessing:
    """What a new model expects of a data set's images; 32 x 32 pixels."""
    if name not in DATASETS and not name.startswith(FOLDER):
        raise UserError(
            f"there is no data set {name!r}; choose from {', '.join(DATASETS)}, {FOLDER}PATH"
        )
    _, mean, std = DATASETS.get(name, Entry(_folder))
    return Preprocessing(size=(32, 32), mean=mean, std=std)


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
        validation_images: how many training images to hold out, or their share if below 1; a
            data set's own validation images are used instead if it has any.
        device: where the images will live.
        data_dir: the folder of data sets; missing ones are downloaded into it.
        world: one process per host goes first, to download and decode.

    Raises:
        UserError: the data set cannot be loaded or split.
    """
    default = preprocessing_for(name)  # refuses an unknown name
    wanted = preprocessing or default
    with world.one_of_each_host_first():
        if name.startswith(FOLDER):
            place = named_path(name.removeprefix(FOLDER))
            dataset = _folder(name, place, wanted, validation_images)
        else:
            dataset = DATASETS[name].load(name=name, folder=Path(data_dir), wanted=wanted)
        dataset = _in_memory(dataset)
    train = dataset.train
    share = validation_images * (len(train) if validation_images < 1 else 1)
    if dataset.validation is None and share and dataset.trained is None:
        kept, held_out = stratified_split(train.labels, round(share))
        parts = {"train": train.subset(kept), "validation": train.subset(held_out)}
        dataset = replace(dataset, **parts, drawn_from=len(train))
    return replace(dataset, **{part: s.to(device) for part, s in dataset.splits().items()})


def _in_memory(dataset: Dataset) -> Dataset:
    """The data set decoded into memory, without unreadable files, if it is small enough."""
    splits, notes = dataset.splits(), dataset.notes
    shape = (dataset.preprocessing.channels, *dataset.preprocessing.size)
    count = sum(map(len, splits.values()))
    if (size := count * math.prod(shape)) > LARGEST_IN_MEMORY:
        note = (
            f"{count:,} images are {size / 1e9:.1f} GB, above {LARGEST_IN_MEMORY / 1e9:.1f}: "
            "they are decoded again in every epoch"
        )
        return replace(dataset, notes=(*notes, note))
    failed, flat = [], []
    for part, split in splits.items():
        if isinstance(split, StreamedSplit):
            splits[part], constant = split.decoded(shape)
            broken = dict(sorted(split.broken.items()))
            left = set(splits[part].labels.tolist())
            for row, reason in broken.items():
                if part == "train" and (label := int(split.labels[row])) not in left:
                    raise UserError(f"no training image of {dataset.classes[label]!r}: {reason}")
            failed += broken.values()
            flat += [split.items[row] for row in constant]
    if failed:
        notes += (f"{len(failed)} of {count:,} images left out: {'; '.join(failed[:3])}",)
    if flat and dataset.trained is not None:
        notes += (f"{len(flat)} of {count:,} images are nearly constant, such as {flat[0]}",)
    return replace(dataset, **splits, notes=notes)
