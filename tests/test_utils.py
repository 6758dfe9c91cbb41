"""Checkpoints that describe themselves and run nothing, whole files, seeds, and the parser."""

import pickle

import pytest
import torch

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


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def damage(name, path, tmp_path):
    content = path.read_bytes()
    whole = torch.load(path, weights_only=True)
    if name == "text":
        path.write_text("not a checkpoint")
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif name == "pickle":
        path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    elif name == "torch pickle":
        torch.save({"format": 1, "weights": Trap(tmp_path / "sprung")}, path)
    elif name == "bare weights":
        torch.save(whole["weights"], path)
    elif name == "other format":
        torch.save(whole | {"format": 99}, path)
    elif name == "lacks weights":
        torch.save({key: value for key, value in whole.items() if key != "weights"}, path)
    elif name == "other width":
        torch.save(whole | {"model_config": whole["model_config"] | {"width": 32}}, path)
    elif name == "unknown option":
        torch.save(whole | {"model_config": whole["model_config"] | {"colour": "red"}}, path)
    elif name == "folder":
        path.unlink()
        path.mkdir()
    elif name == "gone":
        path.unlink()


DAMAGES = "text,empty,cut off,pickle,torch pickle,bare weights,other format,lacks weights"
DAMAGES += ",other width,unknown option,folder,gone"


@pytest.mark.parametrize("name", DAMAGES.split(","))
def test_what_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(name, checkpoint, tmp_path):
    damage(name, checkpoint, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


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
