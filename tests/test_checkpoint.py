"""Checkpoints describe themselves and run no code; damaged files; the commit of the code."""

import math
import pickle
import random
import re

import pytest
import torch

import small
from checkpoint import code_commit, load_checkpoint, load_model, save_model
from utils import UserError


@pytest.fixture
def checkpoint(train, tmp_path):
    assert train("--name a --epochs 1") == 0
    return tmp_path / "a/last.pt"


def test_an_exported_model_is_a_small_checkpoint_of_half_precision(train, tmp_path, capsys):
    """It is loaded in full precision."""
    assert train("--name a --epochs 2 --optimizer muon") == 0
    assert train(f"--export {tmp_path / 'a'}") == 0
    last, exported = tmp_path / "a/last.pt", tmp_path / "a/model.pt"
    assert f"wrote {exported}" in capsys.readouterr().out
    weights = load_checkpoint(last).weights
    plain = torch.load(exported, weights_only=True)
    model, content = load_model(exported)
    for name, weight in model.state_dict().items():
        assert plain["weights"][name].dtype == torch.float16 and weight.dtype == torch.float32
        assert torch.equal(weight, weights[name].half().float())
    assert not model.training and content.history[1].epoch == 2
    assert content.classes == plain["classes"] == list(small.SHAPES.classes)
    assert content.preprocessing == small.SHAPES.preprocessing
    assert plain["model"]["width"] == 16 and plain["training"]["batch_size"] == 40
    assert exported.stat().st_size < last.stat().st_size / 3

    before = exported.read_bytes()
    assert train(f"--evaluate {exported}") == 0
    capsys.readouterr()
    for task, named in (
        (f"--resume {exported}", f"its last.pt, not {exported}"),
        (f"--export {tmp_path / 'a'}", "--overwrite"),
        (f"--export {tmp_path / 'b'}", f"{tmp_path / 'b'}"),
    ):
        assert train(task) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert exported.read_bytes() == before
    assert train(f"--export {tmp_path / 'a'} --overwrite") == 0


def test_weights_too_large_for_half_precision_are_not_exported(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    content.weights["head.bias"][3] = 1e5
    with pytest.raises(UserError, match="65,504"):
        save_model(tmp_path / "model.pt", content)
    assert not (tmp_path / "model.pt").exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


OTHERS = {
    "torch pickle": lambda whole, trap: whole | {"weights": trap},
    "bare weights": lambda whole, trap: whole["weights"],
    "a list": lambda whole, trap: [whole],
}


@pytest.mark.parametrize("kind", [*small.DAMAGES, "pickle", *OTHERS])
def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(kind, checkpoint, tmp_path):
    whole, trap = torch.load(checkpoint, weights_only=True), Trap(tmp_path / "sprung")
    if kind in small.DAMAGES:
        small.damage(checkpoint, kind)
    elif kind == "pickle":
        checkpoint.write_bytes(pickle.dumps(trap))
    else:
        torch.save(OTHERS[kind](whole, trap), checkpoint)
    with pytest.raises(UserError) as caught:
        load_model(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


# A place in a checkpoint, as its path of keys; what to put there; what the error names.
GONE = "a value that is taken away"
INVALID = [
    ("format", 99, "format 99, this code reads 5 and 6"),
    ("format", True, "src/trainer.py did not write it"),
    ("format", GONE, "src/trainer.py did not write it"),
    ("weights", GONE, "'weights'"),
    ("surprise", 1, "'surprise'"),
    ("model.width", 32, "size mismatch"),
    ("model.width", 10**30, "not a usable checkpoint"),
    ("model.depth", 1000, "depth is 1000, but there are"),
    ("training.epochs", 10**12, "epochs must be in [0, 1e6]"),
    ("model.color", "red", "ViTConfig.__init__() got an unexpected keyword argument 'color'"),
    ("model.image_size", (32, 32, 32), "image_size must be"),
    ("model.image_size", (2**20, 2**20), "1048576x1048576 is above 8192"),
    ("weights.head.bias", GONE, 'Missing key(s) in state_dict: "head.bias"'),
    ("weights.head.extra", torch.zeros(1), 'Unexpected key(s) in state_dict: "head.extra"'),
    ("weights.head.bias", torch.zeros(11), "size mismatch for head.bias"),
    ("weights.head.bias", torch.zeros(10, dtype=torch.int64), "Only Tensors of floating point"),
    ("weights.head.bias", torch.zeros(1).expand(10), "larger than what the file holds of it"),
    ("weights.head.bias", torch.full((10,), math.inf), "head.bias has values that are not finite"),
    ("history.0.epoch", 7, "history must have a row for each epoch"),
    ("history.0.train_loss", GONE, "'train_loss'"),
    ("step", 11, "step 6 of 5"),
    ("step", 4, "step -1 of 5"),
    ("step", "8", "step must be int, not '8'"),
    ("sums", {"loss": "low"}, "sums must be dict[str, torch.Tensor], not a dict"),
    ("sums", {"loss": torch.zeros(3)}, "sums must hold loss and correct"),
    ("seconds", {"epoch": math.inf}, "seconds must be dict[str, float], not a dict"),
    ("classes", ["cat"], "1 names, but the model has 10 classes"),
    ("classes", [f"class {n}" for n in range(10)], "'disc' instead of 'class 0'"),
    ("preprocessing.size", (16, 16), "preprocessing is not that of 3 x 32 x 32 pixels"),
    ("optimizers", [], "without its optimizers"),
    ("optimizers", [{}], "optimizers has 1 entries, not 2"),
    ("optimizers.0", {}, "the state of AdamW is not that of"),
    ("optimizers.0.0", {}, "the state of AdamW is not that of"),
    ("optimizers.0.0.step", torch.zeros(3), "the state of AdamW is not that of"),
    ("optimizers.1.0.momentum_buffer", torch.zeros(()), "the state of Muon is not that of"),
    ("optimizers.0.0.step", torch.tensor(math.nan), "step has values that are not finite"),
]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A checkpoint from the middle of an epoch, with both optimizers."""
    folder = tmp_path_factory.mktemp("half_way")
    flags = "--name a --epochs 2 --optimizer muon --save-minutes 0"
    start = small.start(flags, folder)
    assert small.finished(start) == 0
    whole = torch.load(folder / "a/last.pt", weights_only=True)
    whole["history"] = whole["history"][:1]
    whole |= {"step": 8, "sums": {"loss": torch.tensor(3.0), "correct": torch.tensor(9)}}
    whole["seconds"]["epoch"] = 1.0
    torch.save(whole, folder / "a/last.pt")
    return folder / "a/last.pt"


@pytest.mark.parametrize(("place", "value", "named"), INVALID, ids=lambda value: f"{value!s:.40}")
def test_a_checkpoint_with_an_invalid_field_is_refused_in_one_line(
    train, half_way, tmp_path, capsys, place, value, named
):
    path = tmp_path / "last.pt"
    content = torch.load(half_way, weights_only=True)
    *keys, last = place.split(".", 1) if place.startswith("weights") else place.split(".")
    inner = content
    for key in keys:
        inner = inner[int(key) if key.isdigit() else key]
    last = int(last) if last.isdigit() else last
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    torch.save(content, path)
    assert train(f"--resume {path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    data_only = "instead of" in named  # an error about the data set
    assert named in line and (data_only or str(path) in line) and len(line) < 500


def resumed(train, content, folder):
    """The folder of a run that is resumed from this content of a checkpoint."""
    folder.mkdir()
    torch.save(content, folder / "last.pt")
    assert train(f"--resume {folder}") == 0
    return folder


def test_fields_that_a_file_lacks_have_their_defaults(train, half_way, tmp_path):
    """Also checks that `half_way` is a good checkpoint before `INVALID` changes it."""
    content = torch.load(half_way, weights_only=True)
    whole = resumed(train, content, tmp_path / "whole")
    for name, part in (("seconds", ""), ("cutmix", "training"), ("drop_path", "model")):
        del (content[part] if part else content)[name]
    torch.save(content, tmp_path / "lacking.pt")
    loaded = load_checkpoint(tmp_path / "lacking.pt")
    assert (loaded.seconds, loaded.training.cutmix, loaded.model.drop_path) == ({}, 0.0, 0.0)
    assert small.differing(whole, resumed(train, content, tmp_path / "lacking")) == 0


def test_a_run_of_the_last_format_resumes_to_the_same_end(train, half_way, tmp_path):
    """From the middle of an epoch, with both optimizers and options in that format's units."""
    new = torch.load(half_way, weights_only=True)
    new["training"] |= {"cutmix": 1.0, "mixing_off_epochs": 1}
    old = {name: value for name, value in new.items() if name not in ("step", "sums", "seconds")}
    training = {k: v for k, v in new["training"].items() if not k.endswith("off_epochs")}
    old |= {"format": 5, "compile_seconds": 0.0, "total_seconds": 2.0}
    old["training"] = training | {"policy_epochs": 1.0, "mixed_epochs": 0.4}  # of two, rounded up
    losses = torch.tensor([1.0, 0.5, 1.5])
    old["partial"] = {"steps": 3, "losses": losses, "correct": 9, "seconds": 1.0}
    ends = [resumed(train, each, tmp_path / name) for name, each in (("new", new), ("old", old))]
    assert small.differing(*ends) == 0


# ---------------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_refused_in_one_line_or_harmless(half_way, tmp_path):
    """Cut off, or with a bit flipped, at 100 random places; a flip in padding does no harm."""
    content, path = half_way.read_bytes(), tmp_path / "damaged.pt"
    chance, good, refused = random.Random(0), load_checkpoint(half_way), 0
    for _ in range(100):
        place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        flipped = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        for damaged in (content[:place], flipped):
            path.write_bytes(damaged)
            try:
                loaded = load_checkpoint(path)
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                refused += 1
            else:
                assert repr(loaded) == repr(good)  # without most of a tensor
                pairs = zip(small.tensors_of(loaded), small.tensors_of(good), strict=True)
                assert damaged == flipped and all(small.same_weights(*pair) for pair in pairs)
    assert refused > 150


def test_the_commit_of_the_code_has_a_mark_where_files_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.ROOT", tmp_path)
    assert code_commit() is None
    (tmp_path / "COMMIT").write_text("0123abc\n")
    assert code_commit() == "0123abc"

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        small.ran("git", "-C", tmp_path, *identity, *arguments, check=True)

    (tmp_path / "src").mkdir()
    (tmp_path / "src/ViT.py").write_text("committed")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = code_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "src/ViT.py").write_text("changed")
    assert code_commit() == commit + "+"
