"""What choices of the cpu recipe are worth: one change at a time, over a few seeds.

    python src/ablation.py                 the runs that results/ablation lacks, then the table
    python src/ablation.py --table         the table of those that are there

Every run is the trainer's own, on one thread, and judged by the validation images (--no-test). It
begins from what the recipe was before these findings, and is shorter: three epochs, each on a
quarter of the patches, none on all of them.
It leaves result.json and metrics.csv in results/ablation/<change>/seed<seed>/, and all of them
results/ablation/table.csv. Two at a time on two cores they take about an hour. A result of other
options than those given here now counts as missing.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import utils
from recipes import TrainConfig
from run import configs_from
from trainer import parse_arguments

BASE = "--recipe cpu --epochs 3 --patch-dropout 0.75 --whole-epochs 0 --crop-padding 4"
BASE += " --learning-rate 1e-3 --compile on --validate-every 3 --no-test --device cpu"
SEEDS = (0, 1, 2)
CHANGES = {  # a folder's name, and the flags
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
}
RESULTS = utils.ROOT / "results/ablation"


def flags_of(change: str, seed: int) -> list[str]:
    return shlex.split(f"{BASE} --seed {seed} {CHANGES[change]}")


def result_of(change: str, seed: int) -> dict[str, Any] | None:
    """What a run came to; None where there is none, or where it was of other options than now."""
    try:
        result = json.loads((RESULTS / change / f"seed{seed}" / "result.json").read_text())
    except OSError:
        return None
    model, training = configs_from(parse_arguments(flags_of(change, seed)))
    # An option that came after a run was at its default.
    result["training"] = dataclasses.asdict(TrainConfig()) | result["training"]
    wanted = {"model": dataclasses.asdict(model), "training": dataclasses.asdict(training)}
    wanted = json.loads(json.dumps(wanted))  # tuples become lists
    return result if result.items() >= wanted.items() else None


def run(change: str, seed: int) -> bool:
    """Trains with a change and a seed, keeps the figures, and says so; whether that worked."""
    kept = RESULTS / change / f"seed{seed}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(utils.ROOT / "src/trainer.py"), *flags_of(change, seed)]
        command += ["--output-dir", folder, "--name", change]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=one_thread, capture_output=True, text=True)
        if done.returncode:
            print(f"{change}, seed {seed}: {done.stderr.strip()}", flush=True)
            return False
        for file in ("metrics.csv", "result.json"):
            utils.write_whole(kept / file, (Path(folder) / change / file).read_bytes())
    accuracy = json.loads((kept / "result.json").read_text())["validation_accuracy"]
    print(f"{change}, seed {seed}: {accuracy:.2%}", flush=True)
    return True


def table() -> list[dict[str, Any]]:
    """A row for each change that was run: percent over the seeds, seconds of the fastest."""
    rows: list[dict[str, Any]] = []
    for change, flags in CHANGES.items():
        results = [result for seed in SEEDS if (result := result_of(change, seed))]
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
    parser.add_argument("--table", action="store_true", help="no runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (2)")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {arguments.jobs}")
    worked = True
    if not arguments.table:
        # Seed by seed, so that the changes compare however far it gets.
        wanted = [(change, seed) for seed in SEEDS for change in CHANGES]
        missing = [key for key in wanted if result_of(*key) is None]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            worked = all(list(pool.map(lambda key: run(*key), missing)))
    rows = table()
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
        utils.write_whole(RESULTS / "table.csv", text.getvalue().encode())
        show(rows)
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
