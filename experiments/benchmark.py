"""The speed of this code beside its peers': alternating in one process, as median ratios.

    python experiments/benchmark.py                  all but memory; checkpoints/benchmark/all.json
    python experiments/benchmark.py --part memory    one part; --recipe demo: at its sizes
    python experiments/benchmark.py --json FILE      writes FILE and, beside it, the plot

    train_step   images/s of a training step of this ViT and those of torchvision, timm,
                 vit-pytorch and transformers, where installed, eager and compiled, with each kind
                 of attention they offer; also as a share of the device's matrix rate
    input        an epoch of augmented batches, beside DataLoader with torchvision's transforms
    outside      the share of a step of the recipe that is neither forward nor backward
    memory       the peak of a forward and backward pass of each named model, with and without
                 checkpointed activations; large ones need 9 GB

The compared models have a class token and learned positions, which all peers offer, and see
all patches. Images are random: no data set is read.
"""

import multiprocessing
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import cli
import common
import device as devices
import utils
from augment import Augmentation
from common import Setting, add_gradients, ratio, seconds_of, time_alternating
from config import Parser
from curves import write_figure
from data import shuffled_batches
from recipes import RECIPES, Recipe, TrainConfig
from run import training_flops
from trainer import train_epoch
from utils import UserError, first_line, run_program
from ViT import MODELS, ViT, ViTConfig, parameters_of

INPUT_IMAGES = 10_000  # in the epoch of the input benchmark
MEMORY_IMAGES = 8  # in the batch of the memory benchmark
MEASURED = ("small", "base", "large", "huge")


# ---------------------------------------------------------------------------- a training step


class Candidate(NamedTuple):
    """An implementation with one of the kinds of attention it offers."""

    implementation: str
    attention: str  # "fused" or "plain"; "own" where the code chooses by itself
    model: nn.Module


def of_this_code(config: ViTConfig) -> Iterator[Candidate]:
    yield Candidate("this code", "own", ViT(config))


def of_torchvision(config: ViTConfig) -> Iterator[Candidate]:
    model = torchvision.models.VisionTransformer(
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=config.hidden,
        num_classes=config.classes,
    )
    yield Candidate("torchvision", "fused", model)


def of_timm(config: ViTConfig) -> Iterator[Candidate]:
    import timm

    for attention in ("plain", "fused"):  # fused, the default, stays set
        timm.layers.set_fused_attn(attention == "fused")
        model = timm.models.VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            depth=config.depth,
            num_heads=config.heads,
            embed_dim=config.width,
            num_classes=config.classes,
        )
        yield Candidate("timm", attention, model)


def of_vit_pytorch(config: ViTConfig) -> Iterator[Candidate]:
    import vit_pytorch

    model = vit_pytorch.ViT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.classes,
        dim=config.width,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.width // config.heads,
        mlp_dim=config.hidden,
    )
    yield Candidate("vit-pytorch", "plain", model)


def of_transformers(config: ViTConfig) -> Iterator[Candidate]:
    import transformers

    class Logits(transformers.ViTForImageClassification):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).logits

    for attention, name in (("fused", "sdpa"), ("plain", "eager")):
        theirs = transformers.ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_labels=config.classes,
            attn_implementation=name,
        )
        yield Candidate("transformers", attention, Logits(theirs))


IMPLEMENTATIONS = (of_this_code, of_torchvision, of_timm, of_vit_pytorch, of_transformers)
PEERS = ("torchvision", "timm", "vit-pytorch", "transformers")


def candidates(config: ViTConfig, peers: tuple[str, ...]) -> list[Candidate]:
    """A model of these sizes from every installed implementation, or only from some peers."""
    found: list[Candidate] = []
    for implementation in IMPLEMENTATIONS:
        name = implementation.__name__.removeprefix("of_").replace("_", "-")
        if peers and name not in ("this-code", *peers):
            continue
        try:
            found += implementation(config)
        except ImportError as error:
            print(f"{error.name or error} is not installed; skipping it")
    return found


def peer_step(
    model: nn.Module, mode: str, images: Tensor, labels: Tensor, precision: str
) -> Callable[[], None]:
    """A training step: forward, cross-entropy, backward and a step of AdamW."""
    model = model.to(images.device).train()
    forward = torch.compile(model, dynamic=False) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        add_gradients(forward, images, labels, precision)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(
    config: ViTConfig, batch_size: int, modes: list[str], setting: Setting
) -> dict[str, Any]:
    """Times a training step of every candidate in every mode; the fastest row comes first."""
    rate = common.matrix_rate(setting.device, setting.precision)
    images = torch.randn(batch_size, config.channels, *config.image_size, device=setting.device)
    labels = torch.arange(batch_size, device=setting.device) % config.classes
    works, parameters = {}, {}
    for candidate in candidates(config, setting.peers):
        parameters[candidate.implementation] = parameters_of(candidate.model)
        for mode in modes:
            key = (candidate.implementation, candidate.attention, mode)
            step = peer_step(candidate.model, mode, images, labels, setting.precision)
            try:
                first = seconds_of(step, 1, setting.device)
            except Exception as error:  # a compiler can raise anything; the others do not need it
                print(f"{' '.join(key)} does not run ({first_line(error)}); skipping it")
                continue
            works[key] = step
            print(f"{' '.join(key)}: first step {first:.1f} s", flush=True)
    taken = time_alternating(works, setting)
    rows = [
        {
            "implementation": implementation,
            "attention": attention,
            "mode": mode,
            "parameters": parameters[implementation],
            "images_per_second": (speed := batch_size / statistics.median(seconds)),
            "matrix_rate_share": speed * training_flops(config) / rate,
        }
        for (implementation, attention, mode), seconds in taken.items()
    ]
    rows.sort(key=lambda row: -row["images_per_second"])
    return {
        "matrix_flops_per_second": rate,
        "train_step": rows,
        "ratio_to_fastest_peer": {mode: ratio_to_fastest_peer(taken, mode) for mode in modes},
    }


def ratio_to_fastest_peer(taken: dict[tuple, list[float]], mode: str) -> float | None:
    """The speed of this code over the fastest peer's; None where one of the two did not run."""
    own = [times for key, times in taken.items() if key[2] == mode and key[0] == "this code"]
    peers = [times for key, times in taken.items() if key[2] == mode and key[0] != "this code"]
    return ratio(min(peers, key=statistics.median), own[0]) if peers and own else None


# ---------------------------------------------------------------------------- other parts


def as_batch(transform: Callable[[Image.Image], Tensor], pictures: list[Image.Image]) -> Tensor:
    return torch.stack([transform(picture) for picture in pictures])


def time_input(setting: Setting, batch_size: int) -> dict[str, Any]:
    """Times an epoch of flipped, cropped, normalized batches from this code and DataLoader."""
    device, dataset = setting.device, common.random_dataset(INPUT_IMAGES, setting.device)
    config = TrainConfig(flip="random", crop_padding=4)
    augment = Augmentation(config, ViTConfig(), INPUT_IMAGES, device)

    def own_epoch() -> None:
        order = shuffled_batches(dataset.train, batch_size, utils.generator_for(0))
        for seed, (rows, batch) in enumerate(zip(order, dataset.train.batches(order), strict=True)):
            dataset.preprocessing.normalize(augment(*batch, rows, 0, seed).images)

    def their_epoch(loader: DataLoader) -> None:
        for images in loader:
            images.to(device, non_blocking=device.type == "cuda")  # from pinned memory

    rows = torch.arange(INPUT_IMAGES, device=device)
    pictures = list(map(transforms.functional.to_pil_image, dataset.train.take(rows).images.cpu()))
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(dataset.preprocessing.mean, dataset.preprocessing.std),
        ]
    )
    works: dict[str, Callable[[], None]] = {}
    for workers in (0, torch.get_num_threads()):
        loader = DataLoader(
            pictures,
            batch_size,
            shuffle=True,
            collate_fn=partial(as_batch, transform),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        works[f"DataLoader, {workers} workers"] = partial(their_epoch, loader)
    works["this code"] = own_epoch  # last: the workers are forked before it starts threads
    taken = time_alternating(works, setting)
    speeds = {name: INPUT_IMAGES / statistics.median(taken[name]) for name in taken}
    own = taken.pop("this code")
    fastest = min(taken.values(), key=statistics.median)
    return {"input_images_per_second": speeds, "input_ratio": ratio(fastest, own)}


def time_outside(recipe: Recipe, mode: str, setting: Setting, steps: int = 8) -> dict[str, float]:
    """Times epochs of `train_epoch`, bare steps, and their passes alone, in alternation."""
    run, state = common.run_of(recipe, setting, steps)
    forward = common.forward_of(run, state, mode)
    works = {
        "step": common.step_of(run, replace(state), forward),  # a copy: no epoch counts these
        "passes": common.step_of(run, state, forward, optimize=False),
        "epoch": lambda: train_epoch(run, state, forward),
    }
    taken = time_alternating(works, setting)
    step_share, passes_share = (steps * ratio(taken[x], taken["epoch"]) for x in ("step", "passes"))
    return {
        "seconds_per_step": statistics.median(taken["epoch"]) / steps,
        "outside_share": 1 - passes_share,
        "optimizers_share": step_share - passes_share,
    }


def peak_bytes(config: ViTConfig, setting: Setting) -> int:
    """Peak memory of this process after a forward and backward pass; call it in a fresh one."""
    device = setting.device
    images = torch.randn(MEMORY_IMAGES, config.channels, *config.image_size, device=device)
    labels = torch.arange(MEMORY_IMAGES, device=device)
    add_gradients(ViT(config).to(device), images, labels, setting.precision)
    return devices.peak_memory_bytes(device) or 0


def peaks_of(name: str, setting: Setting) -> dict[str, Any]:
    """Peaks of a named model of the paper: weights and gradients, but no optimizer state."""
    P = 14 if name == "huge" else 16
    plain = ViTConfig(**MODELS[name], patch_size=P, image_size=224, classes=1000)
    with torch.device("meta"):
        row = {"model": name, "parameters": parameters_of(ViT(plain))}
    row["GFLOP an image"] = training_flops(plain) / 1e9
    recomputing = replace(plain, checkpoint_activations=True)
    for kind, config in (("GB", plain), ("GB with --checkpoint-activations", recomputing)):
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit this process' peak
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            row[kind] = fresh.submit(peak_bytes, config, setting).result() / 1e9
    return row


# ---------------------------------------------------------------------------- output


def draw(result: dict[str, Any]) -> Figure:
    """The speed of each implementation, with a marker for each mode and kind of attention."""
    rows = result["train_step"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))[::-1]
    figure = Figure(figsize=(7.4, 1.2 + 0.25 * len(names)), layout="constrained", dpi=200)
    axes = figure.subplots()
    for row in rows:
        marker = {"own": "D", "plain": "o", "fused": "s"}[row["attention"]]
        face = "C0" if row["mode"] == "compiled" else "none"
        label = f"{row['attention']} attention, {row['mode']}"
        place = row["images_per_second"], names.index(row["implementation"])
        axes.plot(*place, f"C0{marker}", markerfacecolor=face, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.set_xlabel("training step, images/s", fontsize=8)
    axes.set_title(f"{result['device_name']}, {result['precision']}, {result['shape']}", fontsize=8)
    lines = {line.get_label(): line for line in axes.lines}  # one of each kind
    axes.legend(handles=lines.values(), fontsize=8, loc="upper left")
    return figure


def show(result: dict[str, Any]) -> None:
    """Prints a line for each number, and a table in Markdown for each list of rows."""
    for name, value in result.items():
        if isinstance(value, list):
            print(f"\n{name}\n")
            common.show_rows(value)
            print()
        else:
            print(f"{name}: {common.said(value)}")


PARTS = ("input", "train_step", "outside", "memory")


def measure(part: str, name: str, modes: list[str], setting: Setting) -> dict[str, Any]:
    """Measures a part, or "all" of them but memory, with the sizes of the named recipe."""
    recipe = RECIPES[name]
    batch_size = recipe.train.batch_size
    sizes = {key: getattr(recipe.model, key) for key in ("patch_size", "width", "depth", "heads")}
    named = sizes | {"batch_size": batch_size, "image_size": 32}
    shape = ", ".join(f"{key.replace('_', ' ')} {size}" for key, size in named.items())
    config = ViTConfig(**sizes)
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "input": lambda: time_input(setting, batch_size),
        "train_step": lambda: {"shape": shape} | time_steps(config, batch_size, modes, setting),
        "outside": lambda: time_outside(recipe, modes[-1], setting),
        "memory": lambda: {"memory": [peaks_of(model, setting) for model in MEASURED]},
    }
    result = {
        "recipe": name,
        "device_name": devices.device_name(setting.device),
        "precision": setting.precision,
        "torch": str(torch.__version__),
        "rounds": setting.rounds,
    }
    for each in PARTS[:-1] if part == "all" else [part]:
        result |= measured[each]()
    return result


def main(argv: list[str]) -> int:
    parser = Parser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="(all)")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"(all: {','.join(PEERS)})")
    parser.add_argument("--recipe", choices=RECIPES, help="whose sizes (the device's)")
    parser.add_argument("--device", help="cuda, mps or cpu (the best available)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--mode", choices=("eager", "compiled"), help="one of them (both)")
    parser.add_argument("--rounds", type=int, default=11, help="how often each is timed (11)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(checkpoints/benchmark/)")
    arguments = parser.parse_args(argv)
    peers = tuple(filter(None, arguments.peers.split(",")))
    if not set(peers) <= set(PEERS):
        parser.error(f"--peers {arguments.peers} must be some of {','.join(PEERS)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {arguments.rounds}")
    out = arguments.json or ROOT / f"checkpoints/benchmark/{arguments.part}.json"
    if out.suffix != ".json":
        parser.error(f"--json {out} must end in .json; the plot goes beside it")
    modes = [arguments.mode] if arguments.mode else ["eager", "compiled"]
    setting = Setting.of(arguments.device, arguments.precision, arguments.rounds, *peers)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()  # fails now rather than after minutes
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    devices.keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|timm|transformers")
    recipe = arguments.recipe or cli.default_recipe(arguments.device)[0]
    result = measure(arguments.part, recipe, modes, setting)
    show(result)
    utils.write_json(out, result)
    if "train_step" in result:
        write_figure(out.with_suffix(".png"), draw(result))
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    run_program(main)
