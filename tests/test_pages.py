"""The pages and the included model: commands parse, quoted code is that of the files, links
resolve, tables and accuracies match the recorded results."""

import csv
import json
import re
import shlex
import statistics

import pytest
import torch

import benchmark
import cli
import speedrun
import study
import trainer
import vis
from checkpoint import load_model
from datasets import load_dataset
from evaluation import evaluate
from recipes import RECIPES
from small import CIFAR10, ROOT, needs_cifar10, result_of

README = ROOT / "README.md"
CARD = ROOT / "checkpoints/README.md"
RECORDS = ROOT / "results/README.md"
PAGES = [README, CARD, RECORDS, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = "\n".join(page.read_text() for page in PAGES)
SHIPPED = ROOT / "checkpoints/vit_cifar10.pt"


@pytest.mark.parametrize(
    ("program", "parse", "least"),
    [
        ("src/trainer.py", lambda flags: cli.parse(flags, ""), 12),
        ("visualization/vis.py", vis.parse_arguments, 12),
    ],
)
def test_every_command_parses(program, parse, least):
    commands = re.findall(rf"^(?:\| `)?[^\n`]*{program}([^`\n]*)", TEXTS, re.MULTILINE)
    commands = [command for command in commands if not command.startswith((")", "]"))]
    commands = [command for command in commands if "--help" not in command]
    assert len(commands) >= least
    for command in commands:
        parse(shlex.split(command, comments=True))


def test_every_experiment_has_the_parts_that_are_asked_of_it():
    parts = {"study": study.STUDIES, "speedrun": speedrun.PARTS}
    parts["benchmark"] = {f"--part {part}" for part in benchmark.PARTS}
    named = re.findall(r"python experiments/(\w+)\.py(?: ((?:--part )?[a-z]\w*))?", TEXTS)
    assert len(named) >= 10
    assert all(not part or part in parts[program] for program, part in named), named


def test_every_line_of_code_is_in_the_file_it_names():
    blocks = re.findall(r"```python\n# (\S+?)[,\n].*?\n(.*?)```", TEXTS, flags=re.DOTALL)
    assert len(blocks) == 8
    for file, block in blocks:
        lines = {line.strip() for line in (ROOT / file).read_text().splitlines()}
        for line in filter(None, block.splitlines()):
            assert line.strip() in lines, (file, line)


def test_the_five_lines_that_classify_an_image_do(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(import torch.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(list(filter(None, code.splitlines()))) == 5
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert re.fullmatch(r"deer \d\d\.\d%\n", capsys.readouterr().out)


def anchor_of(heading):
    """A heading's anchor, as GitHub makes it: no punctuation but hyphens, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_into_the_repository_resolves(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link for link in links if not link.startswith("http")]
    assert inside
    for link in inside:
        path, _, anchor = link.partition("#")
        assert (page.parent / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)
            assert anchor in map(anchor_of, headings), link


def test_the_readme_is_short_and_names_every_module():
    text = README.read_text()
    assert len(text.encode()) <= 12_000
    for folder in ("src", "visualization"):
        for module in (ROOT / folder).glob("*.py"):
            assert module.name in text, module
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert max(map(len, block.splitlines())) <= 96, block  # what fits GitHub's box


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_table_of_a_study_is_that_of_its_runs(name):
    with (study.STUDIES[name].folder / "table.csv").open() as file:
        recorded = {row["change"]: row["validation_accuracy"] for row in csv.DictReader(file)}
    rows = study.table(study.STUDIES[name])
    assert recorded == {row["change"]: str(round(row["validation_accuracy"], 2)) for row in rows}


def test_the_table_of_transfer_is_that_of_the_runs():
    lines = RECORDS.read_text().splitlines()
    for row in study.table(study.STUDIES["transfer"]):
        (line,) = (line for line in lines if line.startswith(f"| {row['change']} |"))
        stated = re.search(r"([\d.]+) ± ([\d.]+)% \| (\d+) s \|$", line).groups()
        made = row["validation_accuracy"], row["deviation"], round(row["seconds"])
        assert list(map(float, stated)) == pytest.approx(made, abs=0.051)


@pytest.mark.parametrize("recipe", ["finetune", "linear-probe"])
def test_the_accuracy_to_expect_of_fine_tuning_is_that_of_its_records(recipe):
    files = (ROOT / "results/finetune/draws").glob(f"{recipe}-50-?/result.json")
    found = [100 * json.loads(file.read_text())["validation_accuracy"] for file in files]
    stated = f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}%"
    assert len(found) == 3 and stated in (ROOT / "docs/finetuning.md").read_text()
    assert f"{statistics.mean(found):.1f}% validation accuracy" in RECIPES[recipe].about


def rows_of_records():
    """Page, folder and cells of the rows, in tables of accuracies, that link to a record."""
    for page in PAGES:
        columns = []
        for line in page.read_text().splitlines():
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            if "validation" in cells:
                columns = cells
            elif not line.startswith("|"):
                columns = []
            elif columns and (link := re.search(r"\]\((\S+/)\)", cells[0])):
                yield page, page.parent / link[1], dict(zip(columns, cells, strict=True))


def test_every_row_of_a_record_states_what_the_record_does():
    rows = list(rows_of_records())
    assert len(rows) >= 20
    for page, folder, cells in rows:
        files = sorted(folder.glob("result.json")) or sorted(folder.glob("seed*/result.json"))
        results = [json.loads(file.read_text()) for file in files]
        for split in {"validation", "test"} & cells.keys():
            accuracies = [100 * result[f"{split}_accuracy"] for result in results]
            if len(accuracies) == 1:
                right = {f"{accuracies[0]:.1f}%", f"{accuracies[0]:.2f}%"}
            else:
                mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
                right = {f"{mean:.1f} ± {deviation:.1f}%"}
            assert cells[split] in right, (page.name, cells, right)
        others = {
            "parameters": f"{results[0]['parameters']:,}",
            "operations": f"{results[0]['training_flops']:.1e}".replace("+", ""),
            "training": f"{results[0]['seconds']['training']:.0f} s",
        }
        assert all(cells[name] == others[name] for name in others.keys() & cells.keys()), cells


# ---------------------------------------------------------------------------- the model


def test_the_shipped_model_is_small_and_that_of_its_recipe():
    model, checkpoint = load_model(SHIPPED)
    result = result_of(ROOT / "results/shipped")
    assert SHIPPED.stat().st_size < 25e6
    assert {weight.dtype for weight in checkpoint.weights.values()} == {torch.float16}
    assert checkpoint.recipe == "shipped"
    assert checkpoint.training == RECIPES["shipped"].train
    assert checkpoint.model == RECIPES["shipped"].model
    assert sum(weight.numel() for weight in model.parameters()) == result["parameters"]
    assert len(checkpoint.history) == result["epochs"]


@needs_cifar10
def test_the_shipped_model_is_about_as_good_as_stated_on_some_test_images():
    """On 100 of them: within 4 standard deviations of the accuracy on all."""
    model, checkpoint = load_model(SHIPPED)
    dataset = load_dataset("cifar10", validation_images=5000, data_dir=CIFAR10)
    some = dataset.test.subset(torch.arange(100))
    stated = result_of(ROOT / "results/shipped")["test_accuracy"]
    found = evaluate(model, some, checkpoint.preprocessing).top1
    assert abs(found - stated) < 4 * (stated * (1 - stated) / 100) ** 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_cifar10
def test_evaluation_of_the_shipped_model_prints_what_its_card_states(capsys):
    assert trainer.main(["--evaluate", str(SHIPPED), "--device", "cpu"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and "\n".join(lines) in CARD.read_text()
