"""Studies of one change at a time to a recipe, over a few seeds, on a CPU.

    python experiments/study.py            the runs that results/ablation lacks, then the table
    python experiments/study.py --table    the table of the runs that exist
    python experiments/study.py shape      another study, of those below

    recipe    the first cpu recipe, shortened: three epochs on a quarter of the patches, none on all
              of them; an hour on two cores
    shape     width, depth and patch dropout at equal operations; two hours
    size      the width at a third of these operations; 15 minutes
    trend     what could make the cpu recipe better, one seed; two hours
    transfer  CIFAR-10 from scratch and from a model of CIFAR-100, which a command in
              results/README.md trains first; and the other way; an hour

Each run is trainer.py on one thread, judged on the validation images (--no-test). It leaves
result.json and metrics.csv in <study's folder>/<change>/seed<seed>/; table.csv sums up the study.
A result whose recorded command has other flags counts as missing.
"""

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import utils
from common import kept_result, show_rows, train_and_keep
from config import Parser
from utils import UserError, run_program


class Study(NamedTuple):
    """A base and changes to it, as flags of the trainer."""

    folder: Path
    base: str
    changes: dict[str, str]  # a folder's name, and the flags
    now: dict[str, str]  # flags that have changed since the runs, and what trains the same now
    seeds: tuple[int, ...] = (0, 1, 2)


# A study's flags are those of the recorded commands, and stay when a recipe or an option changes.
_CPU = "--recipe cpu --batch-size 250 --flip random --no-whiten-patches"
_CPU += " --whole-epochs 0 --schedule-over steps"
_WIDTH_128 = {
    "--recipe cpu": f"{_CPU} --width 128 --heads 4 --label-smoothing 0.1 --muon-learning-rate 0.02"
}
_WIDTH_96 = {"--recipe cpu": f"{_CPU} --width 96 --heads 6 --muon-learning-rate 0.01"}
_SHAPE = (
    "--recipe cpu --compile on --no-test --device cpu --epochs 12 --warmup-epochs 0.25"
    " --patch-dropout 0.75 --whole-epochs 0 --validate-every 100"
)
_FROM = "--init-from checkpoints/cifar100/last.pt"
_LIKE_CPU = "--batch-size 250 --patch-dropout 0.75 --resized-crop 0 --crop-padding 2"
_TUNED = f"--recipe finetune {_FROM} {_LIKE_CPU}"

STUDIES = {
    "recipe": Study(
        ROOT / "results/ablation",
        "--recipe cpu --epochs 3 --patch-dropout 0.75 --whole-epochs 0 --crop-padding 4"
        " --learning-rate 1e-3 --compile on --validate-every 3 --no-test --device cpu",
        {
            "none": "",
            "no-crop": "--crop-padding 0",
            "class-token": "--pooling class --positions learned",
            "adamw": "--optimizer adamw --learning-rate 2e-3",
            "whole-epoch": "--whole-epochs 1",
            "patch-8": "--patch-size 8 --patch-dropout 0",
            "paper-init": "--initialization paper",
            "rate": "--learning-rate 3e-3",
            "muon-rate": "--muon-learning-rate 0.04",
            "cutmix": "--cutmix 1",
            "trivial": "--policy trivial",
            "alternating": "--flip alternating",
            "drop-path": "--drop-path 0.1",
        },
        _WIDTH_128,
    ),
    # Equal `training_flops` to within 4%: a model that is wider, deeper or sees more patches
    # trains for fewer epochs.
    "shape": Study(
        ROOT / "results/speed94/shape",
        _SHAPE,
        {
            "none": "",
            "width-64": "--width 64 --heads 2 --epochs 46",
            "width-96": "--width 96 --heads 3 --epochs 21",
            "width-160": "--width 160 --heads 5 --epochs 8",
            "width-256": "--width 256 --heads 8 --epochs 3",
            "depth-2": "--depth 2 --epochs 23",
            "depth-8": "--depth 8 --epochs 6",
            "whole-epoch": "--epochs 9 --whole-epochs 1",
            "half": "--patch-dropout 0.5 --epochs 5 --whole-epochs 1",
            "eighth": "--patch-dropout 0.875 --epochs 17 --whole-epochs 1",
        },
        _WIDTH_128,
    ),
    "size": Study(
        ROOT / "results/speed94/size",
        _SHAPE,
        {
            "none": "--epochs 4",
            "width-48": "--width 48 --heads 2 --epochs 26",
            "width-64": "--width 64 --heads 2 --epochs 15",
            "width-96": "--width 96 --heads 3 --epochs 7",
        },
        _WIDTH_128,
    ),
    # Equal time, about: ten minutes of two cores, or less.
    "trend": Study(
        ROOT / "results/trend",
        "--recipe cpu --no-test --device cpu --compile on --width 96 --heads 3 --epochs 42"
        " --patch-dropout 0.75 --whole-epochs 0 --validate-every 7",
        {
            "none": "",
            "trivial": "--policy trivial --policy-epochs 0.8",
            "crop-4": "--crop-padding 4",
            "batch-500": "--batch-size 500",
            "muon-low": "--muon-learning-rate 0.01",
            "decay-high": "--weight-decay 0.2",
            "decay-low": "--weight-decay 0.01",
            "muon-low-decay-low": "--muon-learning-rate 0.01 --weight-decay 0.02",
            "width-64": "--width 64 --heads 2 --epochs 70",
            "width-64-long": "--width 64 --heads 2 --epochs 92 --batch-size 500",
            "depth-6": "--depth 6 --epochs 28",
            "eighth": "--patch-dropout 0.875 --epochs 74",
            "smoothing": "--label-smoothing 0",
            "rate-high": "--learning-rate 1e-2",
            "cutmix": "--cutmix 1 --mixed-epochs 0.7",
            "alternating": "--flip alternating",
            "heads-6": "--heads 6",
            "width-128": "--width 128 --heads 4 --epochs 28",
            "depth-3": "--depth 3 --epochs 54",
            "batch-125": "--batch-size 125 --epochs 39",
            "combined-batch-500": "--label-smoothing 0 --heads 6 --batch-size 500",
            "combined-muon-low": "--label-smoothing 0 --heads 6 --muon-learning-rate 0.01",
        },
        _WIDTH_128
        | {"--policy-epochs 0.8": "--policy-off-epochs 8"}
        | {"--mixed-epochs 0.7": "--mixing-off-epochs 12"},
        seeds=(0,),
    ),
    # Equal seconds of training on one core: about two minutes, or eight.
    "transfer": Study(
        ROOT / "results/transfer",
        "--no-test --device cpu --compile on --validate-every 100",
        {
            "scratch": "--recipe cpu --epochs 5",
            "finetune": f"{_TUNED} --epochs 5",
            "one-rate": f"{_TUNED} --epochs 5 --layer-decay 1",
            "linear-probe": f"--recipe linear-probe {_FROM} --epochs 4",
            "scratch-long": "--recipe cpu --epochs 20",
            "finetune-long": f"{_TUNED} --epochs 20",
            "cifar100-scratch": "--recipe cpu --dataset cifar100 --epochs 5",
            "cifar100-finetune": f"--recipe finetune --dataset cifar100 {_LIKE_CPU} --epochs 1"
            " --warmup-epochs 0.2",
        },
        _WIDTH_96,
    ),
}


def flags_of(study: Study, change: str, seed: int) -> tuple[str, str]:
    """The flags of a run: as its record states them, and those that train the same now."""
    flags = recorded = f"{study.base} --seed {seed} {study.changes[change]}".strip()
    for then, now in study.now.items():
        flags = flags.replace(then, now)
    return recorded, flags


def result_of(study: Study, change: str, seed: int) -> dict[str, Any] | None:
    """The result of a run; None if it is missing, or has other flags than the study's."""
    return kept_result(study.folder / change / f"seed{seed}", *flags_of(study, change, seed))


def run(study: Study, change: str, seed: int) -> bool:
    """Trains with a change and a seed and prints the accuracy; returns whether that worked."""
    kept, (_, flags) = study.folder / change / f"seed{seed}", flags_of(study, change, seed)
    result, said = None, "stopped; the next call resumes it"
    try:
        if result := train_and_keep(flags, kept, {"OMP_NUM_THREADS": "1"}):
            said = f"{result['validation_accuracy']:.2%}"
    except UserError as error:
        said = str(error)
    print(f"{change}, seed {seed}: {said}", flush=True)
    return result is not None


def table(study: Study) -> list[dict[str, Any]]:
    """A row for each change that was run: percent over the seeds, seconds of the fastest seed."""
    rows: list[dict[str, Any]] = []
    for change, flags in study.changes.items():
        results = [found for seed in study.seeds if (found := result_of(study, change, seed))]
        if not results:
            continue
        accuracies = [100 * result["validation_accuracy"] for result in results]
        row = {"change": change, "flags": flags, "seeds": len(results)}
        row["validation_accuracy"] = round(statistics.mean(accuracies), 2)
        row["deviation"] = round(statistics.stdev(accuracies), 2) if len(results) > 1 else None
        # The fastest, as other work on the machine only ever slows a run.
        row["seconds"] = round(min(result["seconds"]["training"] for result in results), 2)
        rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    parser = Parser(prog="study.py", description=__doc__)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="recipe", help="(recipe)")
    parser.add_argument("--table", action="store_true", help="print the table; train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs (2)")
    arguments = parser.parse_args(argv)
    study, worked = STUDIES[arguments.study], True
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {arguments.jobs}")
    if not arguments.table:
        # Seed by seed, so that an interrupted study can already compare the changes.
        wanted = [(change, seed) for seed in study.seeds for change in study.changes]
        missing = [key for key in wanted if result_of(study, *key) is None]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            worked = all(list(pool.map(lambda key: run(study, *key), missing)))
    if rows := table(study):
        utils.write_table(study.folder / "table.csv", rows[0], rows)
        show_rows(rows)
    return 0 if worked else 1


if __name__ == "__main__":
    run_program(main)
