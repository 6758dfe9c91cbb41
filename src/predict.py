"""Classifies image files, or computes their features, with a checkpoint's model.

    python src/predict.py photo.jpg                 with the model in checkpoints/vit_cifar10.pt
    python src/predict.py FOLDER --checkpoint checkpoints/NAME --top 3
    python src/predict.py a.jpg b.jpg --json        [{"file": ..., "predictions": [...]}, ...]
    python src/predict.py FOLDER --features out.npz for numpy.load: names (n,), features (n, D),
                                                    logits (n, K) and classes (K,)

Files are resized, cropped and normalized as the checkpoint says, that is, as in training.
Features are the head's input: the class token, or the mean of the patches, after the last norm,
in float32. In a folder, all image files are classified, including those in subfolders. A file
that cannot be read gets a line on standard error, and the exit status is then 2.
"""

import utils  # isort: skip  # before torch, for its threads
import io
import json
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import device as devices
from checkpoint import find_checkpoint, load_model
from config import Parser
from data import by_kind, image_files, nearly_constant
from evaluation import batch_size_for
from utils import UserError, complain, named_path, print_result, printable, run_program, write_whole

Predictions = list[tuple[Path, list[tuple[str, float]]]]  # per file: classes, probabilities


@torch.inference_mode()
def predictions(
    files: list[Path],
    checkpoint: Path,
    device: torch.device,
    top: int,
    features: Path | None = None,
) -> tuple[Predictions, list[str]]:
    """The `top` most probable classes of each file, and the errors of files that cannot be read.

    `features` is the .npz file to write, as the module's docstring describes.
    """
    model, described = load_model(checkpoint, device)
    head, model.head = model.head, nn.Identity()
    top, found, errors, outputs = min(top, len(described.classes)), [], [], []
    preprocessing, notes = described.preprocessing.measured(files)
    flat: list[Path] = []
    with tqdm(total=len(files), unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(files), size := batch_size_for(model.config)):
            read, images = [], []
            for file in files[start : start + size]:
                try:
                    images.append(preprocessing.read(file))
                    read.append(file)
                except UserError as error:
                    errors.append(str(error))
                bar.update()
            if not images:
                continue
            batch = torch.stack(images)
            flat += compress(read, nearly_constant(batch))
            pooled = model(preprocessing.normalize(batch.to(device)))  # (B, D)
            logits = head(pooled)  # (B, K)
            if not logits.isfinite().all():
                raise UserError(f"the model of {checkpoint} computes no finite numbers")
            if features:  # only then, as they may be large
                outputs.append((pooled.cpu(), logits.cpu()))
            best = logits.softmax(dim=1).topk(top)  # (B, top)
            for file, values, rows in zip(read, *(each.tolist() for each in best), strict=True):
                names = (described.classes[row] for row in rows)
                found.append((file, list(zip(names, values, strict=True))))
    if flat:
        notes.append(f"{len(flat)} of {len(files)} are nearly constant, such as {flat[0]}")
    for note in notes:
        complain(note)
    if features and found:
        names, buffer = [str(file) for file, _ in found], io.BytesIO()
        pooled, logits = (torch.cat(each).numpy() for each in zip(*outputs, strict=True))
        np.savez(buffer, names=names, features=pooled, logits=logits, classes=described.classes)
        try:
            write_whole(features, buffer.getbuffer())
        except OSError as error:  # the predictions are still printed
            errors.append(f"cannot write {features}: {error.strerror}")
    return found, errors


def main(argv: list[str]) -> int:
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("files", nargs="+", type=named_path, metavar="FILE|FOLDER")
    default = utils.ROOT / "checkpoints/vit_cifar10.pt"
    help_text = f"a checkpoint or a run's folder ({default.relative_to(utils.ROOT)})"
    parser.add_argument("--checkpoint", type=find_checkpoint, default=default, help=help_text)
    parser.add_argument("--top", type=int, default=1, help="classes of each file (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    help_text = "also write names, features, logits and classes to this .npz file"
    parser.add_argument("--features", type=named_path, metavar="FILE", help=help_text)
    parser.add_argument("--device", help="cuda, mps or cpu (the best available)")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, not {arguments.top}")
    if (features := arguments.features) and features.suffix != ".npz":
        raise UserError(f"--features {features} must end in .npz")
    files = []
    for path in arguments.files:
        found, others = image_files(path) if path.is_dir() else ([path], None)
        files += found
        if others:
            complain(f"left out of {path}: {by_kind(others)}")
    device = devices.choose_device(arguments.device)
    found, errors = predictions(files, arguments.checkpoint, device, arguments.top, features)
    if arguments.json:
        rows = [
            {"file": str(file), "predictions": [{"class": c, "probability": p} for c, p in best]}
            for file, best in found
        ]
        print_result(json.dumps(rows, indent=2))
    else:
        for file, best in found:
            classes = ", ".join(f"{name} {p:.1%}" for name, p in best)
            print_result(printable(f"{file}: {classes}"))
    for error in errors:
        complain(error)
    return 2 if errors else 0


if __name__ == "__main__":
    run_program(main)
