"""Memory of a training step: the table's rows; that recomputing saves it is in test_ViT.py."""

import re

import memory
from utils import status_of


def test_a_row_states_the_model_and_both_peaks(monkeypatch, capsys):
    monkeypatch.setattr(memory, "SIZES", ("small",))
    assert status_of(memory.main, ["--batch-size", "32"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| small | 22,050,664 | 28e9 |")  # timm's count; 4.6e9 forward, x 6
    kept, recomputed = (float(value) for value in re.findall(r"([\d.]+) GB", line))
    assert 0.2 < recomputed < kept


def test_an_image_size_of_no_whole_patches_is_refused(capsys):
    assert status_of(memory.main, ["--image-size", "100"]) == 2
    assert "must be a multiple of patch_size 16" in capsys.readouterr().err
