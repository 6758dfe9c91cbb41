"""Measures the recipes for a GPU in half an hour, and writes a report to paste into an issue.

    python experiments/speedrun.py              all parts below but `best`
    python experiments/speedrun.py best         one part
    python experiments/speedrun.py --dry-run    small, on the synthetic data set, on any device

    default      the default recipe, to its end
    throughput   training steps of the recipes: images/s, and their share of the best rate at which
                 this device multiplies matrices; with each attention kernel, with CUDA graphs
    curve        speed94 with a validation split: accuracy against seconds
    seeds        speed94 on all training images, for as many epochs as fit into a minute,
                 judging by `curve`; each seed is tested once
    baseline     the paper's choices
    best         the recipe for the best accuracy
    report       a summary of what has been measured so far

A call ends after --minutes, and the next one continues: what is in --out is not measured again
unless the flags differ, and a stopped run is resumed. A failed part does not end the others.
The output and the model of each run are kept too. Seconds are from the first training step to
the end of the evaluation, without importing, loading and compiling. Not yet run on a GPU.
"""

import json
import math
import re
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import common
import utils
from common import Setting, kept_result, rows_of, seconds_of, train_and_keep
from config import Parser
from recipes import RECIPES, Recipe
from run import training_flops
from utils import UserError, complain, first_line, run_program


class Plan(NamedTuple):
    """What is measured."""

    folder: Path
    steps: dict[str, tuple[str, ...]]  # for each recipe, the modes in which its steps are timed
    flags: dict[str, str]  # of each run of the trainer, by its part
    seconds: float = 60  # for each seed
    seeds: int = 5
    where: tuple[str, ...] = ()  # flags that say where the data set is
    ends: float = math.inf  # on the clock of `time.monotonic`

    def left(self) -> float:
        return self.ends - time.monotonic()  # seconds


KERNELS = ("flash", "efficient", "cudnn")  # of fused attention
MODES = ("compiled", "eager", "graphs", *KERNELS, "plain")  # the most useful first
THE_PLAN = Plan(
    folder=ROOT / "results/gpu",
    steps={"default": MODES, "speed94": MODES[:3], "best": MODES},
    flags={
        "default": "--recipe default",
        "curve": "--recipe speed94 --no-test --save-minutes 60",
        "seeds": "--recipe speed94 --validation-images 0 --save-minutes 60",
        "baseline": "--recipe baseline",
        "best": "--recipe best",
    },
)
_DRY = "--recipe demo --epochs 2 --patch-size 16 --width 16 --depth 1 --heads 1 --batch-size 500"
DRY_PLAN = Plan(
    folder=ROOT / "checkpoints/speedrun",
    steps={"demo": ("eager", "plain")},
    flags={part: re.sub(r"--recipe \w+", _DRY, flags) for part, flags in THE_PLAN.flags.items()},
    seconds=2,
    seeds=2,
)


# ---------------------------------------------------------------------------- parts


def throughput(plan: Plan, setting: Setting) -> None:
    """Writes throughput.csv, a row at a time."""
    path = plan.folder / "throughput.csv"
    rows = rows_of(path)
    measured = {(row["recipe"], row["mode"]) for row in rows}
    wanted = [(name, mode) for mode in MODES for name in plan.steps if mode in plan.steps[name]]
    missing = [pair for pair in wanted if pair not in measured]
    rate = common.matrix_rate(setting.device, setting.precision) if missing else 0.0
    for name, mode in missing:
        if plan.left() <= 0:
            return
        images = images_per_second(RECIPES[name], mode, setting)
        flops = training_flops(RECIPES[name].model, RECIPES[name].train.patch_dropout)
        row = {"recipe": name, "mode": mode, "images_per_second": images and round(images)}
        row |= {"matrix_rate": f"{rate:.4g}", "share": images and round(images * flops / rate, 3)}
        rows.append(row)
        utils.write_table(path, row, rows)
        print(f"{name}, {mode}: {pace_of(row)}", flush=True)


def images_per_second(recipe: Recipe, mode: str, setting: Setting) -> float | None:
    """The speed of training steps without their input; None if the mode does not work."""
    attention = "fused" if mode in KERNELS else "plain" if mode == "plain" else "auto"
    model = replace(recipe.model, attention=attention)
    train = replace(recipe.train, compile="graphs") if mode == "graphs" else recipe.train
    torch.compiler.reset()  # it compiles only a few models of one class per process
    try:
        kernel = SDPBackend.__members__.get(f"{mode.upper()}_ATTENTION")
        with sdpa_kernel(kernel) if kernel else nullcontext():
            run, state = common.run_of(Recipe("", model, train), setting, steps=1)
            forward = common.forward_of(run, state, "eager" if mode == "eager" else "compiled")
            if mode != "eager" and forward is run.parallel:
                return None  # there is no compiler, as was already printed
            step = common.step_of(run, state, forward)
            seconds_of(step, 3, setting.device)
            taken = [seconds_of(step, 5, setting.device) for _ in range(setting.rounds)]
    except (RuntimeError, UserError) as error:
        print(f"{mode} does not work: {first_line(error)}")
        return None
    return train.batch_size / statistics.median(taken)


def pace_of(row: dict[str, Any]) -> str:
    """A row of throughput.csv in words."""
    if not row["images_per_second"]:
        return "does not work"
    share = f"{float(row['share']):.0%} of {float(row['matrix_rate']) / 1e12:.3g} TFLOP/s"
    return f"{int(row['images_per_second']):,} images/s, {share}"


def trained(
    plan: Plan, setting: Setting, part: str, name: str = "", more: str = ""
) -> dict[str, Any] | None:
    """The result.json of a run, trained now unless it exists; None if it was stopped."""
    flags = f"{plan.flags[part]} --device {setting.device} {more}".strip()
    kept, left = plan.folder / (name or part), plan.left()
    if not (result := kept_result(kept, flags)) and left > 0:
        result = train_and_keep(flags, kept, {}, left, *plan.where)
    said = summary_of(result) if result else "stopped; the next call resumes it"
    print(f"{name or part}: {said}", flush=True)
    return result


def seeds(plan: Plan, setting: Setting) -> None:
    if not (curve := trained(plan, setting, "curve")):
        return
    times, share = curve["seconds"], 1 - curve["training"]["validation_images"]
    taken = times["first_step_to_end"] or times["training"]  # the former is None if resumed
    # An epoch of all images takes longer, and times vary.
    epochs = max(1, math.floor(0.98 * plan.seconds / taken * curve["epochs"] * share))
    for seed in range(plan.seeds):
        more = f"--epochs {epochs} --seed {seed}"
        trained(plan, setting, "seeds", f"seed{seed}", more)


def summary_of(result: dict[str, Any], rate: float | None = None) -> str:
    """A result.json in words, with its share of the matrix rate where that is known."""
    kind = "validation" if result["test_accuracy"] is None else "test"
    times, epochs = result["seconds"], result["epochs"]
    whole = times["first_step_to_end"]  # None where it was resumed
    steps = f"{times['training']:.0f} s of training"
    share = rate and result["training_flops"] / times["training"] / rate
    return (
        f"{kind} accuracy {result[f'{kind}_accuracy']:.2%} after {epochs} epochs: "
        f"{f'{whole:.1f} s from the first step to the end' if whole else steps}, "
        f"{times['compile']:.0f} s of compiling, {times['total']:.0f} s in all"
        f"{f', {share:.0%} of the matrix rate' if share else ''}"
    )


def report(plan: Plan, setting: Setting) -> None:
    """Prints what is in the folder, in Markdown, and writes it to report.md."""
    found = sorted(plan.folder.glob("*/result.json"))
    results = {path.parent.name: json.loads(path.read_text()) for path in found}
    machines = {f"**{r['device_name']}, torch {r['torch']}**" for r in results.values()}
    rows = rows_of(plan.folder / "throughput.csv")
    rate = float(rows[0]["matrix_rate"]) if rows else None
    lines = [*sorted(machines), ""]
    lines += [f"- {row['recipe']}, {row['mode']}: {pace_of(row)}" for row in rows]
    lines += [f"- {name}: {summary_of(result, rate)}" for name, result in results.items()]
    if "curve" in results:
        lines += [f"- {time_to(0.94, plan.folder / 'curve/metrics.csv')}"]
    of_seeds = [each["test_accuracy"] for name, each in results.items() if name.startswith("seed")]
    if len(of_seeds) > 1:
        mean, deviation = statistics.mean(of_seeds), statistics.stdev(of_seeds)
        lines += [f"- {len(of_seeds)} seeds: test accuracy {mean:.2%} ± {100 * deviation:.2f}"]
    text = "\n".join(lines)
    utils.write_whole(plan.folder / "report.md", f"{text}\n".encode())
    print(f"\n{text}")


def time_to(accuracy: float, metrics: Path) -> str:
    """A sentence that says when the validation accuracy first was this high."""
    seconds = 0.0
    for row in rows_of(metrics):
        seconds += float(row["seconds"])
        if row["validation_accuracy"] and float(row["validation_accuracy"]) >= accuracy:
            return f"{accuracy:.0%} on validation images after {seconds:.1f} s of training"
    return f"{accuracy:.0%} on validation images was not reached"


PARTS = ("default", "throughput", "curve", "seeds", "baseline", "report", "best")
NOT_A_RUN = {"throughput": throughput, "seeds": seeds, "report": report}


def main(argv: list[str]) -> int:
    parser = Parser(prog="speedrun.py", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("all", *PARTS), default="all", help="(all)")
    parser.add_argument("--dry-run", action="store_true", help="a small version, on synthetic data")
    parser.add_argument("--device", help="cuda, mps or cpu (the best available)")
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-10 is (data/)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(results/gpu/)")
    parser.add_argument("--minutes", type=float, default=9, help="until the call ends (9)")
    parser.add_argument("--seeds", type=int, metavar="N", help="(5)")
    arguments = parser.parse_args(argv)
    plan = DRY_PLAN if arguments.dry_run else THE_PLAN
    plan = plan._replace(
        folder=arguments.out or plan.folder,
        seeds=arguments.seeds or plan.seeds,
        where=("--data-dir", arguments.data_dir) if arguments.data_dir else (),
        ends=time.monotonic() + 60 * arguments.minutes,
    )
    setting, status = Setting.of(arguments.device, "auto", rounds=5), 0
    if setting.device.type == "cpu" and not arguments.dry_run and arguments.part != "report":
        raise UserError("this measurement needs a GPU; --dry-run runs a small version anywhere")
    for name in PARTS[:-1] if arguments.part == "all" else [arguments.part]:
        try:
            NOT_A_RUN.get(name, partial(trained, part=name))(plan, setting)
        except Exception as error:  # whatever it is, the other parts do not need this one
            complain(f"{name} has failed: {error}")
            status = 1
    return status


if __name__ == "__main__":
    run_program(main)
