"""The catalogue of figures: for each what is computed of the model, how it is drawn and captioned.

A function here takes a `Model`, and for the figures of one image a `Subject`, and returns a
`Picture`; the tables at the end name them all.
"""

import argparse
import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import explain
import figures
import steps
import utils
from data import DataError, Dataset, Split, batches, load_dataset, normalise
from run import RUN_FILES, check_fit
from trainer import predict
from utils import UsageError
from ViT import Trace, ViT, patchify

PROBE_IMAGES = 128  # whose attention and tokens the data figures are about
PROBE_BATCH = 32
SHEET_IMAGES = 8
MISTAKES = 24


class NotApplicable(Exception):
    """A figure that this model or its data cannot have; the message says why."""


@dataclass
class Picture:
    """A figure, the arrays it was drawn from, and the numbers worth a line in the manifest."""

    figure: Figure
    arrays: dict[str, np.ndarray]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Page:
    """A page for a browser that needs nothing but itself, and its line in the manifest."""

    html: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One image to explain."""

    name: str  # of its folder
    title: str
    pixels: Tensor  # (C, H, W) uint8, as the model sees it
    label: int | None  # its true class, where that is known


class Probe(NamedTuple):
    """What the model did with n images of its data set; all on the CPU."""

    pixels: Tensor  # (n, C, H, W) uint8
    labels: Tensor  # (n,)
    distance: Tensor  # (n, L, h) mean attention distance in pixels
    entropy: Tensor  # (n, L, h)
    rollout: Tensor  # (n, g_h, g_w)
    tokens: Tensor  # (n, L + 1, T, D)
    read: Tensor  # (n, D), what the head reads
    predictions: Tensor  # (n,)


class Model:
    """A checkpoint, and what the figures need of it, computed when it is first asked for."""

    def __init__(self, path: Path, device: torch.device, arguments: argparse.Namespace):
        self.path, self.device, self.arguments = path, device, arguments
        self.vit: ViT
        self.vit, self.checkpoint = utils.load_model(path, device)
        self.config = self.vit.config
        self.classes: list[str] = self.checkpoint["classes"]
        self.run = path.resolve().parent.name if path.name in RUN_FILES else path.stem

    @cached_property
    def dataset(self) -> Dataset:
        """Raises DataError where it cannot be had, or is none for this model."""
        training = self.checkpoint["train_config"]
        dataset = load_dataset(
            training["dataset"],
            validation_images=training["validation_images"],
            device=self.device,
            data_dir=self.arguments.data_dir,
        )
        try:
            check_fit(self.config, dataset, getattr(dataset, self.split_name))
        except UsageError as error:
            raise DataError(f"{self.path}: {error}") from error
        return dataset

    @property
    def split_name(self) -> str:
        """The split of the figures: the validation images, unless there are none."""
        held_out = self.checkpoint["train_config"]["validation_images"]
        return self.arguments.split if held_out else "test"

    @property
    def split(self) -> Split:
        return getattr(self.dataset, self.split_name)

    @property
    def of_split(self) -> str:
        name = {"cifar10": "CIFAR-10", "shapes": "Shapes"}[self.dataset.name]
        return f"{self.split_name} images of {name}"

    def normalise(self, images: Tensor) -> Tensor:
        return normalise(images, self.checkpoint["mean"], self.checkpoint["std"])

    @cached_property
    def probabilities(self) -> Tensor:
        """(n, K), of the whole split."""
        return predict(self.vit, self.split, self.dataset).softmax(dim=1)

    @cached_property
    def probe(self) -> Probe:
        generator = torch.Generator().manual_seed(self.arguments.seed)
        rows = torch.randperm(len(self.split), generator=generator)[:PROBE_IMAGES]
        images = self.split.take(rows.to(self.device))
        parts = [self._look_at(batch) for batch in batches(images, PROBE_BATCH)]
        return Probe(*(torch.cat(fields).cpu() for fields in zip(*parts, strict=True)))

    @torch.inference_mode()
    def _look_at(self, batch: Split) -> Probe:
        config = self.config
        trace = self.vit.trace(self.normalise(batch.images))
        distances = [
            explain.attention_distance(A, config.grid, config.patch_size) for A in trace.attention
        ]
        joint = explain.classifier_row(explain.rollout(trace.attention), config.pooling)
        return Probe(
            batch.images,
            batch.labels,
            torch.stack(distances, dim=1),
            torch.stack([explain.attention_entropy(A) for A in trace.attention], dim=1),
            joint.unflatten(-1, config.grid),
            torch.stack(trace.tokens, dim=1),
            self.vit.norm(self.vit.pool(trace.tokens[-1])),
            trace.logits.argmax(dim=1),
        )


# ---------------------------------------------------------------------------- figures of one image

QUERY_OF_CLASSIFIER = {
    "class": "the class token",
    "mean": "the mean over all patches as queries (the model pools by the mean)",
}
ATTENTION_CAPTION = (
    "Attention of {query} to the patches, in each layer and head, after the softmax. "
    "Blue on the bar: 1/T, all tokens alike. Raw attention says where values were read from, not "
    "what they were worth to the decision, and it is not specific to a class."
)
EXPLANATIONS_CAPTION = (
    "Attention: last layer, mean over heads, of {query}. Rollout joins the layers. Neither depends "
    "on the class, so their rows are equal. Gradient rollout and relevance weight attention by the "
    "gradient of the class' logit: what spoke for it, never against it. None of the four proves a "
    "cause. Maps smoothed (bicubic)."
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
    rows = [
        explain.classifier_row(A[0], model.config.pooling) for A in look(model, subject).attention
    ]
    return _attention_picture(model, subject, torch.stack(rows), query, None)


def draw_patch_attention(model: Model, subject: Subject) -> Picture:
    g_h, g_w = model.config.grid
    row, column = model.arguments.query or (g_h // 2 + 1, g_w // 2 + 1)  # counted from 1
    patch = (row - 1) * g_w + column - 1
    rows = [
        explain.patch_row(A[0], patch, model.config.pooling) for A in look(model, subject).attention
    ]
    query = f"the patch in row {row}, column {column} (outlined)"
    return _attention_picture(model, subject, torch.stack(rows), query, (row - 1, column - 1))


def _attention_picture(
    model: Model,
    subject: Subject,
    rows: Tensor,  # (L, h, N)
    query: str,
    outlined: tuple[int, int] | None,
) -> Picture:
    """The layers and heads that were asked for, as a figure."""
    layers, heads = model.arguments.layer, model.arguments.head
    names = [str(layer + 1) for layer in range(len(rows))]
    if layers != "all":
        rows, names = rows[layers - 1 : layers], [str(layers)]
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
    probabilities = probabilities_of(model, subject)
    targets = target_classes(model, subject, probabilities)
    image = model.normalise(subject.pixels[None].to(model.device))[0]
    maps = explain.explanations(model.vit, image, targets)
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


def draw_logit_lens(model: Model, subject: Subject) -> Picture:
    tokens = look(model, subject).tokens
    probabilities = explain.logit_lens(model.vit, tokens)[:, 0].cpu().numpy()
    figure = figures.logit_lens(
        to_picture(subject.pixels),
        probabilities,
        model.classes,
        title=describe(model, subject),
    )
    return Picture(figure, {"probabilities": probabilities})


@torch.no_grad()
def look(model: Model, subject: Subject) -> Trace:
    """Logits, attention and tokens of one image, a batch of one."""
    return model.vit.trace(model.normalise(subject.pixels[None].to(model.device)))


def probabilities_of(model: Model, subject: Subject) -> Tensor:
    """(K,)"""
    return look(model, subject).logits[0].softmax(dim=0)


def target_classes(model: Model, subject: Subject, probabilities: Tensor) -> list[int]:
    """The class that --target asks for, and the likeliest other one."""
    order = probabilities.argsort(descending=True).tolist()
    target = model.arguments.target
    if target == "pred":
        first = order[0]
    else:
        first = subject.label if target == "label" else model.classes.index(target)
    return [first, *(k for k in order if k != first)][:2]


def describe(model: Model, subject: Subject) -> str:
    """The title of an image's figures: which image, prediction, confidence and true class."""
    probabilities = probabilities_of(model, subject)
    predicted = int(probabilities.argmax())
    text = f"{subject.title}: predicted {model.classes[predicted]} ({probabilities[predicted]:.1%})"
    return text if subject.label is None else f"{text}, true class {model.classes[subject.label]}"


def to_picture(pixels: Tensor) -> np.ndarray:
    """(C, H, W) uint8 to what figures.py takes; channels that are no colours are averaged."""
    if len(pixels) == 3:
        return pixels.permute(1, 2, 0).cpu().numpy()
    return pixels.float().mean(dim=0).round().byte().cpu().numpy()


def draw_step(model: Model, subject: Subject, name: str) -> Picture:
    """One of the ten steps of `steps.STEPS`, at the patch, layer and head that were asked for."""
    asked, step = model.arguments, steps.STEPS[name]
    scene = steps.scene_of(
        model.vit,
        model.normalise(subject.pixels[None].to(model.device))[0],
        to_picture(subject.pixels),
        model.classes,
        patch=tuple(n - 1 for n in asked.query) if isinstance(asked.query, tuple) else None,
        block=asked.layer - 1 if isinstance(asked.layer, int) else None,
        head=asked.head - 1 if isinstance(asked.head, int) else None,
    )
    shown = {name: getattr(scene.walk, name) for name in step.shows}
    arrays = {
        name: (torch.stack(part) if isinstance(part, list) else part).numpy()
        for name, part in shown.items()
    }
    return Picture(step.draw(scene), arrays)


def draw_explorer(model: Model, subjects: list[Subject]) -> Page:
    """Every attention weight of some images, to look through with the pointer."""
    config = model.config
    colours = matplotlib.colormaps[figures.ATTENTION](np.linspace(0, 1, 256))
    content = {
        "about": f"{model.run}: {config.depth} layers, {config.heads} heads, patches of "
        f"{config.patch_size} x {config.patch_size} pixels.",
        "grid": config.grid,
        "tokens": config.tokens,
        "layers": config.depth,
        "heads": config.heads,
        "colours": "".join(matplotlib.colors.to_hex(colour)[1:] for colour in colours),
        "images": [explored(model, subject) for subject in subjects],
    }
    template = (Path(__file__).parent / "explorer.html").read_text()
    text = json.dumps(content).replace("</", "<\\/")  # a name must not end the script
    return Page(template.replace("@DATA@", text), {"images": [each.title for each in subjects]})


def explored(model: Model, subject: Subject) -> dict[str, Any]:
    """An image as explorer.html reads it; its attention (L, h, T, T) in units of 1/65535."""
    trace = look(model, subject)
    attention = torch.cat(trace.attention).cpu().double()
    whole = (65535 * attention).round().numpy().astype("<u2")
    png = io.BytesIO()
    Image.fromarray(to_picture(subject.pixels)).save(png, "png")
    likeliest = trace.logits[0].softmax(dim=0).topk(min(3, len(model.classes)))
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return {
        "title": describe(model, subject),
        "picture": "data:image/png;base64," + base64.b64encode(png.getbuffer()).decode(),
        "attention": base64.b64encode(whole.tobytes()).decode(),
        "classes": [(model.classes[k], share) for k, share in pairs],
    }


# ---------------------------------------------------------------------------- figures of the model


def draw_filters(model: Model) -> Picture:
    weight = model.vit.embed.projection.weight.detach().cpu()
    components, singular_values = (
        values.numpy() for values in explain.embedding_filters(weight, model.config.channels)
    )
    figure = figures.filters(
        components, singular_values, title=f"{model.run}: patch embedding filters"
    )
    return Picture(figure, {"components": components, "singular_values": singular_values})


def draw_positions(model: Model) -> Picture:
    positions = model.vit.embed.positions[0].detach().cpu()
    similarity = explain.position_similarity(positions, model.config.grid).numpy()
    kind = {"learned": "learned", "sincos": "fixed sine-cosine, not learned"}
    figure = figures.position_similarity(
        similarity,
        title=f"{model.run}: similarity of position embeddings",
        caption=(
            "Each tile: cosine similarity of the position embedding of the patch in that row and "
            f"column with those of all patches. The embeddings are {kind[model.config.positions]}."
        ),
    )
    return Picture(figure, {"similarity": similarity})


# --------------------------------------------------------------------------- figures of many images


def draw_distance(model: Model) -> Picture:
    distance = model.probe.distance.mean(dim=0)  # (L, h)
    reach = explain.patch_distances(model.config.grid, model.config.patch_size).mean().item()
    figure = figures.by_layer_and_head(
        distance.numpy(),
        label="mean attention distance (pixels)",
        title=f"{model.run}: how far heads look",
        caption=(
            f"{probed(model)}; patches only, rows renormalised. Low: local, like a small "
            "convolution; at the dashed line or beyond: global."
        ),
        reference=(reach, "all patches alike"),
    )
    return Picture(figure, {"distance": distance.numpy()}, {"mean px": distance.mean().item()})


def draw_entropy(model: Model) -> Picture:
    if model.config.tokens == 1:
        raise NotApplicable("a model of one token has nothing to choose between")
    entropy = model.probe.entropy.mean(dim=0)  # (L, h)
    figure = figures.by_layer_and_head(
        entropy.numpy(),
        label="attention entropy / ln T",
        title=f"{model.run}: how spread attention is",
        caption=f"{probed(model)}. 0: each token reads one token. 1: it reads all alike.",
        reference=(1.0, "all tokens alike"),
    )
    return Picture(figure, {"entropy": entropy.numpy()}, {"mean": entropy.mean().item()})


def draw_norms(model: Model) -> Picture:
    norms = model.probe.tokens.norm(dim=-1).transpose(0, 1)  # (L + 1, n, T)
    has_class_token = model.config.pooling == "class"
    patches = norms[:, :, 1:] if has_class_token else norms
    figure = figures.token_norms(
        patches.flatten(1).numpy(),
        norms[:, :, 0].numpy() if has_class_token else None,
        title=f"{model.run}: token norms, {probed(model)}",
    )
    return Picture(figure, {"norms": norms.numpy()})


def draw_token_pca(model: Model) -> Picture:
    if model.config.width < 3:
        raise NotApplicable("three principal components need tokens of at least three numbers")
    depth, layers = model.config.depth, model.arguments.layer
    chosen = {0, *(round(depth * k / 3) for k in (1, 2, 3))} if layers == "all" else {layers}
    rows, arrays = {}, {}
    for layer in sorted(chosen):
        patches = model.probe.tokens[:, layer, -model.config.patches :]  # (n, N, D)
        colours = explain.tokens_as_colours(patches).unflatten(1, model.config.grid).numpy()
        arrays[f"layer_{layer}"] = colours
        rows[f"layer {layer}" if layer else "embedding"] = list(colours[:SHEET_IMAGES])
    figure = figures.sheet_of_maps(
        sheet_pictures(model),
        rows,
        names=sheet_names(model),
        title=f"{model.run}: patch tokens by their first three principal components",
        caption=(
            f"Red, green, blue: components 1 to 3 of the patch tokens of {probed(model)}, a "
            "separate PCA for each layer, so colours compare along a row, not between rows. "
            "Alike colours are alike tokens; which colour means nothing. Over each picture the "
            "prediction."
        ),
    )
    return Picture(figure, arrays)


def draw_attention_examples(model: Model) -> Picture:
    masks = explain.picture_masks(model.probe.rollout, model.config.image_size).numpy()
    pictures = sheet_pictures(model)
    lit = [
        figures.in_colour(picture) / 255 * mask[..., None]
        for picture, mask in zip(pictures, masks, strict=False)
    ]
    figure = figures.sheet_of_maps(
        pictures,
        {"rollout": lit},
        names=sheet_names(model),
        title=f"{model.run}: attention from the classifier back to the picture",
        caption=(
            f"Rollout over all layers, of {QUERY_OF_CLASSIFIER[model.config.pooling]}, as the "
            "brightness of the picture (the paper's Fig. 6): from its lowest value in each image, "
            "black, to its highest (bicubic). Over each picture the prediction, in which rollout "
            "has no part."
        ),
    )
    return Picture(figure, {"rollout": model.probe.rollout.numpy()})


def draw_cka(model: Model) -> Picture:
    if len(model.probe.labels) < 4:
        raise NotApplicable("the unbiased estimator needs at least four images")
    layers = list(model.probe.tokens.flatten(2).unbind(dim=1))  # L + 1 of (n, T D)
    cka = explain.layer_similarity(layers).numpy()
    figure = figures.layer_similarity(
        cka,
        title=f"{model.run}: similarity of layers",
        caption=(
            f"Linear CKA (unbiased HSIC) of all tokens after each layer, {probed(model)}; 0 is the "
            "embedding. 1 means equal up to rotation and scale."
        ),
    )
    return Picture(figure, {"cka": cka}, {"first to last": float(cka[0, -1])})


def draw_class_tokens(model: Model) -> Picture:
    if model.config.width < 2:
        raise NotApplicable("two principal components need tokens of at least two numbers")
    _, points, singular_values = explain.principal_components(model.probe.read, 2)
    shares = (singular_values**2 / (singular_values**2).sum())[:2].numpy()
    labels = model.probe.labels.numpy()
    what = {"class": "class tokens", "mean": "mean patch tokens"}[model.config.pooling]
    figure = figures.class_scatter(
        points.numpy(),
        labels,
        model.classes,
        shares,
        title=f"{model.run}: what the head reads, by true class",
        caption=(
            f"The final {what} after the last norm, {probed(model)}, in the plane of most "
            "variance. Classes that overlap here may be apart in the other dimensions."
        ),
    )
    return Picture(figure, {"points": points.numpy(), "labels": labels, "shares": shares})


def probed(model: Model) -> str:
    return f"{len(model.probe.labels)} {model.of_split}"


def sheet_pictures(model: Model) -> list[np.ndarray]:
    return [to_picture(image) for image in model.probe.pixels[:SHEET_IMAGES]]


def sheet_names(model: Model) -> list[str]:
    return [model.classes[k] for k in model.probe.predictions[:SHEET_IMAGES]]


# ---------------------------------------------------------------------------- figures of the run


def draw_curves(model: Model) -> Picture:
    history = model.checkpoint["history"]
    if not history:
        raise NotApplicable("the checkpoint holds no history of its training")
    names = [name for name, value in history[0].items() if value is not None]
    arrays = {name: np.array([row[name] for row in history]) for name in names}
    figure = figures.training_curves(history, title=f"{model.run}: training")
    return Picture(figure, arrays, {"epochs": len(history)})


def draw_confusion(model: Model) -> Picture:
    labels, predictions = model.split.labels, model.probabilities.argmax(dim=1)
    counts = explain.confusion_matrix(labels, predictions, len(model.classes)).cpu().numpy()
    accuracy = counts.trace() / counts.sum()
    figure = figures.confusion_matrix(
        counts,
        model.classes,
        title=f"{model.run}: {accuracy:.2%} of {len(labels):,} {model.of_split}",
    )
    return Picture(figure, {"counts": counts}, {"accuracy": float(accuracy)})


def draw_mistakes(model: Model) -> Picture:
    labels, probabilities = model.split.labels, model.probabilities
    rows = explain.confident_mistakes(probabilities, labels, MISTAKES)
    if not len(rows):
        raise NotApplicable(f"the model makes no mistake on the {model.of_split}")
    confidence, predictions = probabilities[rows].max(dim=1)
    triples = zip(labels[rows].tolist(), predictions.tolist(), confidence.tolist(), strict=True)
    figure = figures.contact_sheet(
        [to_picture(image) for image in model.split.images[rows]],
        [f"{model.classes[t]} taken for\n{model.classes[p]} {c:.1%}" for t, p, c in triples],
        title=f"{model.run}: most confident mistakes, {len(labels):,} {model.of_split}",
        caption="Over each picture its true class, then the prediction and its probability.",
    )
    arrays = {"rows": rows, "predictions": predictions, "confidence": confidence}
    return Picture(figure, {name: values.cpu().numpy() for name, values in arrays.items()})


def draw_reliability(model: Model) -> Picture:
    confidence, predictions = model.probabilities.max(dim=1)
    result = explain.calibration(confidence.cpu(), (predictions == model.split.labels).cpu())
    accuracy, mean, counts = (values.numpy() for values in result[:3])
    figure = figures.reliability(
        accuracy,
        mean,
        counts,
        error=result.error,
        title=f"{model.run}: calibration, {model.of_split}",
    )
    arrays = {"accuracy": accuracy, "confidence": mean, "counts": counts}
    return Picture(figure, arrays, {"ECE": result.error})


# ---------------------------------------------------------------------------- the tables

OF_AN_IMAGE: dict[str, Callable[[Model, Subject], Picture]] = {
    "patches": draw_patches,
    "attention": draw_class_attention,
    "attention-of-patch": draw_patch_attention,
    "explanations": draw_explanations,
    "logit-lens": draw_logit_lens,
}
STEPS: dict[str, Callable[[Model, Subject], Picture]] = {
    name: partial(draw_step, name=name) for name in steps.STEPS
}
OF_THE_MODEL: dict[str, dict[str, Callable[[Model], Picture]]] = {
    "model": {"filters": draw_filters, "positions": draw_positions},
    "data": {
        "attention-examples": draw_attention_examples,
        "attention-distance": draw_distance,
        "attention-entropy": draw_entropy,
        "token-norms": draw_norms,
        "token-pca": draw_token_pca,
        "layer-similarity": draw_cka,
        "class-tokens": draw_class_tokens,
    },
    "run": {
        "curves": draw_curves,
        "confusion": draw_confusion,
        "mistakes": draw_mistakes,
        "reliability": draw_reliability,
    },
}
