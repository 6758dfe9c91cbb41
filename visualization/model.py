"""What the figures show: the options, a checkpoint with its data set, and some of its images.

What several figures need is computed once, on first use.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import ViT_B_16_Weights

import explain
import utils
from checkpoint import RUN_FILES, Checkpoint, check_fit, load_model
from config import Config
from curves import shown
from data import Batch, Dataset, Preprocessing, Split, by_kind, image_files, nearly_constant
from datasets import load_dataset
from evaluation import predict
from explain import Record
from pretrained import load_pretrained
from recipes import TrainConfig
from style import by, to_picture
from utils import UserError, printable
from ViT import ViT
from weight_files import SAVED_AS

PROBE_IMAGES = 128  # in the figures of many images
PROBE_BATCH = 32
IMAGENET = tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
PHOTO = 1600  # most pixels of a drawn photo, each way


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
    start_layer: Annotated[int, "first layer of rollout, relevance and LeGrad", "[1, inf)"] = 1
    query: str | tuple[int, int] | None = None  # "cls" for the classifier, or a patch
    checkpoint: Annotated[Path | None, "a file, or a run's folder (the newest one)"] = None
    weights: Annotated[
        str | None, "instead: timm:NAME, torchvision:NAME or a file of either's weights"
    ] = None
    heads: Annotated[int | None, "attention heads, which such a file does not state"] = None
    mean: Annotated[tuple[float, ...] | None, "of its images: one, or one per channel"] = None
    std: Annotated[tuple[float, ...] | None, "standard deviation, likewise"] = None
    crop: Annotated[float | None, "share of each side of an image file that is kept"] = None
    image_size: Annotated[int | tuple[int, int] | None, "other than that of the weights"] = None
    target: Annotated[str, "class to explain: pred, label (the true one) or a name"] = "pred"
    split: Annotated[
        Literal["validation", "test"], "images to show; test, if none were held out for validation"
    ] = "validation"
    images: Annotated[int, "how many images faithfulness takes", "[2, inf)"] = 100
    removal: Annotated[Literal["drop", "mean", "black"], "drop patches or paint them"] = "drop"
    seed: Annotated[int, "for the random choice of images", "[0, 1e15]"] = 0
    dataset: Annotated[str | None, "folder:PATH, where the model's pictures are now"] = None
    data_dir: Annotated[Path, "where data sets are, or are downloaded to"] = utils.ROOT / "data"
    device: Annotated[str | None, "cuda, cuda:1, mps or cpu (the best available)"] = None
    out: Annotated[Path | None, "where to write (visualization/out/<run>)"] = None
    format: Annotated[Literal["png", "pdf", "svg"], "of the figures"] = "png"
    dpi: Annotated[int, "dots per inch", "[20, 1200]"] = 200
    int8: Annotated[bool, "explorer: weights in 8 bits, for a page of half the size"] = False
    save_data: Annotated[bool, "also write the arrays of each figure, as .npz"] = False


@dataclass(frozen=True)
class Subject:
    """One image to explain."""

    name: str  # the name of its folder of figures
    title: str
    pixels: Tensor  # (C, H, W) uint8
    label: int | None  # the true class, where it is known
    photo: np.ndarray | None = None  # all of an image file, (H, W, 3) or (H, W) uint8
    crop: tuple[float, ...] | None = None  # x0, y0, x1, y1: the part of it that the model sees

    @property
    def picture(self) -> np.ndarray:
        """The photo, or the pixels where there is none."""
        return to_picture(self.pixels) if self.photo is None else self.photo

    @property
    def seen(self) -> tuple[float, ...]:
        """x0, y0, x1, y1: the part of the picture that the model sees."""
        return self.crop or (0, 0, self.pixels.shape[2], self.pixels.shape[1])


def load_weights(options: Options, device: torch.device) -> tuple[ViT, Checkpoint]:
    """Like `load_model`, for --weights; prints what it assumes.

    Raises:
        UserError: the weights are not available, or are those of another kind of model.
    """
    stated = options.heads, options.mean, options.std, options.crop
    found = load_pretrained(options.weights, *stated)
    chosen = {n: value for n in ("heads", "image_size") if (value := getattr(options, n))}
    config, names = found.adapted(found.config, chosen), found.classes
    if names is None and config.classes == len(IMAGENET):
        print(f"{config.classes:,} classes: taken to be those of ImageNet, in their usual order")
        names = IMAGENET
    names = tuple(names or (f"class {number}" for number in range(config.classes)))
    model = ViT(config)
    print(replace(found, classes=names).initialize(model, names))
    checkpoint = Checkpoint(
        recipe="",
        model=config,
        training=TrainConfig(),
        preprocessing=replace(found.preprocessing, size=config.image_size),
        classes=list(names),
        versions={},
        weights=dict(model.state_dict()),
        history=[],
    )
    return model.to(device).eval(), checkpoint


class Probe(NamedTuple):
    """What the model computes for n images of its data set; all on the CPU."""

    pixels: Tensor  # (n, C, H, W) uint8
    labels: Tensor  # (n,)
    distance: Tensor  # (n, L, h) mean attention distance in pixels
    entropy: Tensor  # (n, L, h)
    rollout: Tensor  # (n, g_h, g_w)
    tokens: Tensor  # (n, L + 1, T, D)
    pooled: Tensor  # (n, D), the input of the head
    predictions: Tensor  # (n,)


class Model:
    """A checkpoint, or weights from elsewhere, and what the figures need from them."""

    def __init__(self, path: Path, device: torch.device, options: Options):
        self.path, self.device, self.options = path, device, options
        if options.weights:
            self.vit, self.checkpoint = load_weights(options, device)
        else:
            try:
                self.vit, self.checkpoint = load_model(path, device)
            except UserError as error:
                if path.suffix == ".safetensors" or "did not write it" in str(error):
                    error.add_note(f"for weights of another program, pass --weights {path}")
                raise
        if path.is_file():
            in_folder = path.name in (*RUN_FILES, *SAVED_AS)
            self.run = path.resolve().parent.name if in_folder else path.stem
        else:  # a model of a library, or a folder of weights
            name = options.weights.partition(":")[2] or path.resolve().name
            self.run = name.replace(":", "-").replace("/", "-")
        self.vit.requires_grad_(False)  # only attention and pixels need gradients
        self.config, self.classes = self.checkpoint.model, self.checkpoint.classes

    # ------------------------------------------------------------------------ its data set

    @cached_property
    def dataset(self) -> Dataset:
        """Raises UserError where it is not available, or does not fit the model."""
        if self.options.weights:
            raise UserError(f"{self.path} has no data set; name pictures with --image")
        training = self.checkpoint.training
        dataset = load_dataset(
            self.options.dataset or training.dataset,
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
        return f"{self.split_name} images of {shown(self.dataset.name, 60)}"

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
            preprocessing, notes = self.checkpoint.preprocessing.measured(files)
            subjects = []
            for name, file in zip(unique([f.name for f in files]), files, strict=True):
                try:
                    subjects.append(self.subject_of(file, name, preprocessing))
                except UserError as error:  # in a folder, the others are still drawn
                    if options.image or (file is files[-1] and not subjects):
                        raise
                    print(f"left out of {options.dir}: {error}")
            flat = (each.title for each in subjects if nearly_constant(each.pixels[None]))
            for note in (*notes, *(f"{title} is nearly constant" for title in flat)):
                print(printable(note))
            return subjects
        held = len(self.split)
        chosen = options.index or [index for index in by_default if index < held]
        for index in chosen:
            if not 0 <= index < held:
                raise UserError(
                    f"--index {index} is out of range 0 to {held - 1} of the {self.of_split}"
                )
        indices, name = list(dict.fromkeys(chosen)), self.split_name
        images, labels = self.split.take(torch.tensor(indices, device=self.device))
        return [
            Subject(f"{name}-{index}", f"{name} image {index}", image, int(label))
            for index, image, label in zip(indices, images, labels, strict=True)
        ]

    def subject_of(self, file: Path, name: str, preprocessing: Preprocessing) -> Subject:
        """An image file: what the model sees, and a photo of at most `PHOTO` pixels a side."""

        def photo_of(image: Image.Image) -> np.ndarray:
            flat = preprocessing.flat(image, PHOTO)
            flat.thumbnail((PHOTO, PHOTO))
            return np.asarray(flat)

        pixels, photo = preprocessing.read(file), preprocessing.read(file, photo_of)
        title = f"{shown(file.name, 40)} at {by(*self.config.image_size)}"
        (height, width), (H, W) = photo.shape[:2], preprocessing.size
        scale = preprocessing.crop * min(width / W, height / H)  # of the part that `fit` keeps
        x, y = (width - scale * W) / 2, (height - scale * H) / 2
        crop = (x, y, x + scale * W, y + scale * H)
        return Subject(name, title, pixels, None, photo, crop)

    @property
    def patch(self) -> tuple[int, int]:
        """Row and column, counted from 0, of the patch that --query names, or the middle one."""
        query, (g_h, g_w) = self.options.query, self.config.grid
        return (query[0] - 1, query[1] - 1) if isinstance(query, tuple) else (g_h // 2, g_w // 2)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as the model takes them, on its device."""
        return self.checkpoint.preprocessing.normalize(images.to(self.device))

    @torch.no_grad()
    def record(self, images: Tensor) -> Record:
        """What the model computes for uint8 images (B, C, H, W)."""
        return explain.record(self.vit, self.normalize(images))

    def probabilities_of(self, subject: Subject) -> Tensor:
        """(K,)"""
        return self.record(subject.pixels[None]).logits[0].softmax(dim=0)

    def describe(self, subject: Subject) -> str:
        """The title of an image's figures: the image, its predicted class and its true class."""
        probabilities = self.probabilities_of(subject)
        predicted = int(probabilities.argmax())
        name = shown(self.classes[predicted])
        text = f"{subject.title}: predicted {name} ({probabilities[predicted]:.1%})"
        if subject.label is None:
            return text
        return f"{text}, true class {shown(self.classes[subject.label])}"

    def explain(self, subject: Subject, target: int) -> dict[str, Tensor]:
        """`explain.explanations` of an image for a class, each (1, g_h, g_w)."""
        images, options = self.normalize(subject.pixels[None]), self.options
        targets = torch.tensor([target], device=self.device)
        chosen = options.start_layer - 1, options.layer, options.head
        return explain.explanations(self.vit, images, targets, *chosen)

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
        return Probe(
            batch.images,
            batch.labels,
            torch.stack(distances, dim=1),
            torch.stack([explain.attention_entropy(A) for A in attention], dim=1),
            explain.map_of(explain.rollout(attention), config),
            torch.stack(tokens, dim=1),
            self.vit.norm(self.vit.pool(tokens[-1])),
            logits.argmax(dim=1),
        )


def unique(names: list[str]) -> Iterator[str]:
    """The names, with a number appended to repeated ones: a.png, b.png, a.png-2."""
    taken: set[str] = set()
    for name in names:
        numbered = (f"{name}-{number}" for number in count(2))
        taken.add(free := next(each for each in chain([name], numbered) if each not in taken))
        yield free
