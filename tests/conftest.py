"""What several tests need: a small data set in place of the real one, and runs of the trainer."""

import dataclasses

import pytest
import torch

import data
import trainer

TINY = "--patch-size 8 --width 16 --depth 2 --heads 2 --batch-size 40 --warmup-epochs 0.5".split()


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are cut up by the number of threads; one makes every machine's tests the same."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_shapes():
    """The Shapes data set with 200 training images (the last 40 in a short batch), 50 and 60."""
    classes = tuple(data.SHAPES)
    draw = data.draw_shapes
    parts = {"train": draw(200, seed=0), "validation": draw(50, seed=1), "test": draw(60, seed=2)}
    return data.Dataset("shapes", classes, (0.31,) * 3, (0.247,) * 3, **parts)


@pytest.fixture
def load_small_shapes(small_shapes):
    """Stands in for `load_dataset`: the small data set, without validation images where 0 are."""

    def load(name, *, validation_images, **_):
        rows = torch.arange(len(small_shapes.validation) if validation_images else 0)
        return dataclasses.replace(small_shapes, validation=small_shapes.validation.take(rows))

    return load


@pytest.fixture
def train(monkeypatch, tmp_path, load_small_shapes):
    """train("--epochs 2 ...") runs a tiny demo recipe into tmp_path and returns its exit status."""
    monkeypatch.setattr(trainer, "load_dataset", load_small_shapes)

    def run(flags):
        recipe = [] if "--resume" in flags or "--evaluate" in flags else ["--recipe", "demo", *TINY]
        return trainer.main([*recipe, "--output-dir", str(tmp_path), *flags.split()])

    return run
