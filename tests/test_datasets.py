"""Data sets: small copies of torchvision's in their own formats, and folders of image files."""

import dataclasses
import hashlib
import math
import pickle
import shutil
from collections import Counter
from unicodedata import normalize

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image, ImageFile

import datasets
import small
import trainer
from checkpoint import check_fit, load_checkpoint
from data import Preprocessing, Split, StreamedSplit, split_by_name
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
    assert dataset.preprocessing == WANTED and dataset.drawn_from == 0
    assert sum(part.labels.bincount(minlength=3) for part in parts).tolist() == [34, 20, 12]
    assert all(part.labels.unique().tolist() == [0, 1, 2] for part in parts)
    (left_out,) = (note for note in dataset.notes if "images left out" in note)
    assert "1 of 67 images left out: cannot read" in left_out and "broken.jpg" in left_out
    again = load_dataset(f"folder:{folder}", WANTED, validation_images=0.1)
    assert torch.equal(images_of(again.validation), images_of(dataset.validation))


def test_streamed_images_are_those_in_memory(folder, monkeypatch):
    (folder / "birds/broken.jpg").unlink()
    held = load_dataset(f"folder:{folder}", WANTED, validation_images=6)
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 1000)
    streamed = load_dataset(f"folder:{folder}", WANTED, validation_images=6)
    assert isinstance(streamed.train, StreamedSplit) and type(held.train) is Split
    assert any("decoded again in every epoch" in note for note in streamed.notes)
    rows = torch.randperm(len(held.train), generator=generator(0)).split(10)
    for one, other in zip(held.train.batches(rows), streamed.train.batches(rows), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert torch.equal(images_of(held.test), images_of(streamed.test))
    assert list(streamed.train.batches(())) == []  # an epoch stopped after its last step


def test_others_of_their_class_stand_in_for_streamed_files_that_cannot_be_read(
    folder, monkeypatch, capsys
):
    """Nothing is decoded at the start; what threads cannot read is reported once, in a line."""
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 1000)
    for file in folder.rglob("*.jpg"):
        file.rename(file.with_name("0.jpg"))  # a name that puts it into the training split
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded at the start"))
        dataset = load_dataset(f"folder:{folder}", WANTED, validation_images=0)
    train = dataset.train
    for _ in range(2):
        batches = list(train.batches(torch.arange(len(train)).split(10)))
        assert torch.equal(torch.cat([each.labels for each in batches]), train.labels)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"1 of {len(train)} images cannot be read, and others of their class" in line
    images = torch.cat([each.images for each in batches])
    (row,) = (row for row, file in enumerate(train.items) if file.name == "0.jpg")
    assert train.labels[row] == train.labels[row + 1] and torch.equal(images[row], images[row + 1])
    for file in folder.glob("class 2/*.png"):
        file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"too many images cannot be read: .*first cannot read"):
        list(dataset.train.batches(torch.arange(len(train)).split(10)))


def test_no_picture_moves_between_parts_as_others_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 1)
    names = [f"{number}é.png" for number in range(40)]
    for name in names:
        for each in ("a", "b"):
            (tmp_path / "old" / each).mkdir(parents=True, exist_ok=True)
            (tmp_path / "old" / each / f"{each}{name}").touch()

    def parts(root):
        dataset = load_dataset(f"folder:{root}", WANTED, validation_images=0.2)
        assert not set(dataset.trained.tolist()) & dataset.held_out.keys()
        splits = dataset.splits().items()
        return {normalize("NFC", file.name): part for part, split in splits for file in split.items}

    before = parts(tmp_path / "old")
    assert Counter(before.values()).keys() == {"train", "validation", "test"}
    for change in ("move", "spell", "remove", "rename", "add"):
        shutil.copytree(tmp_path / "old", root := tmp_path / change)
        changed = root / "a" / f"a{names[7]}"
        if change == "spell":  # as macOS does
            for file in root.glob("*/*"):
                file.rename(file.with_name(normalize("NFD", file.name)))
        elif change == "remove":
            changed.unlink()
        elif change == "rename":
            changed.rename(root / "a/another.png")
        elif change == "add":
            (root / "a/another.png").touch()
        after = parts(root)
        same = before.keys() & after.keys()
        assert len(same) >= 79 and all(before[each] == after[each] for each in same), change


def test_a_share_of_each_class_is_held_out_by_name_and_at_least_one_where_there_are_two():
    names = [f"{number}.jpg" for number in range(3003)]
    labels = torch.tensor([0] * 2000 + [1] * 1000 + [2] * 2 + [3])
    kept, out = split_by_name(names, labels, 0.1, "test")
    assert torch.cat([kept, out]).sort().values.tolist() == list(range(3003))
    counts = labels[out].bincount(minlength=4).tolist()
    assert abs(counts[0] - 200) < 40 and abs(counts[1] - 100) < 30 and counts[2:] == [1, 0]
    first = hashlib.blake2b(b"test/7.jpg", digest_size=8).digest()
    assert (7 in out) == (int.from_bytes(first, "big") < 0.1 * 2**64)
    assert labels[split_by_name(names, labels, 0.999, "test")[0]].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "parts",
    [("train", name, "test") for name in ("val", "valid", "validation", "dev")]
    + [("Train", "Val", "TEST"), ("Training", "dev", "Testing")],
    ids=str,
)
def test_a_folder_with_its_own_splits_keeps_them_by_any_usual_name(tmp_path, parts):
    for part, count in zip(parts, (4, 2, 3), strict=True):
        for name in ("a/2021", "b"):  # one class has its pictures in a subfolder
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                picture(number).save(tmp_path / part / name / f"{number}.png")
    (tmp_path / parts[0] / "a/notes.txt").touch()
    (tmp_path / parts[2] / "lies beside.png").touch()
    dataset = load_dataset(f"folder:{tmp_path}", WANTED, validation_images=0.5)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [8, 4, 6]
    assert dataset.drawn_from == 0 and dataset.classes == ("a", "b")
    (note,) = dataset.notes
    assert note == f"left out of {tmp_path}: 1 .txt, 1 beside the class folders"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("", "cannot read the folder .*pets"),
        ("a/1.png", "a folder for each of at least 2 classes, not 1"),
        ("a/1.txt b/2.txt", "a holds no image files, but 1 .txt"),
        ("a/1.png a/2.png b/1.png b/2.png", "no training image of 'a': cannot read .*png as an"),
        ("train/a/1.png extra/a/1.png", "extra lies beside a folder train and is none of train, "),
        ("train/a/1.png val/a/1.png Valid/a/1.png", "Valid and .*val are both validation"),
        ("valid/a/1.png test/a/1.png", "pets has test, valid, but no folder train"),
        ("a/1.png b/1.png Testing/a/1.png", "pets has Testing, but no folder train"),
        ("é/1.png e\u0301/1.png b/1.png", "has another folder's name, in other bytes"),
        ("Train/a/1.png Train/b/1.png test/a/1.png test/c/1.png", "'c', which .*Train does not"),
    ],
)
def test_a_folder_of_another_layout_or_of_broken_pictures_is_refused(tmp_path, files, message):
    for name in files.split():
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).touch()
    with pytest.raises(UserError, match=message):
        load_dataset(f"folder:{tmp_path / 'pets'}", WANTED, validation_images=0)


# ---------------------------------------------------------------------------- torchvision's

LABELS = [number % 3 for number in range(12)]


def test_cifar100_is_read_and_resized_where_asked(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(12, 3072), dtype=np.uint8)
    content = {"data": pixels, "fine_labels": LABELS}
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(tv.CIFAR100, f"{name}_list", [[name, None]])  # of any md5
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear", "cup"]}))
    monkeypatch.setattr(tv.CIFAR100, "meta", tv.CIFAR100.meta | {"md5": None})
    pixels = pixels.reshape(12, 3, 32, 32)
    dataset = load_dataset("cifar100", validation_images=0, data_dir=tmp_path)
    assert dataset.classes == ("apple", "bear", "cup") and dataset.train.labels.tolist() == LABELS
    assert np.array_equal(images_of(dataset.test), pixels)
    assert dataset.preprocessing == preprocessing_for("cifar100")
    larger = load_dataset("cifar100", WANTED, validation_images=0, data_dir=tmp_path)
    image = Image.fromarray(pixels[5].transpose(1, 2, 0)).resize(SIZE, Image.Resampling.BICUBIC)
    assert np.array_equal(images_of(larger.train)[5].permute(1, 2, 0), np.asarray(image))


def test_stl10_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(12, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in LABELS))
        listed = [[f"{part}_X.bin", None], [f"{part}_y.bin", None]]  # of any md5
        monkeypatch.setattr(tv.STL10, f"{part}_list", listed)
    (folder / "class_names.txt").write_text("airplane\nbird\ncar")
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
    damage(base / "images/a_3.jpg", "cut off")
    dataset = load_dataset("oxford_pets", WANTED, validation_images=0, data_dir=tmp_path)
    assert len(dataset.test) == 11 and "2 of 24 images left out" in dataset.notes[0]


def test_files_of_a_data_set_that_hold_something_else_are_a_line(tmp_path):
    for part in ("train", "t10k"):
        for name in ("images-idx3", "labels-idx1"):
            file = tmp_path / f"FashionMNIST/raw/{part}-{name}-ubyte"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"something else")
    with pytest.raises(
        UserError, match=r"no usable FashionMNIST in .*; put its files into .* yours"
    ):
        load_dataset("fashion_mnist", WANTED, validation_images=0, data_dir=tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("svhn", tv.SVHN), ("flowers102", tv.Flowers102)])
def test_what_needs_scipy_says_so(name, kind, tmp_path, monkeypatch):
    def without_scipy(*_, **__):
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr(kind, "__init__", without_scipy)
    with pytest.raises(UserError, match="needs scipy: pip install scipy"):
        load_dataset(name, WANTED, validation_images=0, data_dir=tmp_path)


# ---------------------------------------------------------------------------- a run on a folder


def test_a_run_on_a_folder_goes_on_where_it_was_moved_unless_a_trained_picture_is_held_out(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = "--device cpu --batch-size 10 --warmup-epochs 0 --epochs 1 --output-dir ."
    begin = ["--recipe", "demo", *small.TINY, *flags.split(), "--dataset", "folder:pets"]
    assert trainer.main(begin) == 0
    saved = load_checkpoint("demo/last.pt")
    assert saved.training.dataset == f"folder:{folder}" and saved.drawn_from == 0

    folder.rename(moved := tmp_path / "moved")
    with pytest.raises(UserError, match=r"cannot read the folder .*pets.*--dataset folder:PATH"):
        trainer.main("--evaluate demo --device cpu".split())
    for number in range(40):  # for an epoch of more steps
        picture(number).save(moved / "birds" / f"more {number}.png")
    capsys.readouterr()
    for split, name in (("test", "test"), ("val", "validation")):
        trainer.main(f"--evaluate demo --device cpu --dataset folder:moved --split {split}".split())
        assert f" {name} images of folder:moved" in capsys.readouterr().out
    resume = "--resume demo --device cpu --epochs 2 --dataset folder:moved".split()
    assert trainer.main(resume) == 0
    again = load_checkpoint("demo/last.pt")
    assert again.training.dataset == f"folder:{moved}"
    assert again.step == again.history[-1].step == 2 * math.ceil(len(again.trained) / 10)

    monkeypatch.setattr(datasets, "TEST_SHARE", 0.5)
    with pytest.raises(UserError, match=r"was trained on .* pictures that folder:moved now holds"):
        trainer.main("--evaluate demo --device cpu --dataset folder:moved".split())
    by_row = dataclasses.replace(again, trained=None, drawn_from=67)
    with pytest.raises(UserError, match="were drawn from 67 by their rows, and are no longer"):
        check_fit(by_row, load_dataset("folder:moved", WANTED, validation_images=0))
    with pytest.raises(UserError, match="--dataset with --resume is for a moved folder"):
        trainer.main("--resume demo --device cpu --dataset shapes".split())
