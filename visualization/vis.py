"""Draws what a trained Vision Transformer computes.

    python visualization/vis.py                        every figure, of the newest checkpoint
    python visualization/vis.py image --index 0,7      attention and relevance in images of its data
    python visualization/vis.py image --image cat.jpg  the same for an image file
    python visualization/vis.py image --weights timm:vit_base_patch16_224 --image cat.jpg
    python visualization/vis.py steps --index 7        from the image to its class in ten steps
    python visualization/vis.py explorer               the model itself, running in an HTML page
    python visualization/vis.py model --checkpoint F   the weights; needs no images
    python visualization/vis.py data                   augmentation; attention of 128 images
    python visualization/vis.py run                    confusion, mistakes, calibration
    python visualization/vis.py faithfulness           which maps find the patches that matter

The figures are written to visualization/out/<run>/, with a manifest.json that states what made
them. Layers, heads, patch rows and patch columns count from 1, images of a data set from 0.
"""

import argparse
import difflib
import hashlib
import io
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # the model's modules, from whatever folder this is run

import utils  # isort: skip  # before torch, for its threads
import matplotlib
import numpy as np
from tqdm import tqdm

import evidence
import explain
import image_figures
import model_figures
import run_figures
import steps
import style
from checkpoint import find_checkpoint, versions
from config import Parser, add_flags, given
from device import choose_device
from explorer import Page, explorer
from model import Model, Options, Subject
from style import NotApplicable, Picture, styled
from utils import UserError, named_path, run_program

# ---------------------------------------------------------------------------- the figures

OF_AN_IMAGE: dict[str, dict[str, Callable[[Model, Subject], Picture]]] = {
    "image": {
        "patches": image_figures.patches,
        "attention": image_figures.attention_of_classifier,
        "attention-of-patch": image_figures.attention_of_patch,
        "explanations": image_figures.explanations,
    },
    "steps": {
        "overview": steps.overview,
        "1-image": steps.image,
        "2-patches": steps.patches,
        "3-embedding": steps.embedding,
        "4-positions": steps.positions,
        "5-queries": steps.queries,
        "6-attention": steps.attention,
        "7-heads": steps.heads,
        "8-mlp": steps.mlp,
        "9-blocks": steps.blocks,
        "10-classifier": steps.classifier,
    },
}
OF_THE_MODEL: dict[str, dict[str, Callable[[Model], Picture]]] = {
    "model": {
        "filters": model_figures.filters,
        "positions": model_figures.positions,
    },
    "data": {
        "augmentation": model_figures.augmentation,
        "attention-examples": model_figures.attention_examples,
        "attention-distance": model_figures.attention_distance,
        "token-norms": model_figures.token_norms,
        "token-pca": model_figures.token_pca,
        "layer-similarity": model_figures.layer_similarity,
        "class-tokens": model_figures.class_tokens,
    },
    "run": {
        "confusion": run_figures.confusion,
        "mistakes": run_figures.mistakes,
        "reliability": run_figures.reliability,
    },
    "faithfulness": {
        "maps": evidence.maps,
        "heads": evidence.heads,
    },
}
OF_IMAGES = (*OF_AN_IMAGE, "explorer")
GROUPS = (*OF_IMAGES, *OF_THE_MODEL)
SLOW = ("faithfulness",)  # which `all` leaves out
HEEDED = {  # flags, and patterns for the names of the figures that heed them
    "layer": r"image/.*/(attention|explanations)|steps/|data/token-pca",
    "head": r"image/.*/(attention|explanations)|steps/",
    "start_layer": r"image/.*/explanations|faithfulness/maps",
}
MOST_BYTES = 16e9
DEFAULT_IMAGES, EXPLORED_IMAGES = (0, 7), (7, *range(7))
Drawing = Callable[[], Picture | Page]


# ---------------------------------------------------------------------------- the command line


def parse_arguments(argv: list[str]) -> Options:
    """Raises UserError where a value is out of range."""
    parser = Parser(prog="vis.py", description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("what", nargs="?", choices=("all", *GROUPS), default="all", help="(all)")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--index", type=_index, metavar="I,J", help="images of the data set (0,7)")
    images.add_argument("--image", nargs="+", metavar="FILE", type=named_path, help="image files")
    images.add_argument("--dir", metavar="DIR", type=named_path, help="all image files in a folder")
    layer, head = (partial(_number_or, words) for words in (["all"], ["all", "mean", "max", "min"]))
    parser.add_argument("--layer", type=layer, metavar="L|all", help="(all)")
    parser.add_argument("--head", type=head, metavar="H|mean|max|min|all", help="(all)")
    parser.add_argument(
        "--query",
        type=_query,
        metavar="cls|R,C",
        help="whose attention: the classifier's, or a patch's by row and column (both, with the "
        "middle patch)",
    )
    added = ("what", "index", "image", "dir", "layer", "head", "query")
    add_flags(parser, Options(), leave_out=added)
    return Options(**given(parser.parse_args(argv), Options))


def _index(text: str) -> list[int]:
    return _read(text, lambda: [int(part) for part in text.split(",")], "numbers such as 0,7")


def _number_or(words: list[str], text: str) -> int | str:
    wanted = f"a number or {', '.join(words)}"
    return text if text in words else _read(text, lambda: int(text), wanted)


def _query(text: str) -> str | tuple[int, int]:
    """'cls', or a patch's row and column."""

    def patch() -> tuple[int, int]:
        row, column = map(int, text.split(","))
        return row, column

    return text if text == "cls" else _read(text, patch, "cls or a patch such as 3,4")


def _read(text: str, read: Callable[[], Any], wanted: str) -> Any:
    try:
        return read()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None


def newest_checkpoint() -> Path:
    """Raises UserError where there is none."""
    folder = ROOT / "checkpoints"
    found = [path for path in folder.glob("**/*.pt") if path.is_file()]  # no broken links
    if not found:
        raise UserError(
            f"there is no checkpoint in {folder}; train one with "
            "'python src/trainer.py --recipe demo', or name one with --checkpoint"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def check_options(model: Model) -> None:
    """Raises UserError for options that this model lacks or that memory cannot hold."""
    options, config, (g_h, g_w) = model.options, model.config, model.config.grid
    ranges = {"layer": config.depth, "head": config.heads, "start_layer": config.depth}
    for name, most in ranges.items():
        value = getattr(options, name)
        if isinstance(value, int) and not 1 <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range 1 to {most}")
    if isinstance(options.layer, int) and options.layer < options.start_layer:
        raise UserError(f"--layer {options.layer} comes before --start-layer {options.start_layer}")
    check_memory(model)
    if isinstance(options.query, tuple):
        row, column = options.query
        if not (1 <= row <= g_h and 1 <= column <= g_w):
            raise UserError(f"--query {row},{column} is out of range 1,1 to {g_h},{g_w}")
    if options.target not in ("pred", "label", *model.classes):
        near = difflib.get_close_matches(options.target, model.classes, 1)
        near += [name for name in model.classes if options.target in name]
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(model.classes)}"
        hint = hint if len(hint) < 300 else f"there are {len(model.classes):,}, {hint[:200]} ..."
        raise UserError(f"--target {options.target!r} is not a class; {hint}")
    if options.target == "label" and (options.image or options.dir):
        raise UserError("--target label needs images of a data set: a file has no true class")


def check_memory(model: Model) -> None:
    """Raises UserError where the maps of an image would take more than `MOST_BYTES`."""
    options, config = model.options, model.config
    needed = explain.bytes_needed(config, options.start_layer - 1)
    if needed <= MOST_BYTES or options.what not in ("all", *OF_AN_IMAGE):
        return
    starts = range(options.start_layer + 1, config.depth + 1)
    fits = [s for s in starts if explain.bytes_needed(config, s - 1) <= MOST_BYTES]
    instead = f"--start-layer {fits[0]}" if fits else "--weights with a smaller --image-size"
    raise UserError(
        f"the maps of {config.tokens:,} tokens need about {needed / 1e9:.0f} GB; pass {instead}"
    )


# ---------------------------------------------------------------------------- what to draw


def plan(model: Model) -> tuple[dict[str, Drawing], dict[str, str]]:
    """The figures to draw, and the reasons why others lack their data set, by name.

    Raises:
        UserError: an image that the command line names is not available.
    """
    options = model.options
    of_all = [group for group in GROUPS if group not in SLOW]
    groups = of_all if options.what == "all" else (options.what,)
    from_files = bool(options.image or options.dir)
    without_data = {"model", *OF_IMAGES} if from_files else {"model"}
    reason = None if without_data.issuperset(groups) else model.why_no_data
    drawings: dict[str, Drawing] = {}
    missing: dict[str, str] = {}
    for group in groups:
        if group in OF_THE_MODEL:
            drawn = {f"{group}/{name}": draw for name, draw in OF_THE_MODEL[group].items()}
            if reason and group != "model":
                missing |= dict.fromkeys(drawn, reason)
            else:
                drawings |= {name: partial(draw, model) for name, draw in drawn.items()}
        elif reason and not (from_files or options.index):
            missing[group] = reason
        elif group == "explorer":
            drawings[group] = partial(explorer, model, model.subjects(EXPLORED_IMAGES))
        else:
            # With --query, the attention of no other query is drawn.
            left_out = {None: "", "cls": "attention-of-patch"}.get(options.query, "attention")
            for subject in model.subjects(DEFAULT_IMAGES):
                for name, draw in OF_AN_IMAGE[group].items():
                    if name != left_out:
                        drawings[f"{group}/{subject.name}/{name}"] = partial(draw, model, subject)
    return drawings, missing


# ---------------------------------------------------------------------------- drawing


def draw_all(model: Model, command: str) -> None:
    """Draws the figures that the options ask for, and writes their manifest.

    Raises:
        UserError: the folder cannot be written to, or nothing can be drawn.
    """
    drawings, missing = plan(model)
    if not drawings:
        raise UserError(next(iter(missing.values())))
    out = model.options.out or ROOT / "visualization" / "out" / model.run
    drawn: dict[str, dict] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(drawings.items(), unit=" figures", disable=None, leave=False, delay=1) as bar:
            for name, draw in bar:
                bar.set_description(name)
                try:
                    drawn[name] = write(draw, out / name, model.options)
                except NotApplicable as reason:
                    missing[name] = str(reason)
        utils.write_json(out / "manifest.json", manifest(model, command, drawn, missing))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == reason)
        print(f"not applicable: {names}: {reason}")
    for flag in HEEDED.keys() & set(model.options.changed()):
        ignored = [name for name in drawn if not re.match(HEEDED[flag], name)]
        if flag != "start_layer":
            ignored += [f"the other maps of {n}" for n in drawn if n.endswith("/explanations")]
        if ignored:
            print(f"--{flag.replace('_', '-')} does not apply to {', '.join(ignored)}")
    print(f"{model.path}: {len(drawn)} figures in {out}")


@styled
def write(draw: Drawing, stem: Path, options: Options) -> dict[str, Any]:
    """Draws a figure, or a page, and writes its files; returns its entry in the manifest."""
    picture = draw()
    if isinstance(picture, Page):
        path = stem.with_name(f"{stem.name}.html")
        utils.write_whole(path, picture.html.encode())
        return {"files": [path.name], **picture.numbers}
    written = [stem.with_name(f"{stem.name}.{options.format}")]
    style.save(picture.figure, written[0], options.dpi)
    if options.save_data:
        written.append(stem.with_name(f"{stem.name}.npz"))
        content = io.BytesIO()
        np.savez_compressed(content, **picture.arrays)
        utils.write_whole(written[-1], content.getbuffer())
    return {"files": [path.name for path in written], **picture.numbers}


def manifest(
    model: Model, command: str, drawn: dict[str, dict], missing: dict[str, str]
) -> dict[str, Any]:
    """The content of manifest.json: the figures, and what made them."""
    digest = None  # for weights that have no file here
    if model.path.is_file():
        with open(model.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    options = {name: portable(value) for name, value in asdict(model.options).items()}
    return {
        "command": command,
        "arguments": options,
        "checkpoint": portable(model.path),
        "checkpoint_sha256": digest,
        "model": asdict(model.config),
        "split": vars(model).get("split_name"),  # None where no data set was used
        "figures": drawn,
        "not_applicable": missing,
        "versions": versions() | {"matplotlib": matplotlib.__version__},
    }


def portable(value: Any) -> Any:
    """A path inside the repository relative to it; any other value unchanged."""
    inside = isinstance(value, Path) and value.is_absolute() and value.is_relative_to(ROOT)
    return value.relative_to(ROOT) if inside else value


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    if options.weights and options.checkpoint:
        raise UserError("--weights and --checkpoint each name a model; pass one of them")
    of_weights = {"heads", "mean", "std", "crop", "image_size"} & set(options.changed())
    if of_weights and not options.weights:
        flag = min(of_weights).replace("_", "-")
        raise UserError(f"--{flag} is for --weights, which takes a checkpoint too")
    path = find_checkpoint(options.weights or str(options.checkpoint or newest_checkpoint()))
    if options.weights and not path.is_file():
        path = Path(options.weights)
    model = Model(path, choose_device(options.device), options)
    check_options(model)
    draw_all(model, shlex.join(["python", "visualization/vis.py", *argv]))
    return 0


if __name__ == "__main__":
    run_program(main)
