"""What choices are worth: studies of one change at a time, over a few seeds.

    python src/ablation.py                 the runs that results/ablation lacks, then the table
    python src/ablation.py --table         the table of those that are there
    python src/ablation.py shape           another study, of those below

    recipe    the cpu recipe as it was before these findings, and shorter: three epochs, each on a
              quarter of the patches, none on all of them; an hour on two cores
    shape     width, depth and the share of patches for equal operations, on a CPU; two hours
    size      the width for a third of these operations; 15 minutes
    speed94   options of the speed94 recipe, for a GPU; not yet run

Every run is the trainer's own and judged by the validation images (--no-test); on a CPU it has one
thread. It leaves result.json and metrics.csv in <study's folder>/<change>/seed<seed>/, and all of
them table.csv. A result of other options than those given here now counts as missing.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import utils
from recipes import TrainConfig
from run import configs_from
from trainer import parse_arguments
from utils import UsageError


class Study(NamedTuple):
    """A base, and changes to it, as flags of the trainer."""

    folder: Path
    base: str
    changes: dict[str, str]  # a folder's name, and the flags
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def on_cpu(self) -> bool:
        return "--device cpu" in self.base


_SHORT = "--recipe cpu --compile on --no-test --device cpu"
_SHAPE = (
    f"{_SHORT} --epochs 12 --warmup-epochs 0.25 --patch-dropout 0.75 --whole-epochs 0"
    " --validate-every 100"
)

STUDIES = {
    "recipe": Study(
        utils.ROOT / "results/ablation",
        f"{_SHORT} --epochs 3 --patch-dropout 0.75 --whole-epochs 0 --crop-padding 4"
        " --learning-rate 1e-3 --validate-every 3",
        {
            "none": "",
            "no-crop": "--crop-padding 0",
            "class-token": "--pooling class --positions learned",
            "adamw": "--optimizer adamw --learning-rate 2e-3",
            "whole-epoch": "--whole-epochs 1",
            "patch-8": "--patch-size 8 --patch-dropout 0",
            "paper-start": "--initialisation paper",
            "rate": "--learning-rate 3e-3",
            "muon-rate": "--muon-learning-rate 0.04",
            "cutmix": "--cutmix 1",
            "trivial": "--policy trivial",
            "alternating": "--flip alternating",
            "drop-path": "--drop-path 0.1",
            "averaging": "--averaging 0.99",
        },
    ),
    # Operations equal to 4% by `training_flops`: what is wider or deeper, or sees more of each
    # image, has fewer epochs.
    "shape": Study(
        utils.ROOT / "results/speed94/shape",
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
    ),
    "size": Study(
        utils.ROOT / "results/speed94/size",
        _SHAPE,
        {
            "none": "--epochs 4",
            "width-48": "--width 48 --heads 2 --epochs 26",
            "width-64": "--width 64 --heads 2 --epochs 15",
            "width-96": "--width 96 --heads 3 --epochs 7",
        },
    ),
    # The first five for equal operations, too.
    "speed94": Study(
        utils.ROOT / "results/speed94/search",
        "--recipe speed94 --no-test",
        {
            "none": "",
            "width-256": "--width 256 --heads 4 --epochs 567",
            "width-384": "--width 384 --heads 6 --epochs 247",
            "depth-12": "--depth 12 --epochs 175",
            "half": "--patch-dropout 0.5 --batch-size 1000 --epochs 181",
            "batch": "--batch-size 1000",
            "muon-low": "--muon-learning-rate 0.01",
            "muon-high": "--muon-learning-rate 0.04",
            "rate": "--learning-rate 1e-3",
            "no-cutmix": "--cutmix 0",
            "no-colour": "--colour 0",
            "less-crop": "--crop-padding 2",
            "trivial": "--policy trivial --policy-epochs 0.8",
            "averaging": "--averaging 0.999",
        },
    ),
}


def flags_of(study: Study, change: str, seed: int) -> list[str]:
    return shlex.split(f"{study.base} --seed {seed} {study.changes[change]}")


def result_of(study: Study, change: str, seed: int) -> dict[str, Any] | None:
    """What a run came to; None where there is none, or where it was of other options than now."""
    return kept_result(study.folder / change / f"seed{seed}", flags_of(study, change, seed))


def results_of(study: Study, change: str) -> list[dict[str, Any]]:
    """What there is of a change's seeds."""
    return [result for seed in study.seeds if (result := result_of(study, change, seed))]


def kept_result(kept: Path, flags: list[str]) -> dict[str, Any] | None:
    """The result.json in a folder, if it is of a run with these flags of the trainer."""
    try:
        result = json.loads((kept / "result.json").read_text())
    except OSError:
        return None
    model, training = configs_from(parse_arguments(flags))
    # An option that came after a run was at its default.
    result["training"] = dataclasses.asdict(TrainConfig()) | result["training"]
    wanted = {"model": dataclasses.asdict(model), "training": dataclasses.asdict(training)}
    wanted = json.loads(json.dumps(wanted))  # tuples become lists
    return result if result.items() >= wanted.items() else None


def train_and_keep(flags: list[str], kept: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Trains in a process of its own, and keeps the figures alone.

    Returns:
        result.json, which with metrics.csv is now in `kept`.

    Raises:
        UsageError: the trainer did not get to its end; with its own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(utils.ROOT / "src/trainer.py"), *flags]
        command += ["--output-dir", folder, "--name", "run"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(done.stderr.strip())
        made = Path(folder) / "run"
        result = json.loads((made / "result.json").read_text())
        result["command"] = shlex.join(["python", "src/trainer.py", *flags])
        utils.write_whole(kept / "metrics.csv", (made / "metrics.csv").read_bytes())
    utils.write_json(kept / "result.json", result)
    return result


def run(study: Study, change: str, seed: int) -> bool:
    """Trains with a change and a seed, keeps the figures, and says so; whether that worked."""
    flags = flags_of(study, change, seed)
    one_thread = {"OMP_NUM_THREADS": "1"} if study.on_cpu else {}
    try:
        result = train_and_keep(flags, study.folder / change / f"seed{seed}", one_thread)
    except UsageError as error:
        print(f"{change}, seed {seed}: {error}", flush=True)
        return False
    print(f"{change}, seed {seed}: {result['validation_accuracy']:.2%}", flush=True)
    return True


def table(study: Study) -> list[dict[str, Any]]:
    """A row for each change that was run: percent over the seeds, seconds of the fastest."""
    rows: list[dict[str, Any]] = []
    for change, flags in study.changes.items():
        results = results_of(study, change)
        if not results:
            continue
        accuracies = [100 * result["validation_accuracy"] for result in results]
        row = {"change": change, "flags": flags, "seeds": len(results)}
        row["validation_accuracy"] = statistics.mean(accuracies)
        row["deviation"] = statistics.stdev(accuracies) if len(results) > 1 else None
        # Other work slows some of the runs; none of it makes one faster.
        row["seconds"] = min(result["seconds"]["training"] for result in results)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table as the README has it."""
    print("| change | flags | seeds | validation | training |\n|---|---|---|---|---|")
    for row in rows:
        flags = f"`{row['flags']}`" if row["flags"] else ""
        spread = f" ± {row['deviation']:.1f}" if row["seeds"] > 1 else ""
        accuracy = f"{row['validation_accuracy']:.1f}{spread}%"
        seconds = f"{row['seconds']:.0f} s"
        print(f"| {row['change']} | {flags} | {row['seeds']} | {accuracy} | {seconds} |")


def main(argv: list[str]) -> int:
    parser = utils.Parser(
        prog="ablation.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", choices=STUDIES, default="recipe", help="(recipe)")
    parser.add_argument("--table", action="store_true", help="no runs")
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (on a CPU 2, a core each; on a GPU 1)"
    )
    arguments = parser.parse_args(argv)
    study, worked = STUDIES[arguments.study], True
    jobs = (2 if study.on_cpu else 1) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        parser.error(f"--jobs must be at least 1, not {jobs}")
    if not arguments.table:
        # Seed by seed, so that the changes compare however far it gets.
        wanted = [(change, seed) for seed in study.seeds for change in study.changes]
        missing = [key for key in wanted if result_of(study, *key) is None]
        with ThreadPoolExecutor(jobs) as pool:
            worked = all(list(pool.map(lambda key: run(study, *key), missing)))
    rows = table(study)
    if rows:
        rounded = (
            {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
        utils.write_table(study.folder / "table.csv", rows[0], rounded)
        show(rows)
    return 0 if worked else 1


if __name__ == "__main__":
    utils.run_program(main)
