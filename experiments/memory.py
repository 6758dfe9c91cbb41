"""Memory of a training step of each named model, with and without checkpointed activations.

    python experiments/memory.py [--batch-size 8] [--image-size 224]

Forward and backward in a process of its own for each row, patches of 16 x 16 (huge: 14 x 14), 1000
classes, in the precision of trainer.py. The peak holds weights and gradients, but no optimizer's
state. Prints the table of docs/finetuning.md.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import device as devices
from config import Parser
from run import training_flops
from utils import run_program
from ViT import MODELS, ViT, ViTConfig, parameters_of

SIZES = ("small", "base", "large", "huge")


def config_of(size: str, image_size: int, recompute: bool = False) -> ViTConfig:
    """The model of a name, as in the paper's Table 1."""
    return ViTConfig(
        **MODELS[size],
        image_size=image_size,
        patch_size=14 if size == "huge" else 16,
        classes=1000,
        checkpoint_activations=recompute,
    )


def peak_bytes(config: ViTConfig, batch_size: int) -> int:
    """Most memory of this process after a step; call it in a fresh one."""
    device = devices.choose_device(None)
    model = ViT(config).to(device)
    images = torch.randn(batch_size, config.channels, *config.image_size, device=device)
    with devices.autocast(devices.resolve_precision("auto", device), device):
        logits = model(images)
    logits.float().logsumexp(dim=1).sum().backward()
    return devices.peak_memory_bytes(device) or 0


def row(size: str, image_size: int, batch_size: int) -> str:
    cells = []
    for recompute in (False, True):
        config = config_of(size, image_size, recompute)
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit this process' peak
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            cells.append(f"{pool.submit(peak_bytes, config, batch_size).result() / 1e9:.1f} GB")
    with torch.device("meta"):
        parameters = parameters_of(ViT(config))
    operations = training_flops(config) / 1e9
    return f"| {size} | {parameters:,} | {operations:.0f}e9 | {cells[0]} | {cells[1]} |"


def main(argv: list[str]) -> int:
    parser = Parser(prog="memory.py", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (8)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (224)")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, not {arguments.batch_size}")
    for size in SIZES:
        config_of(size, arguments.image_size)  # refused now rather than after minutes
    print("| model | parameters | operations an image | memory | with `--checkpoint-activations` |")
    print("|---|---|---|---|---|", flush=True)
    for size in SIZES:
        print(row(size, arguments.image_size, arguments.batch_size), flush=True)
    return 0


if __name__ == "__main__":
    run_program(main)
