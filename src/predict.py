"""Classes of image files, from a checkpoint.

    python src/predict.py photo.jpg                 by the model in checkpoints/vit_cifar10.pt
    python src/predict.py FOLDER --checkpoint checkpoints/NAME --top 3
    python src/predict.py a.jpg b.jpg --json        [{"file": ..., "predictions": [...]}, ...]

A file is read as the checkpoint's preprocessing says: resized, cropped and normalized as in
training. Of a folder, every image file in it is classified.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import device as devices
import utils
from config import UserError
from data import image_files
from evaluation import batch_size_for
from run import checkpoint_file


@torch.inference_mode()
def predictions(
    files: list[Path], checkpoint: Path, device: torch.device, top: int
) -> list[list[tuple[str, float]]]:
    """The `top` most probable classes of each file, with their probabilities.

    Raises:
        UserError: the checkpoint or a file cannot be used.
    """
    model, described = utils.load_model(checkpoint, device)
    top, found = min(top, len(described.classes)), []
    with tqdm(total=len(files), unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(files), size := batch_size_for(model.config)):
            batch = files[start : start + size]
            images = torch.stack([described.preprocessing.read(file) for file in batch])
            logits = model(described.preprocessing.normalize(images.to(device)))
            best = logits.softmax(dim=1).topk(top)  # (B, top)
            for rows in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                found.append([(described.classes[i], p) for i, p in zip(*rows, strict=True)])
            bar.update(len(batch))
    return found


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="predict.py", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE|FOLDER")
    default = utils.ROOT / "checkpoints/vit_cifar10.pt"
    help_text = f"a checkpoint or a run's folder ({default.relative_to(utils.ROOT)})"
    parser.add_argument("--checkpoint", type=utils.existing_path, default=default, help=help_text)
    parser.add_argument("--top", type=int, default=1, help="classes of each file (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--device", help="cuda, mps or cpu (the best available)")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, not {arguments.top}")
    given = (image_files(path) if path.is_dir() else [path] for path in arguments.files)
    files = [file for each in given for file in each]
    device = devices.choose_device(arguments.device)
    found = predictions(files, checkpoint_file(arguments.checkpoint), device, arguments.top)
    if arguments.json:
        rows = [
            {"file": str(file), "predictions": [{"class": c, "probability": p} for c, p in best]}
            for file, best in zip(files, found, strict=True)
        ]
        print(json.dumps(rows, indent=2))
        return 0
    for file, best in zip(files, found, strict=True):
        print(f"{file}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in best))
    return 0


if __name__ == "__main__":
    cli.run_program(main)
