"""This code beside its peers: in one process, taking turns, medians, as ratios.

    python src/benchmark.py                       a table, and benchmark.json and benchmark.png
    python src/benchmark.py --recipe demo         in the shape of another recipe
    python src/benchmark.py --json FILE           the JSON and, beside it, the plot

Four parts, with the patch, width, depth, heads and batch of a recipe, on the device that training
would take. In what is compared, every model has a class token and learned positions, as all peers
offer, and sees all patches.

    train_step   images/s of a training step of this ViT and of those of torchvision, timm,
                 vit-pytorch and transformers (as far as they are installed), eager and compiled,
                 with each kind of attention that they offer; and of the device's matrix rate the
                 share that the arithmetic of the model comes to
    input        an epoch of batches as training gets them, beside DataLoader with torchvision's
                 transforms
    outside      what a step of the recipe takes in `train_epoch` besides forward and backward
    growth       a step's time, and what it keeps for the backward pass, against the sizes

No data set is read: random images take the same time.
"""

import argparse
import copy
import dataclasses
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchvision import transforms

import machine
import utils
from augment import augment
from data import CIFAR10_MEAN, CIFAR10_STD, Dataset, Split, batch_rows, normalise
from optimizers import make_optimizers
from processes import ALONE, Job, StopSignals
from recipes import DEFAULT_RECIPE, RECIPES, Recipe, TrainConfig
from run import Run
from trainer import (
    Forward,
    add_gradients,
    autocast,
    compile_model,
    example_of,
    targets_of,
    train_epoch,
)
from utils import UsageError
from ViT import ViT, ViTConfig, parameters_of

LONG_ENOUGH = 0.05  # seconds of work that a clock reading is for
INPUT_IMAGES = 10_000  # in the epoch that input is timed with


class Setting(NamedTuple):
    """Where and how everything is measured."""

    device: torch.device
    precision: str  # "bf16" or "fp32"
    rounds: int


# ---------------------------------------------------------------------------- the clock


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], Any], times: int, device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - started) / times


def in_turns(works: dict[Any, Callable[[], Any]], setting: Setting) -> dict[Any, list[float]]:
    """Seconds of each work, in as many rounds as the setting says.

    A round does every work once, or so often that it takes a while, beginning with another one
    each time; so a machine whose speed drifts slows all of them alike.
    """
    device = setting.device
    once = {name: seconds_of(work, 2, device) for name, work in works.items()}
    times = {name: max(1, round(LONG_ENOUGH / seconds)) for name, seconds in once.items()}
    taken: dict[Any, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(setting.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(seconds_of(works[name], times[name], device))
    return taken


def ratio(seconds: list[float], others: list[float]) -> float:
    """Of the times of two works, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


# ---------------------------------------------------------------------------- a training step


class Shape(NamedTuple):
    """What is the same for every implementation; all have a class token and learned positions."""

    patch_size: int
    width: int
    depth: int
    heads: int
    batch_size: int
    image_size: int = 32

    @classmethod
    def of(cls, recipe: Recipe) -> "Shape":
        model = recipe.model
        return cls(
            *(model.patch_size, model.width, model.depth, model.heads), recipe.train.batch_size
        )


class Candidate(NamedTuple):
    """An implementation with one of the kinds of attention it offers."""

    implementation: str
    attention: str  # "fused" or "plain"; "own" where it has one kind for each device
    model: nn.Module
    calling: Callable[[], AbstractContextManager] = nullcontext  # around its forward pass
    compiles: bool = True  # whether the choice of attention outlives compilation


def of_this_code(shape: Shape) -> Iterator[Candidate]:
    config = ViTConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
    )
    yield Candidate("this code", "own", ViT(config))


def of_torchvision(shape: Shape) -> Iterator[Candidate]:
    model = torchvision.models.VisionTransformer(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_layers=shape.depth,
        num_heads=shape.heads,
        hidden_dim=shape.width,
        mlp_dim=4 * shape.width,
        num_classes=10,
    )
    yield Candidate("torchvision", "fused", model)
    plain = partial(sdpa_kernel, SDPBackend.MATH)
    yield Candidate("torchvision", "plain", model, calling=plain, compiles=False)


def of_timm(shape: Shape) -> Iterator[Candidate]:
    import timm

    before = timm.layers.use_fused_attn()
    for attention in ("fused", "plain"):
        timm.layers.set_fused_attn(attention == "fused")
        model = timm.models.VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            depth=shape.depth,
            num_heads=shape.heads,
            embed_dim=shape.width,
            num_classes=10,
        )
        yield Candidate("timm", attention, model)
    timm.layers.set_fused_attn(bool(before))


def of_vit_pytorch(shape: Shape) -> Iterator[Candidate]:
    import vit_pytorch

    model = vit_pytorch.ViT(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_classes=10,
        dim=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        dim_head=shape.width // shape.heads,
        mlp_dim=4 * shape.width,
    )
    yield Candidate("vit-pytorch", "plain", model)


def of_transformers(shape: Shape) -> Iterator[Candidate]:
    import transformers

    class Logits(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).logits

    for attention, name in (("fused", "sdpa"), ("plain", "eager")):
        config = transformers.ViTConfig(
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=10,
            attn_implementation=name,
        )
        model = transformers.ViTForImageClassification(config)
        yield Candidate("transformers", attention, Logits(model))


IMPLEMENTATIONS = (of_this_code, of_torchvision, of_timm, of_vit_pytorch, of_transformers)


def candidates(shape: Shape) -> list[Candidate]:
    found = []
    for implementation in IMPLEMENTATIONS:
        try:
            found += implementation(shape)
        except ImportError as error:
            print(f"{error.name or error} is not installed; going on without it")
    return found


def step_of(
    candidate: Candidate, forward: Callable[[Tensor], Tensor], shape: Shape, setting: Setting
) -> Callable[[], None]:
    """A training step: forward, cross-entropy, backward and a step of AdamW."""
    images = torch.randn(shape.batch_size, 3, shape.image_size, shape.image_size)
    images = images.to(setting.device)
    labels = torch.arange(shape.batch_size, device=setting.device) % 10
    optimizer = torch.optim.AdamW(candidate.model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with candidate.calling(), autocast(setting.precision, setting.device):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(
    shape: Shape, modes: list[str], setting: Setting, rate: float
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Times a training step of every candidate in every mode.

    Args:
        rate: of matrix products, in floating-point operations a second.

    Returns:
        The rows, fastest first, and for each mode how many times this code is as fast as the
        fastest peer, each with its best attention; null where one of the two did not run.
    """
    works, found = {}, candidates(shape)
    for candidate in found:
        candidate.model.to(setting.device).train()
        for mode in modes:
            forward = candidate.model
            if mode == "compiled":
                if not candidate.compiles:
                    continue
                forward = torch.compile(candidate.model, dynamic=False)
            key = (candidate.implementation, candidate.attention, mode)
            step, started = step_of(candidate, forward, shape, setting), time.perf_counter()
            try:
                step()
                wait_for(setting.device)
            except Exception as error:  # whatever a compiler can raise; the others can do without
                print(f"{' '.join(key)}: left out, {next(iter(str(error).splitlines()), error)}")
                continue
            works[key] = step
            print(f"{' '.join(key)}: first step {time.perf_counter() - started:.1f} s", flush=True)
    taken = in_turns(works, setting)
    parameters = {each.implementation: parameters_of(each.model) for each in found}
    flops = machine.training_flops(found[0].model.config) * shape.batch_size
    rows = [
        {
            "implementation": implementation,
            "attention": attention,
            "mode": mode,
            "parameters": parameters[implementation],
            "images_per_second": shape.batch_size / statistics.median(seconds),
            "matrix_rate_share": flops / statistics.median(seconds) / rate,
        }
        for (implementation, attention, mode), seconds in taken.items()
    ]
    rows.sort(key=lambda row: -row["images_per_second"])
    return rows, {mode: ratio_to_fastest_peer(taken, mode) for mode in modes}


def ratio_to_fastest_peer(
    taken: dict[tuple[str, str, str], list[float]], mode: str
) -> float | None:
    peers = [times for key, times in taken.items() if key[2] == mode and key[0] != "this code"]
    own = [times for key, times in taken.items() if key[2] == mode and key[0] == "this code"]
    return ratio(min(peers, key=statistics.median), own[0]) if peers and own else None


# ---------------------------------------------------------------------------- input


class Pictures(torch.utils.data.Dataset):
    """Random images as torchvision's CIFAR10 gives them: PIL images through a transform."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[number])), number % 10


def random_dataset(count: int, device: torch.device) -> Dataset:
    """Random pixels in the place of CIFAR-10's training images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(count) % 10).to(device)
    none = split.take(torch.arange(0))
    names = tuple("abcdefghij")
    return Dataset(
        "random", names, CIFAR10_MEAN, CIFAR10_STD, train=split, validation=none, test=none
    )


def time_input(setting: Setting, batch_size: int) -> dict[str, Any]:
    """Times an epoch of flipped, cropped and normalised batches, ours and DataLoader's.

    Returns:
        Images/s of each, and how many times ours is as fast as the fastest DataLoader.
    """
    count = INPUT_IMAGES
    dataset = random_dataset(count, setting.device)
    config = TrainConfig(flip="random", crop_padding=4)
    coins = torch.zeros(count, dtype=torch.bool, device=setting.device)

    def ours() -> None:
        order = batch_rows(dataset.train, batch_size, torch.Generator().manual_seed(0))
        for seed, rows in enumerate(order):
            batch = dataset.train.take(rows)
            images, _ = augment(batch.images, targets_of(batch, 10), config, seed, coins[rows], 0)
            normalise(images, CIFAR10_MEAN, CIFAR10_STD)

    pixels = dataset.train.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD),
        ]
    )

    def epoch_of(loader: DataLoader) -> None:
        for images, labels in loader:
            images.to(setting.device, non_blocking=True)
            labels.to(setting.device, non_blocking=True)

    works: dict[str, Callable[[], None]] = {}
    for workers in (0, torch.get_num_threads()):
        loader = DataLoader(
            Pictures(pixels, transform),
            batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=setting.device.type == "cuda",
        )
        works[f"DataLoader, {workers} workers"] = partial(epoch_of, loader)
    works["this code"] = ours  # last: workers are forked before it has started threads
    taken = in_turns(works, setting)
    own = taken.pop("this code")
    return {
        "images_per_second": {
            name: count / statistics.median(seconds)
            for name, seconds in ({"this code": own} | taken).items()
        },
        "ratio": ratio(min(taken.values(), key=statistics.median), own),
    }


# ---------------------------------------------------------------------------- outside the model


@contextmanager
def run_of(recipe: Recipe, setting: Setting, steps: int) -> Iterator[Run]:
    """A run of a recipe on random images that goes on for ever and saves nothing."""
    epochs = 1_000_000
    config = dataclasses.replace(recipe.train, epochs=epochs, warmup_epochs=1)
    torch.manual_seed(0)
    model = ViT(recipe.model).to(setting.device)
    with ExitStack() as held:
        yield Run(
            folder=Path(),
            recipe="",
            config=config,
            dataset=random_dataset(steps * config.batch_size, setting.device),
            device=setting.device,
            precision=setting.precision,
            model=model,
            averaged=copy.deepcopy(model).requires_grad_(False) if config.averaging else None,
            optimizers=make_optimizers(model, config, setting.precision),
            job=Job(ALONE, StopSignals(), held),
            save_minutes=float("inf"),
            history=[],
            seconds={"compile": 0.0, "total": 0.0},
        )


def forward_of(run: Run, mode: str) -> Forward:
    """The model of a run, for training: "eager" or "compiled"."""
    run.model.train()
    if mode == "eager":
        return run.parallel
    return compile_model(run.parallel, example_of(run), run.precision)


def time_outside(recipe: Recipe, mode: str, setting: Setting, steps: int = 8) -> dict[str, float]:
    """Times whole epochs of `train_epoch` and, in turn, their forward and backward passes alone.

    Returns:
        Seconds a step of each, the share of the step that is neither, and what the input and the
        optimizers take of it.
    """
    with run_of(recipe, setting, steps) as run:
        batch = run.dataset.train.take(torch.arange(run.config.batch_size, device=setting.device))
        targets = targets_of(batch, 10)
        forward = forward_of(run, mode)

        def epoch() -> None:
            run.end_epoch(train_epoch(run, forward))

        def passes() -> None:
            for _ in range(steps):
                add_gradients(run, forward, batch.images, targets)
                for optimizer in run.optimizers:
                    optimizer.zero_grad()

        def inputs() -> None:
            for rows in batch_rows(run.dataset.train, run.config.batch_size):
                part = run.dataset.train.take(rows)
                augment(part.images, targets_of(part, 10), run.config, 0, run.coins[rows], 0)

        add_gradients(run, forward, batch.images, targets)
        gradients = {weight: weight.grad for weight in run.model.parameters()}

        def optimizers() -> None:
            for weight, gradient in gradients.items():
                weight.grad = gradient
            for _ in range(steps):
                for optimizer in run.optimizers:
                    optimizer.step()
            run.model.zero_grad()

        works = {"step": epoch, "passes": passes, "input": inputs, "optimizers": optimizers}
        taken = in_turns(works, setting)
    return {
        "seconds_per_step": statistics.median(taken["step"]) / steps,
        "outside_share": 1 - ratio(taken["passes"], taken["step"]),
        "input_share": ratio(taken["input"], taken["step"]),
        "optimizers_share": ratio(taken["optimizers"], taken["step"]),
    }


# ---------------------------------------------------------------------------- growth

GROWTH = {  # of each size the values to measure, as multiples of the recipe's
    "batch_size": (0.25, 0.5, 1, 2),
    "width": (0.5, 1, 2, 3),
    "depth": (0.5, 1, 2, 3),
    "image_size": (0.5, 1, 2, 3),
}


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Memory that a forward pass keeps for the backward pass, the weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would be part of a cycle, which is not freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # alive until all is counted, and with it what it keeps
    del output
    return sum(kept.values())


def measure_growth(base: Shape, setting: Setting) -> list[dict[str, Any]]:
    """Times this code's eager step, one size changed at a time, and counts what it keeps."""
    rows: list[dict[str, Any]] = []
    works = {}
    for size, multiples in GROWTH.items():
        for multiple in multiples:
            value = max(1, round(multiple * getattr(base, size)))
            shape = base._replace(**{size: value})
            candidate = next(of_this_code(shape))
            candidate.model.to(setting.device).train()
            step = step_of(candidate, candidate.model, shape, setting)
            images = torch.randn(
                *(shape.batch_size, 3, shape.image_size, shape.image_size), device=setting.device
            )

            def forward(model: nn.Module = candidate.model, images: Tensor = images) -> Tensor:
                with autocast(setting.precision, setting.device):
                    return model(images)

            try:
                kept = kept_bytes(candidate.model, forward)
                step()
            except torch.OutOfMemoryError:
                print(f"{size} {value} does not fit into the device's memory")
                continue
            rows.append({"size": size, "value": value, "kept_bytes": kept})
            works[size, value] = step
    taken = in_turns(works, setting)
    for row in rows:
        row["seconds"] = statistics.median(taken[row["size"], row["value"]])
    return rows


# ---------------------------------------------------------------------------- what is shown


def draw(result: dict[str, Any]) -> Figure:
    """Bars of the training step, and below them how time and memory grow."""
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    rows = result["train_step"][::-1]
    axes = top.subplots()
    names = [
        f"{row['implementation']}, {row['mode']}"
        + f", {row['attention']} attention" * (row["attention"] != "own")
        for row in rows
    ]
    colours = ["C1" if row["implementation"] == "this code" else "C0" for row in rows]
    bars = axes.barh(names, [row["images_per_second"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("training step, images/s")
    axes.set_title(f"{result['device_name']}, {result['precision']}, {result['shape']}", fontsize=9)
    for column, size in enumerate(GROWTH):
        rows = [row for row in result["growth"] if row["size"] == size]
        values = [row["value"] for row in rows]
        for line, (name, scale, unit) in enumerate(
            (("seconds", 1e3, "step, ms"), ("kept_bytes", 1e-6, "kept for backward, MB"))
        ):
            axes = bottom.add_subplot(2, len(GROWTH), line * len(GROWTH) + column + 1)
            axes.loglog(values, [scale * row[name] for row in rows], "o-", color=f"C{2 + line}")
            axes.set_xticks(values, [str(value) for value in values])
            ends = [scale * rows[at][name] for at in (0, -1)]
            axes.set_yticks(ends, [f"{end:,.0f}" for end in ends])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.set_xlabel(size.replace("_", " ") if line else "")
            axes.set_ylabel("" if column else unit)
    return figure


def show(result: dict[str, Any]) -> None:
    """The tables on the terminal."""
    print(f"\n{result['device_name']}, {result['precision']}, torch {result['torch']}")
    print(f"matrix products: {result['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s\n")
    print(f"training step, {result['shape']}")
    print(f"{'':26}{'attention':11}{'mode':10}{'images/s':>9}{'of matrix rate':>16}")
    for row in result["train_step"]:
        print(
            f"{row['implementation']:26}{row['attention']:11}{row['mode']:10}"
            f"{row['images_per_second']:9,.0f}{row['matrix_rate_share']:16.0%}"
        )
    for mode, value in result["ratio_to_fastest_peer"].items():
        shown = "not measured" if value is None else f"{value:.2f}"
        print(f"this code to the fastest peer, {mode}: {shown}")
    print("\ninput, flip and crop")
    for name, value in result["input"]["images_per_second"].items():
        print(f"{name:26}{value:12,.0f} images/s")
    print(f"this code to the fastest DataLoader: {result['input_ratio']:.1f}")
    outside = result["outside"]
    print(f"\na step of recipe {result['recipe']}: {1e3 * outside['seconds_per_step']:.1f} ms")
    print(
        f"outside forward and backward {outside['outside_share']:.1%}: optimizers "
        f"{outside['optimizers_share']:.1%}, input {outside['input_share']:.1%}, and the rest"
    )
    print(f"\n{'growth':14}{'':>6}{'step':>12}{'kept for backward':>20}")
    for row in result["growth"]:
        kept = f"{row['kept_bytes'] / 1e6:,.0f} MB"
        print(f"{row['size']:14}{row['value']:6}{1e3 * row['seconds']:9,.1f} ms{kept:>20}")


def measure(name: str, modes: list[str], setting: Setting) -> dict[str, Any]:
    """All four parts, in the shape of the recipe of that name."""
    recipe = RECIPES[name]
    shape = Shape.of(recipe)
    inputs = time_input(setting, shape.batch_size)
    rate = machine.matrix_rate(setting.device, setting.precision)
    steps, ratios = time_steps(shape, modes, setting, rate)
    outside = time_outside(recipe, modes[-1], setting)
    return {
        "recipe": name,
        "device_name": machine.device_name(setting.device),
        "precision": setting.precision,
        "torch": str(torch.__version__),
        "rounds": setting.rounds,
        "shape": ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in shape._asdict().items()
        ),
        "matrix_flops_per_second": rate,
        "train_step": steps,
        "ratio_to_fastest_peer": ratios,
        "input": inputs,
        "input_ratio": inputs["ratio"],
        "outside": outside,
        "outside_share": outside["outside_share"],
        "growth": measure_growth(shape, setting._replace(rounds=-(-setting.rounds // 3))),
    }


def main(argv: list[str]) -> int:
    parser = utils.Parser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", choices=RECIPES, help="whose shape (cpu, or the default)")
    parser.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--mode", choices=("eager", "compiled"), help="one of them (both)")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each (11)")
    out = utils.ROOT / "checkpoints/benchmark/benchmark.json"
    parser.add_argument("--json", type=Path, default=out, metavar="FILE", help="where to write")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {arguments.rounds}")
    if arguments.json.suffix != ".json":
        parser.error(f"--json {arguments.json} must end in .json; the plot goes beside it")
    modes = [arguments.mode] if arguments.mode else ["eager", "compiled"]
    try:
        device = machine.choose_device(arguments.device)
        precision = machine.resolve_precision(arguments.precision, device)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.json.parent):
            pass  # better to learn here than after minutes that nothing can be written
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write {arguments.json}: {error.strerror or error}")
    recipe = arguments.recipe or ("cpu" if device.type == "cpu" else DEFAULT_RECIPE)
    machine.keep_freed_memory()
    warnings.filterwarnings("ignore", module="torch|timm|transformers")
    result = measure(recipe, modes, Setting(device, precision, arguments.rounds))
    show(result)
    plot = arguments.json.with_suffix(".png")
    utils.write_json(arguments.json, result)
    utils.write_figure(plot, draw(result))
    print(f"\nwrote {arguments.json} and {plot.name}")
    return 0


if __name__ == "__main__":
    utils.run_program(main)
