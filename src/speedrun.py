"""How close a plain ViT gets to 94% on CIFAR-10 in a minute: the whole measurement, for one GPU.

    python src/speedrun.py                 all of it, to results/speed94/
    python src/speedrun.py throughput      one part of it
    python src/speedrun.py --seconds 90 --out DIR      for another time, or for another GPU
    python src/speedrun.py --dry-run       all of it in small, on the drawn data set, on any device

    throughput   images/s of training steps of widths, depths and batches, eager and compiled, and
                 the share of the device's matrix rate that they come to
    profile      which operations the time of the recipe's training steps goes to
    epochs       as many epochs of the recipe as fit into the time, from a short run; what follows
                 trains for so many, or for the recipe's own where this part was left out
    curve        one run that holds validation images out: accuracy against seconds
    seeds        the recipe on all training images, each seed tested once
    plot         what there is of curve and seeds, beside published points

Seconds are from the first training step to the end of the evaluation; importing, loading and
compiling are told apart. What is there already is not measured again. The search for the recipe is
`python src/ablation.py speed94`. Not yet run on a GPU.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

import machine
import utils
from ablation import STUDIES, kept_result, results_of, train_and_keep
from benchmark import Setting, forward_of, run_of, seconds_of
from recipes import RECIPES, Recipe
from trainer import add_gradients, targets_of, train_epoch
from utils import UsageError


class Plan(NamedTuple):
    """What is measured."""

    recipe: str
    flags: list[str]  # of every run of the trainer, besides
    seeds: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    seconds: float  # from the first training step to the end of the evaluation
    folder: Path


HEAD = 64  # numbers a head, in the throughput's models
MARGIN = 0.98  # of the seconds are planned, as no two runs take the same
ROUNDS = 5  # of the throughput, of three steps each
THE_PLAN = Plan(
    recipe="speed94",
    flags=[],
    seeds=5,
    widths=(256, 384, 512),
    depths=(6, 8, 12),
    batches=(512, 1024, 2048),
    seconds=60,
    folder=utils.ROOT / "results/speed94",
)
DRY_PLAN = Plan(
    recipe="demo",
    flags="--epochs 2 --patch-size 8 --width 64 --depth 1 --heads 1 --compile off".split(),
    seeds=2,
    widths=(64,),
    depths=(1, 2),
    batches=(50, 100),
    seconds=5,
    folder=utils.ROOT / "checkpoints/speedrun",
)


class Published(NamedTuple):
    """What others state, as their README had it."""

    kind: str  # "CNN" or "ViT"
    what: str
    accuracy: float  # percent, on the test images
    seconds: float
    hardware: str
    source: str
    petaflops: float | None = None  # 1e15 operations of the whole training
    shift: tuple[int, int] = (6, 0)  # of its name in the plot, in points


_AIRBENCH = "github.com/KellerJordan/cifar10-airbench"
_HLB = "github.com/tysam-code/hlb-CIFAR10"
_HIVERGE = "github.com/hiverge/cifar10-speedrun"
_COLOSSAL = "github.com/hpcaitech/ColossalAI, benchmark"
_VIT_CIFAR = "github.com/omihub777/ViT-CIFAR"
PUBLISHED = (
    Published("CNN", "Hiverge", 94.01, 2.095, "A100", _HIVERGE, shift=(-14, 9)),
    Published("CNN", "airbench94 (spectral)", 94.05, 2.67, "A100", _AIRBENCH, 0.29, (-8, -20)),
    Published("CNN", "hlb-CIFAR10", 94.0, 6.3, "A100", _HLB, shift=(4, -9)),
    Published("CNN", "airbench95", 95.01, 10.4, "A100", _AIRBENCH, 1.4),
    Published("CNN", "airbench96", 96.0, 27.3, "A100", _AIRBENCH, 3.1),
    Published("CNN", "ResNet-18", 96.0, 420, "A100", _AIRBENCH, 32.3),
    Published("ViT", "ViT-Lite-7/4", 90.5, 960, "8 A100", _COLOSSAL, shift=(-8, 10)),
    Published("ViT", "ViT-CIFAR", 90.92, 8062, "V100", _VIT_CIFAR),
)
A_MINUTE = 60 * 989e12  # operations of an H100 or H200 at their specified rate, dense bfloat16


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------- training steps


def training_step(recipe: Recipe, mode: str, setting: Setting) -> Callable[[], None]:
    """One training step of a recipe, its input aside, as `train_epoch` does it."""
    with run_of(recipe, setting, steps=1) as run:
        batch, forward = run.dataset.train, forward_of(run, mode)
        targets = targets_of(batch, len(run.dataset.classes))

    def step() -> None:
        add_gradients(run, forward, batch.images, targets)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def throughput(plan: Plan, setting: Setting) -> None:
    """throughput.csv, a row at a time, so that a run that is stopped goes on where it was."""
    path = plan.folder / "throughput.csv"
    rows = rows_of(path) if path.exists() else []
    there = {tuple(row[key] for key in ("width", "depth", "batch", "mode")) for row in rows}
    rate = machine.matrix_rate(setting.device, setting.precision)
    recipe = RECIPES[plan.recipe]
    for width, depth, batch, mode in itertools.product(
        plan.widths, plan.depths, plan.batches, ("eager", "compiled")
    ):
        if (str(width), str(depth), str(batch), mode) in there:
            continue
        size = {"width": width, "depth": depth, "heads": width // HEAD}
        model = dataclasses.replace(recipe.model, **size)
        train = dataclasses.replace(recipe.train, batch_size=batch, whole_epochs=0)
        row: dict[str, Any] = {"width": width, "depth": depth, "batch": batch, "mode": mode}
        try:
            torch.compiler.reset()  # which compiles but a few models of one class in a process
            step = training_step(Recipe("", model, train), mode, setting)
            step()
            taken = [seconds_of(step, 3, setting.device) for _ in range(setting.rounds)]
        except torch.OutOfMemoryError:
            print(f"width {width}, depth {depth}, batch {batch}, {mode}: out of memory")
            continue
        images = batch / statistics.median(taken)
        flops = machine.training_flops(model, train.patch_dropout)
        row |= {"images_per_second": round(images), "share": round(images * flops / rate, 3)}
        rows.append(row)
        utils.write_table(path, row, rows)
        print(
            f"width {width:4}, depth {depth:3}, batch {batch:5}, {mode:9}{images:11,.0f} images/s,"
            f" {row['share']:.0%} of the matrix rate",
            flush=True,
        )


def profile_steps(plan: Plan, setting: Setting) -> None:
    """profile.txt: the operations of ten training steps by the time they take themselves."""
    on_gpu = setting.device.type == "cuda"
    recipe = RECIPES[plan.recipe]
    with run_of(recipe, setting, steps=10) as run:
        forward = forward_of(run, "compiled" if on_gpu else "eager")
        run.end_epoch(train_epoch(run, forward))  # warms up
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        with profile(activities=activities) as profiler:
            train_epoch(run, forward)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    text = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
    head = f"{plan.recipe}, 10 steps, {machine.device_name(setting.device)}, {setting.precision}, "
    utils.write_whole(
        plan.folder / "profile.txt", f"{head}torch {torch.__version__}\n{text}".encode()
    )
    print("\n".join(text.splitlines()[:14]))


# ---------------------------------------------------------------------------- runs


def train(plan: Plan, name: str, flags: list[str], setting: Setting) -> dict[str, Any]:
    """The result.json of a run, made now unless it is there."""
    # Saving after each epoch would take a part of the minute.
    flags = ["--recipe", plan.recipe, *plan.flags, *flags, "--save-epochs", "100000"]
    flags += ["--device", str(setting.device)]
    kept = plan.folder / name
    return kept_result(kept, flags) or train_and_keep(flags, kept, {})


def epochs(plan: Plan, setting: Setting) -> None:
    """epochs.json: how many epochs fit into the plan's seconds, and from what that follows."""
    path = plan.folder / "epochs.json"
    if path.exists() and (other := json.loads(path.read_text())["seconds"]) != plan.seconds:
        raise UsageError(
            f"{plan.folder} is of runs of {other:g} s, not {plan.seconds:g}; name another by --out"
        )
    # Without warm-up, which is told in epochs and may be longer than this run.
    short = "--epochs 4 --warmup-epochs 0 --whole-epochs 1 --validation-images 0".split()
    result = train(plan, "short", short, setting)
    taken = [float(row["seconds"]) for row in rows_of(plan.folder / "short/metrics.csv")]
    rest = result["seconds"]["first_step_to_end"] - sum(taken)
    epoch, whole = statistics.median(taken[:-1]), taken[-1]
    at_the_end = RECIPES[plan.recipe].train.whole_epochs
    fit = int((MARGIN * plan.seconds - rest - at_the_end * whole) / epoch) + at_the_end
    if fit < 1:
        raise UsageError(f"no epoch fits into {plan.seconds:g} s; one takes {epoch:.1f} s")
    found = {"seconds": plan.seconds, "epochs": fit, "epoch": epoch, "whole_epoch": whole}
    utils.write_json(path, found | {"rest": rest})
    print(
        f"{fit} epochs fit into {plan.seconds:g} s: {epoch:.2f} s each, {whole:.2f} s with all "
        f"patches, {rest:.2f} s saving and evaluating"
    )


def fitting(plan: Plan) -> list[str]:
    """The trainer's flag for as many epochs as fit; none where that was not measured."""
    path = plan.folder / "epochs.json"
    return ["--epochs", str(json.loads(path.read_text())["epochs"])] if path.exists() else []


def curve(plan: Plan, setting: Setting) -> None:
    flags = [*fitting(plan), "--no-test", "--validate-every", "5"]
    result = train(plan, "curve", flags, setting)
    print(f"validation accuracy {result['validation_accuracy']:.2%}, {told(result)}")


def seeds(plan: Plan, setting: Setting) -> None:
    """Trains and tests every seed, and writes summary.json."""
    results = []
    for seed in range(plan.seeds):
        flags = [*fitting(plan), "--seed", str(seed), "--validation-images", "0"]
        results.append(train(plan, f"seed{seed}", flags, setting))
        print(f"seed {seed}: test accuracy {results[-1]['test_accuracy']:.2%}, {told(results[-1])}")
    accuracies = [result["test_accuracy"] for result in results]
    seconds = [result["seconds"]["first_step_to_end"] for result in results]
    summary = {
        "recipe": plan.recipe,
        "epochs": results[0]["epochs"],
        "device_name": results[0]["device_name"],
        "torch": results[0]["torch"],
        "seeds": len(results),
        "test_accuracy": accuracies,
        "mean": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies),
        "first_step_to_end": seconds,
    }
    utils.write_json(plan.folder / "summary.json", summary)
    print(
        f"{plan.recipe}: {summary['mean']:.2%} ± {100 * summary['deviation']:.2f} over "
        f"{len(results)} seeds in {statistics.mean(seconds):.1f} s"
    )


def told(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    measured = seconds["first_step_to_end"]
    loading = seconds["total"] - measured - seconds["compile"]
    return (
        f"{measured:.1f} s from the first step to the end; besides, {seconds['compile']:.1f} s "
        f"compiling, {loading:.1f} s importing and loading"
    )


# ---------------------------------------------------------------------------- the plot


def plot(plan: Plan, setting: Setting) -> None:
    utils.write_figure(plan.folder / "accuracy.png", draw(plan))
    print(f"wrote {plan.folder / 'accuracy.png'}")


def draw(plan: Plan) -> Figure:
    """Accuracy against seconds and operations: what was measured here, and what others state."""
    figure = Figure(figsize=(12, 4.5), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    draw_measured(left, right, plan)
    draw_published(left, [(p.seconds, f"{p.what}, {p.hardware}", p) for p in PUBLISHED])
    counted = [(1e15 * p.petaflops, p.what, p) for p in PUBLISHED if p.petaflops]
    draw_published(right, counted)
    minute = {"color": "0.93", "label": "a minute of an H200, at 20 to 40% of its rate"}
    right.axvspan(0.2 * A_MINUTE, 0.4 * A_MINUTE, **minute)
    left.set(xlabel="seconds of training", ylabel="accuracy (%)", xlim=(1, 1e5), ylim=(65, 98))
    right.set(xlabel="floating-point operations of the training", xlim=(1e13, 1e17))
    for axes in (left, right):
        axes.axhline(94, color="0.7", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=7, loc="center left")
    right.legend(frameon=False, fontsize=7, loc=(0.26, 0.03))
    return figure


def draw_measured(left: Axes, right: Axes, plan: Plan) -> None:
    """Draws this code's runs: against seconds on the left, against operations on the right."""
    elsewhere = [utils.ROOT / "results" / name for name in ("cpu", "shipped")]
    for folder in (plan.folder / "curve", *elsewhere):
        if (folder / "metrics.csv").exists():
            result = json.loads((folder / "result.json").read_text())
            recipe, accuracy = result["recipe"], 100 * result["validation_accuracy"]
            label = f"{recipe}, {result['device_name']} (validation)"
            left.plot(*curve_of(folder / "metrics.csv"), ".-", label=label)
            right.plot(operations_of(result), accuracy, "o", label=f"{recipe} (validation)")
    for folder in sorted(plan.folder.glob("seed*")):
        result = json.loads((folder / "result.json").read_text())
        seconds, accuracy = result["seconds"]["first_step_to_end"], 100 * result["test_accuracy"]
        label = f"{plan.recipe}, a seed (test)" if folder.name == "seed0" else None
        left.plot(seconds, accuracy, "k*", label=label)
        right.plot(operations_of(result), accuracy, "k*", label=label)
    for name, colour in (("shape", "k"), ("size", "tab:green")):
        study = STUDIES[name]
        runs = [run for change in study.changes for run in results_of(study, change)]
        points = [(operations_of(run), 100 * run["validation_accuracy"]) for run in runs]
        if points:
            style = {"color": colour, "ms": 3, "label": f"{name} study, a seed (validation)"}
            right.plot(*zip(*points, strict=True), ".", **style)


def draw_published(axes: Axes, points: list[tuple[float, str, Published]]) -> None:
    """Draws published accuracies: where along the axis, under which name, and what is stated."""
    for kind, marker in (("CNN", "o"), ("ViT", "s")):
        of_kind = [(x, point.accuracy) for x, _, point in points if point.kind == kind]
        if of_kind:
            style = {"color": "0.45", "ms": 5, "label": f"published, {kind} (test)"}
            axes.plot(*zip(*of_kind, strict=True), marker, **style)
    for x, name, point in points:
        style = {"textcoords": "offset points", "fontsize": 7, "va": "center"}
        axes.annotate(name, (x, point.accuracy), point.shift, **style)


def operations_of(result: dict[str, Any]) -> float:
    """Floating-point operations of a run's training, from the rate that its result.json states."""
    rate = result["matrix_flops_per_second"] * result["matrix_rate_share"]
    return rate * result["seconds"]["training"]


def curve_of(path: Path) -> tuple[list[float], list[float]]:
    """Seconds of training, and the validation accuracy in percent that they led to."""
    seconds, points = 0.0, []
    for row in rows_of(path):
        seconds += float(row["seconds"])
        if row["validation_accuracy"]:
            points.append((seconds, 100 * float(row["validation_accuracy"])))
    return tuple(map(list, zip(*points, strict=True)))


# ---------------------------------------------------------------------------- command line

PARTS: dict[str, Callable[[Plan, Setting], None]] = {
    "throughput": throughput,
    "profile": profile_steps,
    "epochs": epochs,
    "curve": curve,
    "seeds": seeds,
    "plot": plot,
}


def main(argv: list[str]) -> int:
    parser = utils.Parser(
        prog="speedrun.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all", help="(all)")
    parser.add_argument("--dry-run", action="store_true", help="in small, on the drawn data set")
    parser.add_argument("--seconds", type=float, help=f"of a run ({THE_PLAN.seconds})")
    parser.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(results/speed94/)")
    arguments = parser.parse_args(argv)
    plan = DRY_PLAN if arguments.dry_run else THE_PLAN
    plan = plan._replace(folder=arguments.out or plan.folder)
    if arguments.seconds is not None:
        if not 0 < arguments.seconds < math.inf:
            parser.error(f"--seconds must be above 0, not {arguments.seconds}")
        plan = plan._replace(seconds=arguments.seconds)
    try:
        device = machine.choose_device(arguments.device)
        if device.type != "cuda" and not arguments.dry_run and arguments.part != "plot":
            raise UsageError("the measurement is for a GPU; --dry-run does it in small anywhere")
        setting = Setting(device, machine.resolve_precision("auto", device), ROUNDS)
        for name in PARTS if arguments.part == "all" else [arguments.part]:
            PARTS[name](plan, setting)
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write to {plan.folder}: {error.strerror or error}")
    return 0


if __name__ == "__main__":
    utils.run_program(main)
