"""Checkpoints that describe themselves and run nothing, whole files, seeds, and the parser."""

import math
import os
import pickle
import random
import zipfile

import pytest
import torch

import small
import utils
from utils import CheckpointError, generator_for, load_model, write_whole


@pytest.fixture
def checkpoint(train, tmp_path):
    assert train("--name a --epochs 1") == 0
    return tmp_path / "a/last.pt"


def test_a_checkpoint_alone_gives_back_the_model(checkpoint, small_shapes):
    model, content = load_model(checkpoint)
    plain = torch.load(checkpoint, weights_only=True)
    assert plain["classes"] == list(small_shapes.classes) and content["mean"] == [0.31] * 3
    assert plain["model_config"]["width"] == 16 and plain["train_config"]["batch_size"] == 40
    twin, _ = load_model(checkpoint)
    images = torch.randn(3, 3, 32, 32)
    assert not model.training
    assert torch.equal(model(images), twin(images))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, plain["weights"][name])


def test_a_model_alone_is_a_small_checkpoint_of_half_precision(train, tmp_path, capsys):
    """Of the averaged weights, which are those that count; loaded in full precision."""
    assert train("--name a --epochs 2 --averaging 0.9 --optimizer muon") == 0
    assert train(f"--export {tmp_path / 'a'}") == 0
    last, alone = tmp_path / "a/last.pt", tmp_path / "a/model.pt"
    assert f"wrote {alone}" in capsys.readouterr().out
    averaged = utils.load_checkpoint(last)["averaged"]
    plain = torch.load(alone, weights_only=True)
    model, content = load_model(alone)
    for name, weight in model.state_dict().items():
        assert plain["weights"][name].dtype == torch.float16 and weight.dtype == torch.float32
        assert torch.equal(weight, averaged[name].half().float())
    assert content["history"][1]["epoch"] == 2 and content["classes"] == plain["classes"]
    assert alone.stat().st_size < last.stat().st_size / 3

    before = alone.read_bytes()
    assert train(f"--evaluate {alone}") == 0
    capsys.readouterr()
    for task, named in (
        (f"--resume {alone}", "without its optimizers"),
        (f"--export {tmp_path / 'a'}", "--overwrite"),
        (f"--export {tmp_path / 'b'}", f"{tmp_path / 'b'}"),
    ):
        assert train(task) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert alone.read_bytes() == before
    assert train(f"--export {tmp_path / 'a'} --overwrite") == 0


def test_weights_too_large_for_half_precision_are_not_exported(checkpoint, tmp_path):
    content = utils.load_checkpoint(checkpoint)
    content["weights"]["head.bias"][3] = 1e5
    with pytest.raises(CheckpointError, match="65,504"):
        utils.save_model(tmp_path / "model.pt", content)
    assert not (tmp_path / "model.pt").exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def damage(name, path, tmp_path):
    content = path.read_bytes()
    whole = torch.load(path, weights_only=True)
    trap = Trap(tmp_path / "sprung")
    if name == "text":
        path.write_text("not a checkpoint")
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif name == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif name == "torch pickle":
        torch.save(whole | {"weights": trap}, path)
    elif name == "old torch pickle":
        torch.save(whole | {"weights": trap}, path, _use_new_zipfile_serialization=False)
    elif name == "trap for a key":
        torch.save(whole | {trap: 1}, path)
    elif name == "slow key":
        # A dict, a pair, 60 times the pair of the last one with itself, and that a key of the dict.
        pairs = b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(60))
        repack(path, pickled=b"\x80\x02}))\x86q\x00" + pairs + b"K\x01s.")
    elif name == "program":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif name == "compressed":
        repack(path, zipfile.ZIP_DEFLATED)
    elif name == "bomb":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/bomb", bytes(2**24))
    elif name == "bare weights":
        torch.save(whole["weights"], path)
    elif name == "a list":
        torch.save([whole], path)
    elif name == "folder":
        path.unlink()
        path.mkdir()
    elif name == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif name == "gone":
        path.unlink()


def repack(path, compression=zipfile.ZIP_STORED, pickled=None):
    """Writes an archive again, with another pickle where one is given."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            replaced = pickled is not None and name.endswith("data.pkl")
            archive.writestr(name, pickled if replaced else content)


DAMAGES = "text,empty,cut off,pickle,torch pickle,old torch pickle,trap for a key,slow key,program"
DAMAGES += ",compressed,bomb,bare weights,a list,folder,pipe,gone"


@pytest.mark.filterwarnings("ignore")  # of torch.jit, and of names twice in an archive
@pytest.mark.parametrize("name", DAMAGES.split(","))
def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(name, checkpoint, tmp_path):
    damage(name, checkpoint, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def deep(levels):
    """A list that takes 2^levels steps to print."""
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


# Places in a checkpoint, as the keys that lead there, what to put there, and what the line names.
GONE = object()
LIES = [
    ("format", 99, "format 99"),
    ("format", 2, "format 2"),
    ("format", True, "nothing that src/trainer.py wrote"),
    ("format", deep(60), "nothing that src/trainer.py wrote"),
    ("weights", GONE, "lacks 'weights'"),
    ("surprise", 1, "unknown 'surprise'"),
    ("recipe", deep(60), "'recipe'"),
    ("model_config.width", 32, "but the model's is"),
    ("model_config.width", "16", "'width'"),
    ("model_config.width", 10**30, "no checkpoint to use"),
    ("model_config.depth", 10**9, "depth 1000000000"),
    ("model_config.depth", GONE, "'depth'"),
    ("model_config.colour", "red", "'colour'"),
    ("model_config.pooling", "max", "'pooling'"),
    ("model_config.dropout", math.nan, "'dropout'"),
    ("model_config.image_size", (32, 32, 32), "'image_size'"),
    ("model_config.image_size", (2**20, 2**20), "too many patches"),
    ("weights.head.bias", GONE, "lacks 'head.bias'"),
    ("weights.head.extra", torch.zeros(1), "unknown 'head.extra'"),
    ("weights.head.bias", torch.zeros(11), "head.bias"),
    ("weights.head.bias", torch.zeros(10).double(), "head.bias"),
    ("weights.head.bias", torch.full((10,), math.inf), "head.bias"),
    ("weights.head.bias", torch.zeros(1).expand(10), "head.bias"),
    ("weights.head.bias", torch.zeros(10).to_sparse(), "head.bias"),
    ("weights.head.bias", torch.zeros(10, device="meta"), "head.bias"),
    ("weights.head.bias", [0.0] * 10, "'weights'"),
    ("averaged", GONE, "lacks 'averaged'"),
    ("averaged", {}, "averaged weights"),
    ("averaged.head", torch.zeros(10), "unknown 'head'"),
    ("epoch", 2, "'epoch'"),
    ("epoch", "1", "'epoch'"),
    ("history", [], "'epoch'"),
    ("history.0.train_loss", math.nan, "'train_loss'"),
    ("history.0.train_loss", GONE, "'train_loss'"),
    ("history.0.epoch", 7, "calls itself 7"),
    ("history.0.validation_loss", None, "validation figures"),
    ("history.0.seconds", 0.0, "no time"),
    ("partial.losses", torch.zeros(4), "one loss for each step"),
    ("partial.losses", torch.zeros(1).expand(10**13), "'losses'"),
    ("partial.correct", None, "'correct'"),
    ("seconds.total", GONE, "'total'"),
    ("classes", ["cat"], "'classes'"),
    ("classes", list(range(10)), "entry 0 of 'classes'"),
    ("mean", [0.3, 0.3], "'mean'"),
    ("mean", [0.3, 0.3, math.inf], "'mean'"),
    ("std", [0.3, 0.3, 0.0], "'std'"),
    ("std", [10**400] * 3, "no checkpoint to use"),
    ("versions.torch", 2, "'versions'"),
    ("train_config.epochs", GONE, "'epochs'"),
    ("train_config.epochs", 0, "epochs must be"),
    ("train_config.dataset", "imagenet", "'dataset'"),
    ("train_config.speed", 1, "'speed'"),
    ("partial.steps", -1, "one loss for each step"),
    ("optimizers", [], "optimizers"),
    ("optimizers.0", {}, "AdamW lacks 0"),
    ("optimizers.0.1.exp_avg", torch.zeros(3), "'exp_avg' of AdamW"),
    ("optimizers.0.1.exp_avg", GONE, "'exp_avg'"),
    ("optimizers.1.0.momentum_buffer", torch.tensor(math.nan), "optimizers"),
]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A checkpoint from within an epoch, by both optimizers, with averaged weights."""
    folder = tmp_path_factory.mktemp("half_way")
    flags = "--name a --epochs 2 --optimizer muon --averaging 0.9 --save-minutes 0"
    start = small.start(flags, folder)
    assert small.finished(start) == 0
    whole = torch.load(folder / "a/last.pt", weights_only=True)
    whole |= {"epoch": 1, "history": whole["history"][:1]}
    whole["partial"] = {"steps": 3, "losses": torch.ones(3), "correct": 9, "seconds": 1.0}
    torch.save(whole, folder / "a/last.pt")
    return folder / "a/last.pt"


@pytest.mark.parametrize(("place", "value", "named"), LIES)
def test_a_checkpoint_that_lies_is_refused_in_one_line(
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
    assert str(path) in line and named in line and len(line) < 500


def test_the_checkpoint_the_lies_are_put_into_is_a_good_one(train, half_way):
    assert train(f"--resume {half_way}") == 0


def flipped(content, chance, places):
    """A file with a few bits changed at random, at some of the given places."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 8))):
        content[chance.choice(places)] ^= 1 << chance.randrange(8)
    return bytes(content)


def parts_of_archive(path):
    """Where the parts of a checkpoint lie: the pickle, headers of records, tensors, directory."""
    with zipfile.ZipFile(path) as archive:
        records, directory = archive.infolist(), archive.start_dir
    size = path.stat().st_size
    parts = {"directory": range(directory, size), "anywhere": range(size), "first": range(64)}
    parts["headers"] = [
        at for each in records for at in range(each.header_offset, each.header_offset + 60)
    ]
    (pickled,) = (each for each in records if each.filename.endswith("data.pkl"))
    begin = pickled.header_offset + 64
    parts["pickle"] = range(begin, begin + pickled.file_size)
    return parts


def tensors_of(checkpoint):
    return [checkpoint["weights"], checkpoint["averaged"], *small.flat(checkpoint["optimizers"])]


def fuzz(half_way, tmp_path, each, seed):
    """Loads damaged copies; every one is refused in a line, or is what it was.

    Returns:
        How many were refused, and how many had their damage where nothing is read.
    """
    content, path = half_way.read_bytes(), tmp_path / "damaged.pt"
    chance, parts = random.Random(seed), parts_of_archive(half_way)
    damaged = [content[: chance.randrange(len(content))] for _ in range(each)]
    damaged += [content[:-length] for length in range(1, each + 1)]
    for places in parts.values():
        damaged += [flipped(content, chance, places) for _ in range(each)]
    pickled = content[parts["pickle"].start : parts["pickle"].stop]
    good = dict(utils.load_checkpoint(half_way))
    refused = unharmed = 0
    for number in range(len(damaged) + each):
        if number < len(damaged):
            path.write_bytes(damaged[number])
        else:  # a pickle with bits changed and its checksum right: only the content tells
            path.write_bytes(content)
            repack(path, pickled=flipped(pickled, chance, range(len(pickled))))
        try:
            _, loaded = load_model(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            if number < len(damaged):
                assert repr(loaded) == repr(good), number  # which leaves out most of a tensor
                assert all(map(small.same_weights, tensors_of(loaded), tensors_of(good))), number
            unharmed += 1
    return refused, unharmed


def test_damaged_checkpoints_are_refused_in_one_line(half_way, tmp_path):
    refused, unharmed = fuzz(half_way, tmp_path, each=40, seed=0)
    print(f"{refused + unharmed} damaged files: {refused} refused, {unharmed} unharmed")
    assert refused + unharmed >= 300 and refused > 200


@pytest.mark.slow
def test_many_damaged_checkpoints_are_refused_in_one_line(half_way, tmp_path):
    refused, unharmed = fuzz(half_way, tmp_path, each=1500, seed=1)
    print(f"{refused + unharmed} damaged files: {refused} refused, {unharmed} unharmed")
    assert refused > 8000


def test_a_failed_save_keeps_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"good")

    def disk_full(_):
        raise OSError("disk full")

    monkeypatch.setattr(utils.os, "fsync", disk_full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"better")
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_make_is_not_written(tmp_path):
    with pytest.raises(AssertionError):
        utils.save_checkpoint(tmp_path / "x.pt", weights={})
    assert not list(tmp_path.iterdir())


def test_generators_depend_on_their_key_and_on_nothing_else():
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 0, 0), (0, 1, 0), (2**40, 3)]
    draws = {key: torch.rand(4, generator=generator_for(*key)).tolist() for key in keys}
    torch.manual_seed(7)
    for key in keys:
        assert draws[key] == torch.rand(4, generator=generator_for(*key)).tolist()
    assert len({tuple(draw) for draw in draws.values()}) == len(keys)


@pytest.mark.parametrize(("text", "size"), [("32", (32, 32)), ("32x48", (32, 48))])
def test_an_image_size_is_one_number_or_two(text, size):
    assert utils._height_and_width(text) == size
