"""Memory of a training step: the table's rows, and that checkpointed activations need less."""

import re

import cli
import memory
from ViT import MODELS


def test_recomputing_activations_needs_less_memory(monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "small", {"width": 64, "depth": 24, "heads": 1})
    monkeypatch.setattr(memory, "SIZES", ("small",))
    assert cli.status_of(memory.main, ["--image-size", "64", "--batch-size", "256"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    kept, recomputed = (float(value) for value in re.findall(r"([\d.]+) GB", line))
    assert recomputed < 0.7 * kept


def test_an_image_size_of_no_whole_patches_is_refused(capsys):
    assert cli.status_of(memory.main, ["--image-size", "100"]) == 2
    assert "must be a multiple of patch_size 16" in capsys.readouterr().err
