"""How close a plain ViT gets to 94% on CIFAR-10 in a minute: the whole measurement, for one GPU.

    python experiments/speedrun.py                all of it, to results/speed94/
    python experiments/speedrun.py throughput     one part of it
    python experiments/speedrun.py --seconds 90 --out DIR     for another time, or another GPU
    python experiments/speedrun.py --dry-run      a small version, on the synthetic data set, on
                                                  any device

    throughput   images/s of training steps of widths, depths and batches, eager and compiled, and
                 the share of the device's matrix rate that this is
    profile      which operations take the time of the recipe's training steps
    epochs       how many epochs of the recipe fit into the time, by a short run; the later parts
                 train for that many, or for the recipe's own where this part was left out
    curve        one run with a validation split: accuracy against seconds
    seeds        the recipe on all training images; each seed is tested once
    plot         the results of curve and seeds, beside published ones

Seconds are from the first training step to the end of the evaluation; importing, loading and
compiling are reported separately. Existing results are not measured again. The search for the
recipe is `python experiments/ablation.py speed94`. Not yet run on a GPU.
"""

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import cli
import device as devices
import utils
from ablation import STUDIES, results_of
from common import (
    Setting,
    forward_of,
    kept_result,
    matrix_rate,
    rows_of,
    run_of,
    seconds_of,
    step_of,
    train_and_keep,
)
from config import UserError
from curves import write_figure
from recipes import RECIPES, Recipe
from run import training_flops
from trainer import train_epoch


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
MARGIN = 0.98  # share of the seconds that is planned, as times vary from run to run
ROUNDS = 5  # of three steps each, in the throughput
THE_PLAN = Plan(
    recipe="speed94",
    flags=[],
    seeds=5,
    widths=(256, 384, 512),
    depths=(6, 8, 12),
    batches=(512, 1024, 2048),
    seconds=60,
    folder=ROOT / "results/speed94",
)
DRY_PLAN = Plan(
    recipe="demo",
    flags="--epochs 2 --patch-size 8 --width 64 --depth 1 --heads 1 --compile off".split(),
    seeds=2,
    widths=(64,),
    depths=(1, 2),
    batches=(50, 100),
    seconds=10,
    folder=ROOT / "checkpoints/speedrun",
)


class Published(NamedTuple):
    """A result of others, as their README states it."""

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


# ---------------------------------------------------------------------------- training steps


def throughput(plan: Plan, setting: Setting) -> None:
    """Writes throughput.csv, a row at a time, so that an interrupted measurement can resume."""
    path = plan.folder / "throughput.csv"
    rows = rows_of(path) if path.exists() else []
    measured = {tuple(row[key] for key in ("width", "depth", "batch", "mode")) for row in rows}
    rate = matrix_rate(setting.device, setting.precision)
    recipe = RECIPES[plan.recipe]
    for width, depth, batch, mode in itertools.product(
        plan.widths, plan.depths, plan.batches, ("eager", "compiled")
    ):
        if (str(width), str(depth), str(batch), mode) in measured:
            continue
        model = dataclasses.replace(recipe.model, width=width, depth=depth, heads=width // HEAD)
        train = dataclasses.replace(recipe.train, batch_size=batch, whole_epochs=0)
        row: dict[str, Any] = {"width": width, "depth": depth, "batch": batch, "mode": mode}
        try:
            torch.compiler.reset()  # it compiles only a few models of one class in a process
            run = run_of(Recipe("", model, train), setting, steps=1)
            step = step_of(run, forward_of(run, mode))
            step()
            taken = [seconds_of(step, 3, setting.device) for _ in range(setting.rounds)]
        except torch.OutOfMemoryError:
            print(f"width {width}, depth {depth}, batch {batch}, {mode}: out of memory")
            continue
        images = batch / statistics.median(taken)
        flops = training_flops(model, train.patch_dropout)
        row |= {"images_per_second": round(images), "share": round(images * flops / rate, 3)}
        rows.append(row)
        utils.write_table(path, row, rows)
        print(
            f"width {width:4}, depth {depth:3}, batch {batch:5}, {mode:9}{images:11,.0f} images/s,"
            f" {row['share']:.0%} of the matrix rate",
            flush=True,
        )


def profile_steps(plan: Plan, setting: Setting) -> None:
    """Writes profile.txt: the operations of ten training steps, sorted by their own time."""
    on_gpu = setting.device.type == "cuda"
    recipe = RECIPES[plan.recipe]
    run, dropped = run_of(recipe, setting, steps=10), recipe.train.patch_dropout
    forward = forward_of(run, "compiled" if on_gpu else "eager")
    run.end_epoch(train_epoch(run, forward, dropped))  # a warm-up
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        train_epoch(run, forward, dropped)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    text = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
    name, version = devices.device_name(setting.device), torch.__version__
    head = f"{plan.recipe}, 10 steps, {name}, {setting.precision}, torch {version}\n"
    utils.write_whole(plan.folder / "profile.txt", (head + text).encode())
    print("\n".join(text.splitlines()[:14]))


# ---------------------------------------------------------------------------- runs


def train(plan: Plan, name: str, flags: list[str], setting: Setting) -> dict[str, Any]:
    """The result.json of a run, which is trained now unless it exists."""
    # Saving after each epoch would take a part of the minute.
    flags = ["--recipe", plan.recipe, *plan.flags, *flags, "--save-minutes", "1e6"]
    flags += ["--device", str(setting.device)]
    kept = plan.folder / name
    return kept_result(kept, flags) or train_and_keep(flags, kept, {})


def epochs(plan: Plan, setting: Setting) -> None:
    """Writes epochs.json: how many epochs fit into the plan's seconds, and the times behind it."""
    path = plan.folder / "epochs.json"
    if path.exists() and (other := json.loads(path.read_text())["seconds"]) != plan.seconds:
        raise UserError(
            f"{plan.folder} has runs of {other:g} s, not {plan.seconds:g}; choose another --out"
        )
    # Without warm-up, whose epochs may be more than this run has.
    short = "--epochs 4 --warmup-epochs 0 --whole-epochs 1 --validation-images 0".split()
    result = train(plan, "short", short, setting)
    taken = [float(row["seconds"]) for row in rows_of(plan.folder / "short/metrics.csv")]
    rest = result["seconds"]["first_step_to_end"] - sum(taken)
    epoch, whole = statistics.median(taken[:-1]), taken[-1]
    at_the_end = RECIPES[plan.recipe].train.whole_epochs
    fit = int((MARGIN * plan.seconds - rest - at_the_end * whole) / epoch) + at_the_end
    if fit < 1:
        raise UserError(f"no epoch fits into {plan.seconds:g} s; one takes {epoch:.1f} s")
    found = {"seconds": plan.seconds, "epochs": fit, "epoch": epoch, "whole_epoch": whole}
    utils.write_json(path, found | {"rest": rest})
    print(
        f"{fit} epochs fit into {plan.seconds:g} s: {epoch:.2f} s each, {whole:.2f} s with all "
        f"patches, {rest:.2f} s saving and evaluating"
    )


def fitting(plan: Plan) -> list[str]:
    """The trainer's flag for the epochs that fit; none where that was not measured."""
    path = plan.folder / "epochs.json"
    return ["--epochs", str(json.loads(path.read_text())["epochs"])] if path.exists() else []


def curve(plan: Plan, setting: Setting) -> None:
    flags = [*fitting(plan), "--no-test", "--validate-every", "5"]
    result = train(plan, "curve", flags, setting)
    print(f"validation accuracy {result['validation_accuracy']:.2%}, {times_of(result)}")


def seeds(plan: Plan, setting: Setting) -> None:
    """Trains and tests every seed, and writes summary.json."""
    results = []
    for seed in range(plan.seeds):
        flags = [*fitting(plan), "--seed", str(seed), "--validation-images", "0"]
        results.append(result := train(plan, f"seed{seed}", flags, setting))
        print(f"seed {seed}: test accuracy {result['test_accuracy']:.2%}, {times_of(result)}")
    accuracies = [result["test_accuracy"] for result in results]
    seconds = [result["seconds"]["first_step_to_end"] for result in results]
    same = {key: results[0][key] for key in ("recipe", "epochs", "device_name", "torch")}
    summary = same | {
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


def times_of(result: dict[str, Any]) -> str:
    times = result["seconds"]
    return (
        f"{times['first_step_to_end']:.1f} s from the first step to the end; "
        f"{times['compile']:.1f} s of compiling, {times['total']:.1f} s in all"
    )


# ---------------------------------------------------------------------------- the plot


def plot(plan: Plan, setting: Setting) -> None:
    write_figure(plan.folder / "accuracy.png", draw(plan))
    print(f"wrote {plan.folder / 'accuracy.png'}")


def draw(plan: Plan) -> Figure:
    """Accuracy against seconds and operations, of this code and as published for others."""
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
    """Draws the runs of this code, against seconds on the left and operations on the right."""
    elsewhere = [ROOT / "results" / name for name in ("cpu", "shipped")]
    for folder in (plan.folder / "curve", *elsewhere):
        if (folder / "metrics.csv").exists():
            result = json.loads((folder / "result.json").read_text())
            recipe, accuracy = result["recipe"], 100 * result["validation_accuracy"]
            label = f"{recipe}, {result['device_name']} (validation)"
            left.plot(*curve_of(folder / "metrics.csv"), ".-", label=label)
            right.plot(result["training_flops"], accuracy, "o", label=f"{recipe} (validation)")
    for folder in sorted(plan.folder.glob("seed*")):
        result = json.loads((folder / "result.json").read_text())
        seconds, accuracy = result["seconds"]["first_step_to_end"], 100 * result["test_accuracy"]
        label = f"{plan.recipe}, a seed (test)" if folder.name == "seed0" else None
        left.plot(seconds, accuracy, "k*", label=label)
        right.plot(result["training_flops"], accuracy, "k*", label=label)
    for name, color in (("shape", "k"), ("size", "tab:green")):
        study = STUDIES[name]
        runs = [run for change in study.changes for run in results_of(study, change)]
        points = [(run["training_flops"], 100 * run["validation_accuracy"]) for run in runs]
        if points:
            style = {"color": color, "ms": 3, "label": f"{name} study, a seed (validation)"}
            right.plot(*zip(*points, strict=True), ".", **style)


def draw_published(axes: Axes, points: list[tuple[float, str, Published]]) -> None:
    """Draws published accuracies, each with its place along the axis and its name there."""
    for kind, marker in (("CNN", "o"), ("ViT", "s")):
        of_kind = [(x, point.accuracy) for x, _, point in points if point.kind == kind]
        if of_kind:
            style = {"color": "0.45", "ms": 5, "label": f"published, {kind} (test)"}
            axes.plot(*zip(*of_kind, strict=True), marker, **style)
    for x, name, point in points:
        style = {"textcoords": "offset points", "fontsize": 7, "va": "center"}
        axes.annotate(name, (x, point.accuracy), point.shift, **style)


def curve_of(path: Path) -> tuple[list[float], list[float]]:
    """Seconds of training at each validation, and its accuracy in percent."""
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
    parser = cli.Parser(prog="speedrun.py", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all", help="(all)")
    parser.add_argument("--dry-run", action="store_true", help="a small version, on synthetic data")
    parser.add_argument("--seconds", type=float, help=f"of a run ({THE_PLAN.seconds})")
    parser.add_argument("--device", help="cuda, mps or cpu (the best available)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(results/speed94/)")
    arguments = parser.parse_args(argv)
    plan = DRY_PLAN if arguments.dry_run else THE_PLAN
    plan = plan._replace(folder=arguments.out or plan.folder)
    if arguments.seconds is not None:
        if not 0 < arguments.seconds < math.inf:
            parser.error(f"--seconds must be above 0, not {arguments.seconds}")
        plan = plan._replace(seconds=arguments.seconds)
    setting = Setting.of(arguments.device, "auto", ROUNDS)
    if setting.device.type != "cuda" and not arguments.dry_run and arguments.part != "plot":
        raise UserError("this measurement needs a GPU; --dry-run runs a small version anywhere")
    try:
        for name in PARTS if arguments.part == "all" else [arguments.part]:
            PARTS[name](plan, setting)
    except OSError as error:
        raise UserError(f"cannot write to {plan.folder}: {error.strerror or error}") from error
    return 0


if __name__ == "__main__":
    cli.run_program(main)
