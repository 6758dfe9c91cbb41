"""The README and the model it comes with: commands that parse, code that is the files' own, links
that lead somewhere, and the accuracy that is stated."""

import json
import re
import shlex

import pytest
import torch

import ablation
import trainer
import utils
import vis
from data import load_dataset
from small import CIFAR10, ROOT, needs_cifar10

README = (ROOT / "README.md").read_text()
CARD = ROOT / "checkpoints/README.md"
SHIPPED = ROOT / "checkpoints/vit_cifar10.pt"


@pytest.mark.parametrize(
    ("program", "parse", "least"),
    [
        ("src/trainer.py", trainer.parse_arguments, 8),
        ("visualization/vis.py", vis.parse_arguments, 8),
    ],
)
def test_every_command_parses(program, parse, least):
    text = README + CARD.read_text()
    commands = re.findall(rf"{program}([^`\n]*)", text)
    commands = [command for command in commands if not command.startswith((")", "]"))]
    commands = [command for command in commands if "--help" not in command]
    assert len(commands) >= least
    for command in commands:
        parse(shlex.split(command, comments=True))


def test_every_line_of_code_is_in_the_file_it_names():
    blocks = re.findall(r"```python\n# (\S+?)[,\n].*?\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 10
    for file, block in blocks:
        lines = {line.strip() for line in (ROOT / file).read_text().splitlines()}
        for line in filter(None, block.splitlines()):
            assert line.strip() in lines, (file, line)


@pytest.mark.parametrize("page", [ROOT / "README.md", CARD], ids=["README", "card"])
def test_every_link_into_the_repository_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link for link in links if not link.startswith(("http", "#"))]
    assert len(inside) >= 3
    for link in inside:
        assert (page.parent / link).exists(), link


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(#([^)\s]+)\)", README):
        assert link in anchors


@pytest.mark.parametrize(("study", "least"), [("recipe", 14), ("shape", 10), ("size", 4)])
def test_the_table_of_changes_is_that_of_the_runs(study, least, capsys):
    ablation.show(ablation.table(ablation.STUDIES[study]))
    table = capsys.readouterr().out
    assert len(table.splitlines()) == least + 2 and table in README


def test_the_models_in_the_results_table_have_the_accuracy_of_their_results():
    """Each run's line has its own result.json's test accuracy, and no result is left out."""
    for name in ("shipped", "cpu"):
        result = json.loads((ROOT / "results" / name / "result.json").read_text())
        (line,) = re.findall(rf"^\| `{re.escape(result['command'])}`.*$", README, re.MULTILINE)
        assert f"**{result['test_accuracy']:.2%}**" in line
        assert (
            f"{result['validation_accuracy']:.2%}" in line and f"{result['parameters']:,}" in line
        )


# ---------------------------------------------------------------------------- the model


def test_the_shipped_model_is_small_and_that_of_its_recipe():
    model, checkpoint = utils.load_model(SHIPPED)
    result = json.loads((ROOT / "results/shipped/result.json").read_text())
    assert SHIPPED.stat().st_size < 25e6
    assert {weight.dtype for weight in checkpoint["weights"].values()} == {torch.float16}
    assert checkpoint["train_config"] == result["training"] and checkpoint["recipe"] == "shipped"
    assert sum(weight.numel() for weight in model.parameters()) == result["parameters"]
    assert len(checkpoint["history"]) == result["epochs"]


@needs_cifar10
def test_the_shipped_model_is_about_as_good_as_stated_on_some_test_images():
    """300 of them: within 4 standard deviations of the accuracy of all."""
    model, _ = utils.load_model(SHIPPED)
    dataset = load_dataset("cifar10", validation_images=5000, data_dir=CIFAR10)
    some = dataset.test.take(torch.arange(300))
    stated = json.loads((ROOT / "results/shipped/result.json").read_text())["test_accuracy"]
    found = trainer.evaluate(model, some, dataset).top1
    assert abs(found - stated) < 4 * (stated * (1 - stated) / 300) ** 0.5


@pytest.mark.slow
@needs_cifar10
def test_evaluation_of_the_shipped_model_prints_what_its_card_states(capsys):
    assert trainer.main(["--evaluate", str(SHIPPED), "--device", "cpu"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and "\n".join(lines) in CARD.read_text()
