"""The catalogue of figures: what each of them computes, how it is drawn, and its caption.

A function takes a `Model`, and for the figures of one image a `Subject`, and returns a `Picture`;
the tables at the end list them all.
"""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import explain
import figures
import steps
import utils
from augment import augment
from checkpoint import EpochRecord, load_model
from config import Config
from data import Batch, Dataset, Split
from datasets import load_dataset
from evaluation import evaluate, predict
from explain import Record
from run import RUN_FILES, check_fit
from utils import UserError
from ViT import parameters_of, patchify

PROBE_IMAGES = 128  # of the figures of many images
PROBE_BATCH = 32
SHEET_IMAGES, SHEET_CLASSES = 8, 10
MISTAKES = 24
LARGEST_IN_PAGE = 10_000_000  # weights of the explorer


class NotApplicable(Exception):
    """The model or its data cannot have this figure; the message says why."""


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


@dataclass
class Picture:
    """A figure, the arrays it shows, and numbers for the manifest."""

    figure: Figure
    arrays: dict[str, np.ndarray]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Page:
    """A self-contained HTML page, and numbers for the manifest."""

    html: str
    numbers: dict[str, Any]


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
    """A checkpoint, and what the figures need of it, computed on first use."""

    def __init__(self, path: Path, device: torch.device, options: Options):
        self.path, self.device, self.options = path, device, options
        self.vit, self.checkpoint = load_model(path, device)
        self.config, self.classes = self.checkpoint.model, self.checkpoint.classes
        self.run = path.resolve().parent.name if path.name in RUN_FILES else path.stem

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

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as the model takes them, on its device."""
        return self.checkpoint.preprocessing.normalize(images.to(self.device))

    @torch.no_grad()
    def record(self, images: Tensor) -> Record:
        """What the model computes of uint8 images (B, C, H, W)."""
        return explain.record(self.vit, self.normalize(images))

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, K), of the whole split."""
        return predict(self.vit, self.split, self.checkpoint.preprocessing).softmax(dim=1)

    def sample(self, split: Split, count: int) -> Tensor:
        """Random rows (count,) of a split, or all of a smaller one; they depend on --seed."""
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randperm(len(split), generator=generator)[:count].to(self.device)

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


# ---------------------------------------------------------------------------- figures of one image

QUERY_OF_CLASSIFIER = {
    "class": "of the class token",
    "mean": "averaged over all query patches (mean pooling)",
}
ATTENTION_CAPTION = (
    "Attention to each patch, {query}, by layer and head, after the softmax, times the number of "
    "tokens, so that 1 is uniform attention. Attention shows where values are read from, not what "
    "they contribute to the decision, and does not depend on a class."
)
EXPLANATIONS_CAPTION = (
    "Attention: last layer, mean over heads, {query}. Rollout combines all layers. Neither "
    "depends on the class, so their rows are equal. Gradient rollout and relevance weight "
    "attention by the gradient of the class logit, LeGrad is that gradient alone: evidence for the "
    "class, not against it. Each map is smoothed, has a scale of its own and is transparent where "
    "it is at or below uniform. None of the five proves a cause; vis.py faithfulness tests them."
)


def draw_patches(model: Model, subject: Subject) -> Picture:
    config = model.config
    P = config.patch_size
    patches = patchify(subject.pixels[None], P)[0].unflatten(-1, (-1, P, P))  # (N, C, P, P)
    figure = figures.patches(
        to_picture(subject.pixels),
        [to_picture(patch) for patch in patches],
        config.grid,
        class_token=config.pooling == "class",
        title=describe(model, subject),
    )
    return Picture(figure, {"patches": patches.cpu().numpy()})


def draw_class_attention(model: Model, subject: Subject) -> Picture:
    query = QUERY_OF_CLASSIFIER[model.config.pooling]
    attention = model.record(subject.pixels[None]).attention
    rows = [explain.classifier_row(A[0], model.config.pooling) for A in attention]
    return _attention_picture(model, subject, torch.stack(rows), query, None)


def draw_patch_attention(model: Model, subject: Subject) -> Picture:
    g_h, g_w = model.config.grid
    row, column = model.options.query or (g_h // 2 + 1, g_w // 2 + 1)  # counted from 1
    patch = (row - 1) * g_w + column - 1
    attention = model.record(subject.pixels[None]).attention
    rows = [explain.patch_row(A[0], patch, model.config.pooling) for A in attention]
    query = f"of the patch in row {row}, column {column} (outlined)"
    return _attention_picture(model, subject, torch.stack(rows), query, (row - 1, column - 1))


def _attention_picture(
    model: Model,
    subject: Subject,
    rows: Tensor,  # (L, h, N)
    query: str,
    outlined: tuple[int, int] | None,
) -> Picture:
    """Attention maps of the chosen layers and heads."""
    layers, heads = model.options.layer, model.options.head
    names = [f"layer {layer + 1}" for layer in range(len(rows))]
    if layers != "all":
        rows, names = rows[layers - 1 : layers], names[layers - 1 : layers]
    if isinstance(heads, int):
        rows, columns = rows[:, heads - 1 : heads], [str(heads)]
    elif heads == "all":
        columns = [str(head + 1) for head in range(rows.shape[1])]
    else:
        reduce = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[heads]
        rows, columns = reduce(rows, dim=1, keepdim=True), [heads]
    maps = rows.unflatten(-1, model.config.grid).cpu().numpy()
    figure = figures.attention_maps(
        to_picture(subject.pixels),
        maps,
        layers=names,
        heads=columns,
        tokens=model.config.tokens,
        title=describe(model, subject),
        caption=ATTENTION_CAPTION.format(query=query),
        query=outlined,
    )
    return Picture(figure, {"attention": maps}, {"highest weight": float(maps.max())})


def draw_explanations(model: Model, subject: Subject) -> Picture:
    probabilities = look(model, subject)
    targets = target_classes(model, subject, probabilities)
    images = model.normalize(subject.pixels.expand(len(targets), *subject.pixels.shape))
    maps = explain.explanations(model.vit, images, torch.tensor(targets, device=model.device))
    maps = {method: values.cpu().numpy() for method, values in maps.items()}
    figure = figures.explanations(
        to_picture(subject.pixels),
        maps,
        classes=[f"{model.classes[k]} {probabilities[k]:.1%}" for k in targets],
        title=describe(model, subject),
        caption=EXPLANATIONS_CAPTION.format(query=QUERY_OF_CLASSIFIER[model.config.pooling]),
    )
    arrays = {method.replace(" ", "_"): values for method, values in maps.items()}
    return Picture(figure, arrays, {"targets": [model.classes[k] for k in targets]})


def look(model: Model, subject: Subject) -> Tensor:
    """Probabilities (K,) of one image."""
    return model.record(subject.pixels[None]).logits[0].softmax(dim=0)


def target_classes(model: Model, subject: Subject, probabilities: Tensor) -> list[int]:
    """The class that --target names, and the most probable other one."""
    order = probabilities.argsort(descending=True).tolist()
    target = model.options.target
    if target == "pred":
        first = order[0]
    else:
        first = subject.label if target == "label" else model.classes.index(target)
    return [first, *(k for k in order if k != first)][:2]


def describe(model: Model, subject: Subject) -> str:
    """The title of an image's figures: the image, its predicted class and its true class."""
    probabilities = look(model, subject)
    predicted = int(probabilities.argmax())
    text = f"{subject.title}: predicted {model.classes[predicted]} ({probabilities[predicted]:.1%})"
    return text if subject.label is None else f"{text}, true class {model.classes[subject.label]}"


def to_picture(pixels: Tensor) -> np.ndarray:
    """(C, H, W) uint8 to (H, W, 3), or, unless there are 3 channels, to their mean (H, W)."""
    if len(pixels) == 3:
        return pixels.permute(1, 2, 0).cpu().numpy()
    return pixels.float().mean(dim=0).round().byte().cpu().numpy()


def draw_step(model: Model, subject: Subject, name: str) -> Picture:
    """One of `steps.STEPS`, for the chosen patch, layer and head."""
    options, step = model.options, steps.STEPS[name]
    scene = steps.scene_of(
        model.vit,
        model.normalize(subject.pixels[None])[0],
        to_picture(subject.pixels),
        model.classes,
        patch=tuple(n - 1 for n in options.query) if isinstance(options.query, tuple) else None,
        block=options.layer - 1 if isinstance(options.layer, int) else None,
        head=options.head - 1 if isinstance(options.head, int) else None,
    )
    shown = {name: getattr(scene.walk, name) for name in step.shows}
    arrays = {
        name: (torch.stack(part) if isinstance(part, list) else part).numpy()
        for name, part in shown.items()
    }
    return Picture(step.draw(scene), arrays)


def draw_explorer(model: Model, subjects: list[Subject]) -> Page:
    """The model itself in one page: its weights in half precision, and some images."""
    config, preprocessing = model.config, model.checkpoint.preprocessing
    if (count := parameters_of(model.vit)) > LARGEST_IN_PAGE:
        raise NotApplicable(f"{count:,} weights are too many for a page, {LARGEST_IN_PAGE:,}")
    if config.channels not in (1, 3):
        raise NotApplicable(f"a page shows images of 1 or 3 channels, not {config.channels}")
    weights = model.vit.state_dict() | {"embed.pos_embed": model.vit.embed.pos_embed}
    halves = [weight.detach().cpu().half().numpy().astype("<f2") for weight in weights.values()]
    colors = matplotlib.colormaps[figures.ATTENTION](np.linspace(0, 1, 256))
    content = {
        "about": f"{model.run}: {config.depth} layers, {config.heads} heads, {count:,} weights. "
        "This page computes the model for each picture, in your browser.",
        "model": config.to_plain(),
        "grid": config.grid,
        **{name: getattr(preprocessing, name) for name in ("mean", "std", "interpolation", "crop")},
        "classes": model.classes,
        "layout": [(name, weight.shape) for name, weight in weights.items()],
        "weights": base64_of(b"".join(half.tobytes() for half in halves)),
        "colors": "".join(matplotlib.colors.to_hex(color)[1:] for color in colors),
        "images": [
            {"title": describe(model, each), "picture": png_of(to_picture(each.pixels))}
            for each in subjects
        ],
    }
    template = (Path(__file__).parent / "explorer.html").read_text()
    text = json.dumps(content).replace("</", "<\\/")  # a name must not end the script
    return Page(template.replace("@DATA@", text), {"images": [each.title for each in subjects]})


def base64_of(content: bytes | memoryview) -> str:
    return base64.b64encode(content).decode()


def png_of(picture: np.ndarray) -> str:
    """A picture as the address of an image."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "png")
    return "data:image/png;base64," + base64_of(png.getbuffer())


# ---------------------------------------------------------------------------- figures of the model


def draw_filters(model: Model) -> Picture:
    weight = model.vit.embed.proj.weight.detach().cpu()
    components, singular_values = (
        values.numpy() for values in explain.embedding_filters(weight, model.config.channels)
    )
    figure = figures.filters(components, singular_values, title="Patch embedding filters")
    return Picture(figure, {"components": components, "singular_values": singular_values})


def draw_positions(model: Model) -> Picture:
    positions = model.vit.embed.pos_embed[0].detach().cpu()
    similarity = explain.position_similarity(positions, model.config.grid).numpy()
    kind = {"learned": "learned", "sincos": "fixed (sine-cosine)"}
    figure = figures.position_similarity(
        similarity,
        title="Similarity of position embeddings",
        caption=(
            "Each tile: cosine similarity of the position embedding of the patch in that row and "
            f"column with those of all patches. The embeddings are {kind[model.config.positions]}."
        ),
    )
    return Picture(figure, {"similarity": similarity})


# --------------------------------------------------------------------------- figures of many images


def draw_augmentation(model: Model) -> Picture:
    config, train = model.checkpoint.training, model.dataset.train
    names = {  # of the operations, by the field that turns each on
        "flip": f"{config.flip} flip",
        "crop_padding": "random crop",
        "resized_crop": "random resized crop",
        "policy": "TrivialAugment",
        "mixup": "Mixup",
        "cutmix": "CutMix",
    }
    values = {field: getattr(config, field) for field in names}
    off = {field: "off" if isinstance(value, str) else 0 for field, value in values.items()}
    used = [field for field in names if values[field] != off[field]]
    if not used:
        raise NotApplicable("the recipe uses no augmentation")
    recipes = {names[field]: replace(config, **off | {field: values[field]}) for field in used}
    images, labels = train.take(model.sample(train, SHEET_IMAGES))
    targets = F.one_hot(labels, len(model.classes)).float()
    mirrored = torch.arange(len(images), device=model.device) % 2 == 0
    rows = {"original": images}
    for name, recipe in (recipes | {"whole recipe": config}).items():
        rows[name], _ = augment(images, targets, recipe, model.options.seed, mirrored, epoch=0)
    figure = figures.sheet(
        {name: list(map(to_picture, row)) for name, row in rows.items()},
        names=[model.classes[label] for label in labels],
        title=f"Augmentation of training images of {model.dataset.name}",
        caption="Each operation alone, with the settings of the recipe, and last all of them.",
    )
    arrays = {name.replace(" ", "_"): row.cpu().numpy() for name, row in rows.items()}
    return Picture(figure, arrays)


def draw_distance(model: Model) -> Picture:
    if model.config.tokens == 1:
        raise NotApplicable("with a single token, attention has no reach")
    distance, entropy = (  # (L, h)
        values.mean(dim=0) for values in (model.probe.distance, model.probe.entropy)
    )
    reach = explain.patch_distances(model.config.grid, model.config.patch_size).mean().item()
    figure = figures.by_layer_and_head(
        [
            (distance.numpy(), "mean attention distance (pixels)", reach),
            (entropy.numpy(), "attention entropy / ln T", 1.0),
        ],
        title=f"Reach of attention by layer: {probed(model)}",
        caption=(
            "Left: between patches only, renormalized; low is local, like a small convolution. "
            "Right: 0 where all weight is on one token."
        ),
    )
    numbers = {"mean px": distance.mean().item(), "mean entropy": entropy.mean().item()}
    return Picture(figure, {"distance": distance.numpy(), "entropy": entropy.numpy()}, numbers)


def draw_norms(model: Model) -> Picture:
    norms = model.probe.tokens.norm(dim=-1).transpose(0, 1)  # (L + 1, n, T)
    has_class_token = model.config.pooling == "class"
    patches = norms[:, :, 1:] if has_class_token else norms
    figure = figures.token_norms(
        patches.flatten(1).numpy(),
        norms[:, :, 0].numpy() if has_class_token else None,
        title=f"Token norms, {probed(model)}",
    )
    return Picture(figure, {"norms": norms.numpy()})


def draw_token_pca(model: Model) -> Picture:
    if model.config.width < 3:
        raise NotApplicable("three principal components need a width of at least 3")
    depth, layers = model.config.depth, model.options.layer
    chosen = {0, *(round(depth * k / 3) for k in (1, 2, 3))} if layers == "all" else {layers}
    rows, arrays = {"input": sheet_pictures(model)}, {}
    for layer in sorted(chosen):
        patches = model.probe.tokens[:, layer, -model.config.patches :]  # (n, N, D)
        colors = explain.tokens_as_colors(patches).unflatten(1, model.config.grid).numpy()
        arrays[f"layer_{layer}"] = colors
        rows[f"layer {layer}" if layer else "embedding"] = list(colors[shown(model)])
    figure = figures.sheet(
        rows,
        **sheet_names(model),
        title="Patch tokens as colors",
        caption=(
            "Red, green and blue are the first three principal components of the patch tokens of "
            f"{probed(model)}, with a separate PCA for each layer: compare colors within a row, "
            "not between rows. Similar colors mean similar tokens; the hue itself is arbitrary. "
            "Above each image: the prediction, red where it is wrong."
        ),
    )
    return Picture(figure, arrays)


def draw_attention_examples(model: Model) -> Picture:
    rollout = model.probe.rollout.numpy()
    relative = figures.RELATIVE(model.config.tokens * rollout[shown(model)])
    figure = figures.sheet(
        {
            "input": sheet_pictures(model),
            "rollout": list(matplotlib.colormaps[figures.ATTENTION](relative)[..., :3]),
        },
        **sheet_names(model),
        title="Attention rollout",
        caption=(
            f"Over all layers, {QUERY_OF_CLASSIFIER[model.config.pooling]}. Above each image: the "
            "prediction, red where it is wrong; rollout does not depend on it."
        ),
        weights=True,
    )
    return Picture(figure, {"rollout": rollout})


def draw_cka(model: Model) -> Picture:
    if len(model.probe.labels) < 4:
        raise NotApplicable("the unbiased estimator needs at least four images")
    layers = list(model.probe.tokens.flatten(2).unbind(dim=1))  # L + 1 of (n, T D)
    cka = explain.linear_cka(layers).numpy()
    figure = figures.layer_similarity(
        cka,
        title="Similarity of layers",
        caption=(
            f"Linear CKA (unbiased HSIC) of all tokens after each layer, {probed(model)}; 0 is the "
            "embedding. 1 means equal up to rotation and scale."
        ),
    )
    return Picture(figure, {"cka": cka}, {"first to last": float(cka[0, -1])})


def draw_class_tokens(model: Model) -> Picture:
    if min(model.probe.pooled.shape) < 2:
        raise NotApplicable("two principal components need two images and a width of at least 2")
    _, points, singular_values = explain.principal_components(model.probe.pooled, 2)
    shares = (singular_values**2 / (singular_values**2).sum())[:2].numpy()
    labels = model.probe.labels.numpy()
    what = {"class": "class tokens", "mean": "mean patch tokens"}[model.config.pooling]
    figure = figures.class_scatter(
        points.numpy(),
        labels,
        model.classes,
        shares,
        title="Input of the head, by true class",
        caption=(
            f"The final {what}, normalized, of {probed(model)}, in the plane of most variance. "
            "Classes that overlap here may be separate in other dimensions."
        ),
    )
    return Picture(figure, {"points": points.numpy(), "labels": labels, "shares": shares})


def probed(model: Model) -> str:
    return f"{len(model.probe.labels)} {model.of_split}"


def shown(model: Model) -> list[int]:
    """Rows of the probe: the first image of each of up to ten classes."""
    labels = model.probe.labels.tolist()
    return [labels.index(label) for label in sorted(set(labels))[:SHEET_CLASSES]]


def sheet_pictures(model: Model) -> list[np.ndarray]:
    return [to_picture(image) for image in model.probe.pixels[shown(model)]]


def sheet_names(model: Model) -> dict[str, Any]:
    """What `figures.sheet` writes above the pictures."""
    predictions = model.probe.predictions[shown(model)]
    wrong = (predictions != model.probe.labels[shown(model)]).tolist()
    return {"names": [model.classes[k] for k in predictions], "wrong": wrong}


# ---------------------------------------------------------------------------- evidence

SHARES = 8  # of the patches, at which a curve is measured
RANDOM_ORDERS = 10
HEAD_IMAGES = 500
RANDOM = "random order"
CURVES = ("deletion", "insertion", "deletion accuracy", "insertion accuracy")


def draw_faithfulness(model: Model) -> Picture:
    """Deletion and insertion curves of every map, and of random orders."""
    if model.config.patches < 2:
        raise NotApplicable("with a single patch there is nothing to order")
    rows = model.sample(model.split, model.options.images)
    parts: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(model.options.seed)
    batches = model.split.batches(rows.split(PROBE_BATCH))
    for batch in tqdm(batches, total=-(-len(rows) // PROBE_BATCH), disable=None, leave=False):
        for name, curves in faithfulness_of(model, batch, generator).items():
            parts.setdefault(name, []).append(curves.cpu())
    measured = {name: torch.cat(part, dim=1) for name, part in parts.items()}  # (4, n, SHARES)
    numbers = {name: areas_of(curves) for name, curves in measured.items()}
    print("\n".join(faithfulness_table(numbers)))
    best = min((name for name in numbers if name != RANDOM), key=lambda n: numbers[n]["deletion"])
    title = f"Which patches matter: {len(rows)} {model.of_split}"
    lost = {"drop": "dropped", "mean": "painted in the mean color", "black": "painted black"}
    figure = figures.perturbation(
        {name: curves[:2].mean(dim=1).numpy() for name, curves in measured.items()},
        {name: values["deletion_interval"] for name, values in numbers.items()},
        title=title,
        caption=(
            "Probability of the class that the whole image is given, as patches are "
            f"{lost[model.options.removal]}, in the order of each map and in {RANDOM_ORDERS} "
            "random orders (gray). Left, the most important are removed first: lower is better, "
            f"and lowest for {best}. Right, only the most important are left: higher is better."
        ),
    )
    arrays = {name.replace(" ", "_"): curves.numpy() for name, curves in measured.items()}
    return Picture(figure, arrays, {"images": len(rows), "areas": numbers})


def faithfulness_of(model: Model, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """For each map (4, B, SHARES): probability by deletion and insertion, then accuracy by both.

    Args:
        generator: of the random orders.
    """
    images = model.normalize(batch.images)
    with torch.no_grad():
        targets = model.vit(images).argmax(dim=1)
    maps = explain.explanations(model.vit, images, targets)
    maps = {name: values.flatten(1) for name, values in maps.items()}
    maps["gradient x input"] = explain.gradient_times_input(model.vit, images, targets)
    orders = {name: [values.argsort(dim=1, descending=True)] for name, values in maps.items()}
    draws = torch.rand(RANDOM_ORDERS, *maps["attention"].shape, generator=generator)
    orders[RANDOM] = list(draws.argsort(dim=2).to(model.device))
    black = model.normalize(torch.zeros_like(batch.images[:1]))
    mean = torch.zeros_like(black)  # once normalized
    fill = {"drop": None, "mean": mean, "black": black}[model.options.removal]
    curves = {}
    for name, several in orders.items():
        found = []
        for order in several:
            inserted, deleted = (
                explain.kept_probabilities(model.vit, images, targets, each, SHARES, fill)
                for each in (order, order.flip(1))
            )
            pairs = zip(deleted, inserted, strict=True)
            found.append(torch.stack([x.float() for a, b in pairs for x in (a.flip(1), b)]))
        curves[name] = torch.stack(found).mean(dim=0)  # over the random orders
    return curves


def draw_head_worth(model: Model) -> Picture:
    """What each head is worth: the accuracy without it."""
    rows = model.sample(model.split, HEAD_IMAGES)
    images, labels = model.split.take(rows)
    sampled = Split(images, labels)

    def accuracy_and_loss() -> tuple[float, float]:
        result = evaluate(model.vit, sampled, model.checkpoint.preprocessing)
        return result.top1, result.loss

    worth = explain.head_worth(model.vit, accuracy_and_loss)
    lost = 100 * (worth.accuracy - worth.without)
    figure = figures.head_worth(
        lost.numpy(),
        100 * worth.pruned.numpy(),
        title=f"What a head is worth: {len(rows)} {model.of_split}",
        caption=(
            "Left: accuracy lost without one head, whose output is set to zero, from "
            f"{worth.accuracy:.1%}. Right: without more and more heads, the least "
            "useful first; of heads that can replace each other, each alone looks useless."
        ),
    )
    arrays = {"lost": lost.numpy(), "pruned": worth.pruned.numpy()}
    return Picture(figure, arrays, {"accuracy": worth.accuracy, "most": float(lost.max())})


def areas_of(curves: Tensor) -> dict[str, Any]:
    """The mean height of a map's four curves (4, n, SHARES), with intervals over the images."""
    areas = dict(zip(CURVES, explain.area(curves), strict=True))
    means = {name: values.mean().item() for name, values in areas.items()}
    intervals = {f"{n}_interval": explain.bootstrap_interval(v) for n, v in areas.items()}
    return means | intervals


def faithfulness_table(numbers: dict[str, dict[str, Any]]) -> list[str]:
    """The areas in Markdown, the lowest deletion first."""
    lines = [f"| map | {' | '.join(CURVES)} |", "|---" * (1 + len(CURVES)) + "|"]
    for map_name, values in sorted(numbers.items(), key=lambda item: item[1]["deletion"]):
        cells = []
        for name in CURVES:
            low, high = values[f"{name}_interval"]
            cells.append(f"{values[name]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {map_name} | {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------------------- figures of the run


def draw_curves(model: Model) -> Picture:
    history = model.checkpoint.history
    if not history:
        raise NotApplicable("the checkpoint has no training history")
    arrays = {  # nan where an epoch has no value
        name: np.array([getattr(row, name) for row in history], dtype=float)
        for name in EpochRecord.fields()
    }
    figure = figures.training_curves(history, model.checkpoint.training, title="Training")
    return Picture(figure, arrays, {"epochs": len(history)})


def draw_confusion(model: Model) -> Picture:
    labels, predictions = model.split.labels, model.probabilities.argmax(dim=1)
    counts = explain.confusion_matrix(labels, predictions, len(model.classes)).cpu().numpy()
    accuracy = counts.trace() / counts.sum()
    figure = figures.confusion_matrix(
        counts,
        model.classes,
        title=f"Accuracy {accuracy:.2%} on {len(labels):,} {model.of_split}",
    )
    return Picture(figure, {"counts": counts}, {"accuracy": float(accuracy)})


def draw_mistakes(model: Model) -> Picture:
    labels, probabilities = model.split.labels, model.probabilities
    rows = explain.confident_mistakes(probabilities, labels, MISTAKES)
    if not len(rows):
        raise NotApplicable(f"the model makes no mistakes on the {model.of_split}")
    confidence, predictions = probabilities[rows].max(dim=1)
    triples = zip(labels[rows].tolist(), predictions.tolist(), confidence.tolist(), strict=True)
    figure = figures.contact_sheet(
        [to_picture(image) for image in model.split.take(rows).images],
        [f"{model.classes[t]} as\n{model.classes[p]} {c:.1%}" for t, p, c in triples],
        title=f"Most confident mistakes on {len(labels):,} {model.of_split}",
        caption="Above each image: the true class, then the prediction and its probability.",
    )
    arrays = {"rows": rows, "predictions": predictions, "confidence": confidence}
    return Picture(figure, {name: values.cpu().numpy() for name, values in arrays.items()})


def draw_reliability(model: Model) -> Picture:
    confidence, predictions = model.probabilities.max(dim=1)
    result = explain.calibration(confidence.cpu(), (predictions == model.split.labels).cpu())
    accuracy, mean, counts = (values.numpy() for values in result[:3])
    title = f"Calibration on {model.of_split}"
    figure = figures.reliability(accuracy, mean, counts, error=result.error, title=title)
    arrays = {"accuracy": accuracy, "confidence": mean, "counts": counts}
    return Picture(figure, arrays, {"ECE": result.error})


# ---------------------------------------------------------------------------- the tables

OF_AN_IMAGE: dict[str, Callable[[Model, Subject], Picture]] = {
    "patches": draw_patches,
    "attention": draw_class_attention,
    "attention-of-patch": draw_patch_attention,
    "explanations": draw_explanations,
}
STEPS: dict[str, Callable[[Model, Subject], Picture]] = {
    name: partial(draw_step, name=name) for name in steps.STEPS
}
OF_THE_MODEL: dict[str, dict[str, Callable[[Model], Picture]]] = {
    "model": {"filters": draw_filters, "positions": draw_positions},
    "data": {
        "augmentation": draw_augmentation,
        "attention-examples": draw_attention_examples,
        "attention-distance": draw_distance,
        "token-norms": draw_norms,
        "token-pca": draw_token_pca,
        "layer-similarity": draw_cka,
        "class-tokens": draw_class_tokens,
    },
    "faithfulness": {"maps": draw_faithfulness, "heads": draw_head_worth},
    "run": {
        "curves": draw_curves,
        "confusion": draw_confusion,
        "mistakes": draw_mistakes,
        "reliability": draw_reliability,
    },
}
