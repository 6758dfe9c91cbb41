"""Classes of image files: numbers as the model computes them, in the order of the files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from checkpoint import load_model
from data import Preprocessing
from small import ROOT
from utils import status_of

SHIPPED = ROOT / "checkpoints/vit_cifar10.pt"
DEER = ROOT / "docs/deer.png"


@pytest.fixture
def files(tmp_path):
    Image.new("L", (50, 40), 200).save(tmp_path / "a.png")
    Image.open(DEER).save(tmp_path / "b.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_json_has_each_file_that_is_named_with_its_most_probable_classes(
    files, capsys, monkeypatch
):
    monkeypatch.setattr(predict, "batch_size_for", lambda config: 1)
    flags = ["--top", "3", "--json", "--device", "cpu"]
    assert predict.main([str(files), *[str(DEER)] * 2, *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    named = [*map(str, sorted(files.glob("*.*g"))), *[str(DEER)] * 2]
    assert [row["file"] for row in rows] == named
    model, checkpoint = load_model(SHIPPED)
    for row in rows:
        images = checkpoint.preprocessing.read(row["file"])[None]
        with torch.no_grad():
            logits = model(checkpoint.preprocessing.normalize(images))[0]
        best = logits.softmax(dim=0).topk(3)
        classes = [checkpoint.classes[number] for number in best.indices]
        assert [each["class"] for each in row["predictions"]] == classes
        found = torch.tensor([each["probability"] for each in row["predictions"]])
        torch.testing.assert_close(found, best.values, rtol=0, atol=1e-5)


def test_features_and_logits_of_each_file_are_written_for_numpy(files, capsys, monkeypatch):
    monkeypatch.setattr(predict, "batch_size_for", lambda config: 1)
    out = files / "new/out.npz"
    command = [str(files), str(DEER), str(DEER), "--features", str(out), "--device", "cpu"]
    assert predict.main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    model, checkpoint = load_model(SHIPPED)
    seen = []
    model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0][0]))
    with np.load(out, allow_pickle=False) as found:
        expected = [files / "a.png", files / "b.jpg", DEER, DEER]
        assert found["names"].tolist() == [*map(str, expected)]
        assert tuple(found["classes"]) == tuple(checkpoint.classes)
        assert found["features"].dtype == found["logits"].dtype == np.float32
        for name, features, logits in zip(*(found[k] for k in list(found)[:3]), strict=True):
            images = checkpoint.preprocessing.read(name)[None]
            with torch.no_grad():
                expected = model(checkpoint.preprocessing.normalize(images))[0]
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.tensor(features), seen[-1], rtol=0, atol=1e-5)


def test_a_line_for_each_file_by_the_model_of_a_run(train, tmp_path, capsys):
    assert train("--name run --epochs 1 --no-test") == 0
    capsys.readouterr()
    flags = ["--checkpoint", str(tmp_path / "run"), "--device", "cpu"]
    assert predict.main([str(DEER), *flags]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{DEER}: ") and line.endswith("%") and line.count(",") == 0


def test_what_cannot_be_read_or_written_does_not_keep_back_the_rest(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    (files / "~ab.heic").write_text("not a picture")  # "~" is no user's home here
    command = [str(files), "~ab.heic", "--features", "notes.txt/out.npz", "--device", "cpu"]
    assert predict.main(command) == 2
    captured = capsys.readouterr()
    printed = [line.split(":")[0] for line in captured.out.splitlines()]
    assert printed == [str(files / "a.png"), str(files / "b.jpg")]
    others, constant, unreadable, unwritten = captured.err.splitlines()
    assert constant.endswith(f"1 of 3 are nearly constant, such as {files / 'a.png'}")
    assert f"left out of {files}: 1 .heic (pip install pillow-heif), 1 .txt" in others
    assert "cannot read ~ab.heic" in unreadable and unreadable.endswith("pillow-heif)")
    assert "cannot write notes.txt/out.npz" in unwritten


def test_numbers_that_are_not_finite_are_no_prediction(files, monkeypatch, capsys):
    monkeypatch.setattr(Preprocessing, "normalize", lambda *_: torch.full((1, 3, 32, 32), 1e38))
    assert status_of(predict.main, [str(DEER), "--json", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "computes no finite numbers" in captured.err and captured.out == ""
