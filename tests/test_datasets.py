"""Data sets: torchvision's from small copies in their own formats, and folders of image files."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image

import datasets
from data import Preprocessing, Split, StreamedSplit
from datasets import load_dataset, preprocessing_for
from small import damage, generator, images_of
from utils import UserError

SIZE = (16, 16)
WANTED = Preprocessing(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(seed):
    """A picture of random smooth colors."""
    noise = np.random.default_rng(seed).integers(256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((24, 20), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """Three unequal classes of pictures, one of them broken."""
    for name, count in (("class 10", 12), ("class 2", 20), ("birds", 34)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(count):
            picture(number).save(tmp_path / "pets" / name / f"{number}.png")
    picture(91).save(tmp_path / "pets/birds/broken.jpg")
    damage(tmp_path / "pets/birds/broken.jpg", "cut off")
    (tmp_path / "pets/birds/notes.txt").write_text("no picture")
    (tmp_path / "pets/.hidden").mkdir()
    return tmp_path / "pets"


def test_a_folder_of_class_folders_is_split_by_class_and_its_broken_file_left_out(folder):
    dataset = load_dataset(f"folder:{folder}", WANTED, validation_images=0.1)
    assert dataset.classes == ("birds", "class 2", "class 10")
    parts = (dataset.train, dataset.validation, dataset.test)
    # A tenth of 34 + 1, 20 and 12 is tested; a tenth of what is left and whole is held out.
    assert [len(part) for part in parts] == [53, 6, 7] and dataset.preprocessing == WANTED
    assert dataset.drawn_from == 67
    assert sum(part.labels.bincount(minlength=3) for part in parts).tolist() == [34, 20, 12]
    assert all(part.labels.unique().tolist() == [0, 1, 2] for part in parts)
    (left_out,) = (note for note in dataset.notes if "images left out" in note)
    assert "1 of 67 images left out: cannot read" in left_out and "broken.jpg" in left_out
    again = load_dataset(f"folder:{folder}", WANTED, validation_images=0.1)
    assert torch.equal(images_of(again.validation), images_of(dataset.validation))


def test_streamed_images_are_those_in_memory(folder, monkeypatch):
    held = load_dataset(f"folder:{folder}", WANTED, validation_images=6)
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 1000)
    streamed = load_dataset(f"folder:{folder}", WANTED, validation_images=6)
    assert isinstance(streamed.train, StreamedSplit) and type(held.train) is Split
    assert any("decoded again in every epoch" in note for note in streamed.notes)
    rows = torch.randperm(len(held.train), generator=generator(0)).split(10)
    for one, other in zip(held.train.batches(rows), streamed.train.batches(rows), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert torch.equal(images_of(held.test), images_of(streamed.test))
    assert list(streamed.train.batches(())) == []  # of an epoch that stopped after its last step


def test_a_file_that_breaks_after_loading_is_an_error_of_one_line(folder, monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 1000)
    dataset = load_dataset(f"folder:{folder}", WANTED, validation_images=0)
    for file in folder.glob("class 2/*.png"):
        file.write_bytes(b"nonsense")
    for rows in (torch.arange(len(dataset.train)).split(10), [torch.arange(len(dataset.train))]):
        with pytest.raises(UserError, match=r"^cannot read .*png as an image: not of a"):
            list(dataset.train.batches(rows))


@pytest.fixture
def with_parts(tmp_path):
    """with_parts("train", "valid", "test") makes a folder with 8, 4 and 6 pictures in these."""

    def make(*parts):
        for part, count in zip(parts, (4, 2, 3), strict=False):
            for name in ("a/2021", "b"):  # one class has its pictures in a subfolder
                (tmp_path / "split" / part / name).mkdir(parents=True)
                for number in range(count):
                    file = tmp_path / "split" / part / name / f"{part}{number}.png"
                    picture(number).save(file)
        return tmp_path / "split"

    return make


@pytest.mark.parametrize(
    "parts",
    [("train", name, "test") for name in ("val", "valid", "validation", "dev")]
    + [("Train", "Val", "TEST")],
    ids=str,
)
def test_a_folder_with_its_own_splits_keeps_them_by_any_usual_name(with_parts, parts):
    root = with_parts(*parts)
    (root / parts[0] / "a/notes.txt").touch()
    (root / parts[2] / "lies beside.png").touch()
    dataset = load_dataset(f"folder:{root}", WANTED, validation_images=0.5)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [8, 4, 6]
    assert dataset.drawn_from == 0 and dataset.classes == ("a", "b")
    (note,) = dataset.notes
    assert note == f"left out of {root}: 1 .txt, 1 beside the class folders"
    (root / parts[2] / "c").mkdir()
    with pytest.raises(UserError, match=r"class 'c', which .*rain has not"):
        load_dataset(f"folder:{root}", WANTED, validation_images=0.5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("train", "extra"), "extra lies beside a folder train and is none of train, val, valid"),
        (("train", "val", "Valid"), "Valid and .*val are both validation"),
        (("valid", "test"), "split has test, valid, but no folder train"),
    ],
    ids=str,
)
def test_folders_of_parts_that_would_not_be_used_are_refused(with_parts, parts, message):
    with pytest.raises(UserError, match=message):
        load_dataset(f"folder:{with_parts(*parts)}", WANTED, validation_images=0.5)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "cannot read the folder .*pets"),
        ("a", "a folder for each of at least 2 classes, not 1"),
        ("ab", "holds no image files"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path, classes, message):
    for name in classes:
        (tmp_path / "pets" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        load_dataset(f"folder:{tmp_path / 'pets'}", WANTED, validation_images=0.1)


def test_a_class_whose_pictures_are_all_broken_is_refused(folder):
    for file in (folder / "class 2").iterdir():
        file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no training image of 'class 2'"):
        load_dataset(f"folder:{folder}", WANTED, validation_images=0.1)


# ---------------------------------------------------------------------------- torchvision's

LABELS = [number % 3 for number in range(12)]


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(12, 3072), dtype=np.uint8)
    content = {"data": pixels, "fine_labels": LABELS}
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear", "cup"]}))
    for option, names in (("train_list", ["train"]), ("test_list", ["test"])):
        monkeypatch.setattr(tv.CIFAR100, option, [[name, md5(folder / name)] for name in names])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5(folder / "meta")}
    monkeypatch.setattr(tv.CIFAR100, "meta", meta)
    return pixels.reshape(12, 3, 32, 32)


def test_cifar100_is_read_and_resized_where_asked(cifar100, tmp_path):
    dataset = load_dataset("cifar100", validation_images=0, data_dir=tmp_path)
    assert dataset.classes == ("apple", "bear", "cup") and dataset.train.labels.tolist() == LABELS
    assert np.array_equal(images_of(dataset.test), cifar100)
    assert dataset.preprocessing == preprocessing_for("cifar100")
    larger = load_dataset("cifar100", WANTED, validation_images=0, data_dir=tmp_path)
    image = Image.fromarray(cifar100[5].transpose(1, 2, 0)).resize(SIZE, Image.Resampling.BICUBIC)
    assert np.array_equal(images_of(larger.train)[5].permute(1, 2, 0), np.asarray(image))


def test_stl10_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(12, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in LABELS))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar")
    for option in ("train_list", "test_list"):
        listed = [[name, md5(folder / name)] for name, _ in getattr(tv.STL10, option)[:2]]
        monkeypatch.setattr(tv.STL10, option, listed)
    monkeypatch.setattr(tv.STL10, "splits", ("train", "test"))
    wanted = Preprocessing(size=(96, 96), mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = load_dataset("stl10", wanted, validation_images=0, data_dir=tmp_path)
    assert np.array_equal(images_of(dataset.train), pixels)
    assert dataset.train.labels.tolist() == LABELS


def test_oxford_pets_is_read(tmp_path, monkeypatch):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "images").mkdir()
    rows = []
    for number, label in enumerate(LABELS):
        name = f"{'abc'[label]}_{number}"
        picture(number).save(base / f"images/{name}.jpg", quality=95)
        rows.append(f"{name} {label + 1} 1 1")
    for part in ("trainval", "test"):
        (base / f"annotations/{part}.txt").write_text("\n".join(rows))
    monkeypatch.setattr(tv.OxfordIIITPet, "_download", lambda self: None)
    dataset = load_dataset("oxford_pets", WANTED, validation_images=0, data_dir=tmp_path)
    assert dataset.classes == ("A", "B", "C") and dataset.train.labels.tolist() == LABELS
    expected = WANTED.read(base / "images/a_3.jpg")
    assert torch.equal(images_of(dataset.test)[3], expected)


@pytest.mark.parametrize(("name", "kind"), [("svhn", tv.SVHN), ("flowers102", tv.Flowers102)])
def test_what_needs_scipy_says_so(name, kind, tmp_path, monkeypatch):
    def without_scipy(*_, **__):
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr(kind, "__init__", without_scipy)
    with pytest.raises(UserError, match="needs scipy: pip install scipy"):
        load_dataset(name, WANTED, validation_images=0, data_dir=tmp_path)
