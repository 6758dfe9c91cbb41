"""Draws what a trained Vision Transformer sees.

    python visualization/vis.py                        everything, of the newest checkpoint
    python visualization/vis.py model --checkpoint F   the weights of one: needs no images
    python visualization/vis.py image --index 0,7      attention and relevance in images of its data
    python visualization/vis.py image --image cat.jpg  the same in a file
    python visualization/vis.py steps --index 7        the way through the model, in ten steps
    python visualization/vis.py explorer               a page: point at a patch, see what it takes
    python visualization/vis.py data                   128 images: distance, entropy, similarity
    python visualization/vis.py run                    curves, confusion, mistakes, calibration

The figures go to visualization/out/<run>/ with a manifest.json that says what made them. Layers,
heads, patch rows and patch columns count from 1, images of a data set from 0.
"""

import argparse
import difflib
import hashlib
import io
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))  # the model's modules, from whatever folder this is run

import figures
import utils
from catalogue import (
    OF_AN_IMAGE,
    OF_THE_MODEL,
    STEPS,
    Model,
    NotApplicable,
    Page,
    Picture,
    Subject,
    draw_explorer,
)
from data import DataError, image_files, read_image
from machine import choose_device
from run import checkpoint_file
from utils import UsageError

OF_IMAGES = ("image", "steps", "explorer")
GROUPS = (*OF_IMAGES, *OF_THE_MODEL)
DEFAULT_IMAGES, EXPLORED_IMAGES = (0, 7), range(8)


# ---------------------------------------------------------------------------- the command line


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = utils.Parser(
        prog="vis.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=("all", *GROUPS), default="all")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=utils.existing_path,
        help="whose model to draw, or its run's folder (the newest under checkpoints/)",
    )
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument(
        "--index", type=_numbers, metavar="I,J", help="images of the data set (0,7)"
    )
    subject.add_argument("--image", nargs="+", metavar="FILE", type=Path, help="image files")
    subject.add_argument("--dir", metavar="DIR", type=Path, help="all image files in a folder")
    parser.add_argument(
        "--target",
        default="pred",
        metavar="pred|label|NAME",
        help="class to explain: the predicted, the true, or one by name (pred); and the likeliest "
        "other one",
    )
    parser.add_argument("--layer", type=_layer, default="all", metavar="L|all", help="(all)")
    parser.add_argument(
        "--head", type=_head, default="all", metavar="H|mean|max|min|all", help="(all)"
    )
    parser.add_argument(
        "--query",
        type=_query,
        metavar="cls|R,C",
        help="whose attention: the classifier's, or a patch's by row and column (both, with the "
        "middle patch)",
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="images of the data set to look at (validation, or test where none were held out)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="(visualization/out/<run>)")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="(png)")
    parser.add_argument("--dpi", type=_dpi, default=200, metavar="N", help="(200)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (the best there is)")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="chooses the 128 images (0)"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", type=Path, default=ROOT / "data", help="of CIFAR-10 (data/)"
    )
    parser.add_argument(
        "--save-data", action="store_true", help="also write each figure's arrays, as .npz"
    )
    parser.add_argument("--show", action="store_true", help="also open the figures in windows")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 0,7") from None


def _layer(text: str) -> int | str:
    return _one_of(text, ("all",))


def _head(text: str) -> int | str:
    return _one_of(text, ("all", "mean", "max", "min"))


def _one_of(text: str, words: tuple[str, ...]) -> int | str:
    if text in words:
        return text
    try:
        return int(text)
    except ValueError:
        known = ", ".join(words)
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {known}") from None


def _query(text: str) -> str | tuple[int, int]:
    """'cls', or a patch's row and column."""
    if text == "cls":
        return text
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither cls nor a patch such as 3,4"
        ) from None
    return row, column


def _dpi(text: str) -> int:
    dpi = int(text) if text.isdecimal() else 0
    if not 20 <= dpi <= 1200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 20 to 1200")
    return dpi


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2^63 - 1")
    return int(text)


def newest_checkpoint() -> Path:
    """Raises UsageError where there is none."""
    folder = ROOT / "checkpoints"
    found = sorted(folder.glob("**/*.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(
            f"there is no checkpoint under {folder}; train one with "
            "'python src/trainer.py --recipe demo', or name one with --checkpoint"
        )
    return found[-1]


def check_arguments(model: Model) -> None:
    """Raises UsageError for a layer, head, query or target that this model does not have."""
    arguments, config = model.arguments, model.config
    for flag, value, most in (
        ("layer", arguments.layer, config.depth),
        ("head", arguments.head, config.heads),
    ):
        if isinstance(value, int) and not 1 <= value <= most:
            raise UsageError(f"--{flag} {value} is not there; {model.path} has 1 to {most}")
    if isinstance(arguments.query, tuple):
        (row, column), (g_h, g_w) = arguments.query, config.grid
        if not (1 <= row <= g_h and 1 <= column <= g_w):
            raise UsageError(
                f"--query {row},{column} is not there; {model.path} has patch rows 1 to "
                f"{g_h} and columns 1 to {g_w}"
            )
    target = arguments.target
    if target not in ("pred", "label", *model.classes):
        near = difflib.get_close_matches(target, model.classes, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"--target {target!r} is no class; {hint}there are {', '.join(model.classes)}"
        )
    if target == "label" and (arguments.image or arguments.dir):
        raise UsageError("--target label: the true class of an image file is not known")


# ---------------------------------------------------------------------------- what to draw


def plan(model: Model) -> tuple[dict[str, Callable[[], Picture | Page]], dict[str, str]]:
    """The figures to draw, and those that no data set can be had for with the reason, by name.

    Raises:
        UsageError, DataError: an image that the command line names is not to be had.
    """
    arguments = model.arguments
    groups = GROUPS if arguments.what == "all" else (arguments.what,)
    from_files = bool(arguments.image or arguments.dir)
    without_data = {"model", *OF_IMAGES} if from_files else {"model"}
    reason = None if without_data.issuperset(groups) else why_no_data(model)
    drawings: dict[str, Callable[[], Picture | Page]] = {}
    missing: dict[str, str] = {}
    for group in groups:
        if group not in OF_IMAGES:
            for name, draw in OF_THE_MODEL[group].items():
                drawings[f"{group}/{name}"] = partial(draw, model)
        elif reason and not (from_files or arguments.index):
            missing[group] = reason
        elif group == "explorer":
            drawings[group] = partial(draw_explorer, model, subjects(model, EXPLORED_IMAGES))
        else:
            for subject in subjects(model, DEFAULT_IMAGES):
                figures_of = STEPS if group == "steps" else of_an_image(arguments.query)
                for name, draw in figures_of.items():
                    drawings[f"{group}/{subject.name}/{name}"] = partial(draw, model, subject)
    if reason:
        needs_none = ("image/", "steps/", "explorer", "model/", "run/curves")
        missing |= {name: reason for name in drawings if not name.startswith(needs_none)}
    return {name: draw for name, draw in drawings.items() if name not in missing}, missing


def why_no_data(model: Model) -> str | None:
    """Why the checkpoint's data set is not to be had; None where it is here."""
    try:
        _ = model.dataset
    except DataError as error:
        return str(error)
    return None


def of_an_image(query: str | tuple[int, int] | None) -> dict[str, Callable]:
    """The figures of an image: attention of the classifier and of a patch, or of the one asked."""
    if query is None:
        return OF_AN_IMAGE
    left_out = "attention-of-patch" if query == "cls" else "attention"
    return {name: draw for name, draw in OF_AN_IMAGE.items() if name != left_out}


def subjects(model: Model, by_default: Iterable[int]) -> list[Subject]:
    """The images that the command line names, or some of the split.

    Raises:
        UsageError, DataError: an index, a file or a folder is not there, or a file is no image.
    """
    arguments, config = model.arguments, model.config
    if arguments.image or arguments.dir:
        files = arguments.image or image_files(arguments.dir)
        H, W = config.image_size
        pixels = [read_image(file, (H, W), config.channels) for file in files]
        names = unique([file.name for file in files])
        return [
            Subject(name, f"{file.name} at {H} x {W}", image, None)
            for name, file, image in zip(names, files, pixels, strict=True)
        ]
    count = len(model.split)
    chosen = arguments.index or [index for index in by_default if index < count]
    for index in chosen:
        if not 0 <= index < count:
            raise UsageError(
                f"--index {index} is not there; the {model.of_split} are 0 to {count - 1}"
            )
    name = model.split_name
    labels, images = model.split.labels, model.split.images
    return [
        Subject(f"{name}-{index}", f"{name} image {index}", images[index], int(labels[index]))
        for index in dict.fromkeys(chosen)
    ]


def unique(names: list[str]) -> Iterator[str]:
    """The names, a number behind those that came before: a.png, b.png, a.png-2."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"


# ---------------------------------------------------------------------------- drawing


def draw_all(model: Model, command: str) -> None:
    """Draws what was asked for, and writes a manifest of it.

    Raises:
        UsageError: the folder cannot be written to, or nothing could be drawn.
    """
    arguments = model.arguments
    drawings, missing = plan(model)
    if not drawings:
        raise UsageError(next(iter(missing.values())))
    out = arguments.out or ROOT / "visualization" / "out" / model.run
    drawn: dict[str, dict] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(drawings.items(), unit=" figures", disable=None, leave=False, delay=1) as bar:
            for name, draw in bar:
                bar.set_description(name)
                try:
                    drawn[name] = keep(draw(), out / name, arguments)
                except NotApplicable as reason:
                    missing[name] = str(reason)
        utils.write_json(out / "manifest.json", manifest(model, command, drawn, missing))
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from error
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == reason)
        print(f"not applicable: {names}: {reason}")
    print(f"{model.path}: {len(drawn)} figures in {out}")


def keep(picture: Picture | Page, stem: Path, arguments: argparse.Namespace) -> dict:
    """Writes a picture's files, or a page's; returns its entry in the manifest."""
    if isinstance(picture, Page):
        path = stem.with_name(f"{stem.name}.html")
        utils.write_whole(path, picture.html.encode())
        return {"files": [path.name], **picture.numbers}
    written = [stem.with_name(f"{stem.name}.{arguments.format}")]
    figures.save(picture.figure, written[0], arguments.dpi)
    if arguments.save_data:
        written.append(stem.with_name(f"{stem.name}.npz"))
        content = io.BytesIO()
        np.savez_compressed(content, **picture.arrays)
        utils.write_whole(written[-1], content.getbuffer())
    if not arguments.show:
        plt.close(picture.figure)
    return {"files": [path.name for path in written], **picture.numbers}


def manifest(
    model: Model, command: str, drawn: dict[str, dict], missing: dict[str, str]
) -> dict[str, Any]:
    """What made the figures and what they are: the content of manifest.json."""
    with open(model.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "command": command,
        "arguments": {name: portable(value) for name, value in vars(model.arguments).items()},
        "checkpoint": str(portable(model.path)),
        "checkpoint_sha256": digest,
        "model": asdict(model.config),
        "split": model.split_name,
        "figures": drawn,
        "not_applicable": missing,
        "versions": {"torch": str(torch.__version__), "matplotlib": matplotlib.__version__},
    }


def portable(value: Any) -> Any:
    """A path inside the repository as it is on every machine; anything else as it is."""
    inside = isinstance(value, Path) and value.is_absolute() and value.is_relative_to(ROOT)
    return value.relative_to(ROOT) if inside else value


def choose_backend(show: bool) -> None:
    """Draws into files alone, or into windows as well; UsageError where there are none."""
    if not show:
        matplotlib.use("Agg")
    elif matplotlib.get_backend().lower() == "agg":
        raise UsageError("--show needs a display and a matplotlib backend for it; leave it out")


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        choose_backend(arguments.show)
        path = checkpoint_file(arguments.checkpoint or newest_checkpoint())
        model = Model(path, choose_device(arguments.device), arguments)
        check_arguments(model)
        draw_all(model, shlex.join(["python", "visualization/vis.py", *argv]))
        if arguments.show:
            plt.show()
        return 0
    except (UsageError, DataError, utils.CheckpointError) as error:
        print(f"vis.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvis.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
