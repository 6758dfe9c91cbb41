"""What the figures are of: the options, a checkpoint with its data set, and some of its images.

What several figures need is computed once, on first use.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

import explain
import utils
from checkpoint import RUN_FILES, check_fit, load_model
from config import Config
from data import Batch, Dataset, Split, by_kind, image_files
from datasets import load_dataset
from evaluation import predict
from explain import Record
from style import by
from utils import UserError

PROBE_IMAGES = 128  # of the figures of many images
PROBE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """What to draw, and how.

    Layers, heads, patch rows and patch columns count from 1, images of a data set from 0.
    """

    what: str = "all"  # or a group of figures
    index: list[int] | None = None  # images of the data set, or
    image: list[Path] | None = None  # image files, or
    dir: Path | None = None  # all image files in a folder
    layer: int | str = "all"
    head: int | str = "all"  # or "mean", "max" or "min" over the heads
    query: str | tuple[int, int] | None = None  # "cls" for the classifier, or a patch
    checkpoint: Annotated[Path | None, "a file, or a run's folder (the newest in checkpoints/)"] = (
        None
    )
    target: Annotated[str, "class to explain: pred, label (the true one) or a name"] = "pred"
    split: Annotated[
        Literal["validation", "test"], "images to show; test, if none were held out for validation"
    ] = "validation"
    images: Annotated[int, "of faithfulness: how many images", "[2, inf)"] = 100
    removal: Annotated[
        Literal["drop", "mean", "black"], "of faithfulness: drop a patch's token, or paint it"
    ] = "drop"
    seed: Annotated[int, "of the random choice of images", "[0, 1e15]"] = 0
    data_dir: Annotated[Path, "where data sets are, or are downloaded to"] = utils.ROOT / "data"
    device: Annotated[str | None, "cuda, cuda:1, mps or cpu (the best available)"] = None
    out: Annotated[Path | None, "where to write (visualization/out/<run>)"] = None
    format: Annotated[Literal["png", "pdf", "svg"], "of the figures"] = "png"
    dpi: Annotated[int, "dots per inch", "[20, 1200]"] = 200
    save_data: Annotated[bool, "also write the arrays of each figure, as .npz"] = False


@dataclass(frozen=True)
class Subject:
    """One image to explain."""

    name: str  # of its folder of figures
    title: str
    pixels: Tensor  # (C, H, W) uint8
    label: int | None  # the true class, where it is known


class Probe(NamedTuple):
    """What the model computes of n images of its data set; all on the CPU."""

    pixels: Tensor  # (n, C, H, W) uint8
    labels: Tensor  # (n,)
    distance: Tensor  # (n, L, h) mean attention distance in pixels
    entropy: Tensor  # (n, L, h)
    rollout: Tensor  # (n, g_h, g_w)
    tokens: Tensor  # (n, L + 1, T, D)
    pooled: Tensor  # (n, D), the input of the head
    predictions: Tensor  # (n,)


class Model:
    """A checkpoint, and what the figures need of it."""

    def __init__(self, path: Path, device: torch.device, options: Options):
        self.path, self.device, self.options = path, device, options
        self.vit, self.checkpoint = load_model(path, device)
        self.config, self.classes = self.checkpoint.model, self.checkpoint.classes
        self.run = path.resolve().parent.name if path.name in RUN_FILES else path.stem

    # ------------------------------------------------------------------------ its data set

    @cached_property
    def dataset(self) -> Dataset:
        """Raises UserError where it is not available, or does not fit the model."""
        training = self.checkpoint.training
        dataset = load_dataset(
            training.dataset,
            self.checkpoint.preprocessing,
            validation_images=training.validation_images,
            device=self.device,
            data_dir=self.options.data_dir,
        )
        check_fit(self.checkpoint, dataset)
        return dataset

    @cached_property
    def split_name(self) -> str:
        """The chosen split, or test where there are no validation images; UserError if neither."""
        for name in (self.options.split, "test"):
            if getattr(self.dataset, name):
                return name
        raise UserError(f"{self.dataset.name} has no {self.options.split} images")

    @property
    def split(self) -> Split:
        return getattr(self.dataset, self.split_name)

    @property
    def of_split(self) -> str:
        return f"{self.split_name} images of {self.dataset.name}"

    @cached_property
    def why_no_data(self) -> str | None:
        """Why the images of the data set are not available; None where they are."""
        try:
            _ = self.split
        except UserError as error:
            return str(error)
        return None

    def sample(self, split: Split, count: int) -> Tensor:
        """Random rows (count,) of a split, or all of a smaller one; they depend on --seed."""
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randperm(len(split), generator=generator)[:count].to(self.device)

    # ------------------------------------------------------------------------ single images

    def subjects(self, by_default: Iterable[int]) -> list[Subject]:
        """The images that the options name, or those of the split with the default indices.

        Raises:
            UserError: an index is out of range, or a file cannot be read as an image.
        """
        options = self.options
        if options.image or options.dir:
            files, others = (options.image, None) if options.image else image_files(options.dir)
            if others:
                print(f"left out of {options.dir}: {by_kind(others)}")
            size = by(*self.config.image_size)
            read = self.checkpoint.preprocessing.read
            return [
                Subject(name, f"{file.name} at {size}", read(file), None)
                for name, file in zip(unique([f.name for f in files]), files, strict=True)
            ]
        count = len(self.split)
        chosen = options.index or [index for index in by_default if index < count]
        for index in chosen:
            if not 0 <= index < count:
                raise UserError(
                    f"--index {index} is out of range 0 to {count - 1} of the {self.of_split}"
                )
        indices, name = list(dict.fromkeys(chosen)), self.split_name
        images, labels = self.split.take(torch.tensor(indices, device=self.device))
        return [
            Subject(f"{name}-{index}", f"{name} image {index}", image, int(label))
            for index, image, label in zip(indices, images, labels, strict=True)
        ]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as the model takes them, on its device."""
        return self.checkpoint.preprocessing.normalize(images.to(self.device))

    @torch.no_grad()
    def record(self, images: Tensor) -> Record:
        """What the model computes of uint8 images (B, C, H, W)."""
        return explain.record(self.vit, self.normalize(images))

    def probabilities_of(self, subject: Subject) -> Tensor:
        """(K,)"""
        return self.record(subject.pixels[None]).logits[0].softmax(dim=0)

    def describe(self, subject: Subject) -> str:
        """The title of an image's figures: the image, its predicted class and its true class."""
        probabilities = self.probabilities_of(subject)
        predicted = int(probabilities.argmax())
        prediction = f"{self.classes[predicted]} ({probabilities[predicted]:.1%})"
        text = f"{subject.title}: predicted {prediction}"
        return (
            text if subject.label is None else f"{text}, true class {self.classes[subject.label]}"
        )

    # ------------------------------------------------------------------------ many images

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, K), of the whole split."""
        return predict(self.vit, self.split, self.checkpoint.preprocessing).softmax(dim=1)

    @cached_property
    def probe(self) -> Probe:
        rows = self.sample(self.split, PROBE_IMAGES).split(PROBE_BATCH)
        parts = [self._probe_of(batch) for batch in self.split.batches(rows)]
        return Probe(*(torch.cat(fields).cpu() for fields in zip(*parts, strict=True)))

    @torch.inference_mode()
    def _probe_of(self, batch: Batch) -> Probe:
        config = self.config
        logits, attention, tokens = self.record(batch.images)
        distances = [
            explain.attention_distance(A, config.grid, config.patch_size) for A in attention
        ]
        joint = explain.classifier_row(explain.rollout(attention), config.pooling)
        return Probe(
            batch.images,
            batch.labels,
            torch.stack(distances, dim=1),
            torch.stack([explain.attention_entropy(A) for A in attention], dim=1),
            joint.unflatten(-1, config.grid),
            torch.stack(tokens, dim=1),
            self.vit.norm(self.vit.pool(tokens[-1])),
            logits.argmax(dim=1),
        )


def unique(names: list[str]) -> Iterator[str]:
    """The names, with a number appended to repeated ones: a.png, b.png, a.png-2."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"
