"""The benchmark's instruments against counts by hand, and the whole of it at a tiny size."""

import json
import math

import pytest
import torch

import benchmark
import common
from common import Setting, ratio, time_alternating
from recipes import Recipe, TrainConfig
from ViT import ViTConfig

CPU = Setting(torch.device("cpu"), "fp32", rounds=3)
TINY = Recipe(
    about="Tiny.",
    model=ViTConfig(patch_size=8, width=16, depth=2, heads=2),
    train=TrainConfig(batch_size=20, optimizer="muon"),
)


def test_functions_alternate_and_each_round_starts_with_a_different_one(monkeypatch):
    monkeypatch.setattr(common, "LONG_ENOUGH", 0.0)
    done = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    taken = time_alternating(works, CPU)
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in taken.values())
    assert "".join(done) == "aabbcc" + "abc" + "bca" + "cab"  # twice each, to set how often


def test_a_ratio_is_the_median_of_the_rounds():
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0]) == 3.0


def test_a_candidate_that_does_not_compile_is_skipped(monkeypatch, capsys):
    def broken(images):
        raise RuntimeError("no C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model, **_: broken)
    monkeypatch.setattr(benchmark, "IMPLEMENTATIONS", (benchmark.of_this_code,))
    config = ViTConfig(patch_size=16, width=8, depth=1, heads=1)
    found = benchmark.time_steps(config, 2, ["eager", "compiled"], CPU)
    reason = "this code own compiled does not run (no C++ compiler found); skipping it\n"
    assert reason in capsys.readouterr().out
    assert [row["mode"] for row in found["train_step"]] == ["eager"]
    assert found["ratio_to_fastest_peer"] == {"eager": None, "compiled": None}


def test_a_timed_step_makes_the_gradients_and_moves_the_weights_only_with_its_optimizers():
    run, state = common.run_of(TINY, CPU, steps=1)
    weights = list(state.model.parameters())
    before = [weight.clone() for weight in weights]

    def moved():
        return not all(map(torch.equal, before, weights))

    seen = []
    hook = state.model.head.weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad))
    forward = common.forward_of(run, state, "eager")
    common.step_of(run, state, forward, optimize=False)()
    assert len(seen) == 1 and seen[0].abs().sum() > 0 and not moved()
    assert state.model.head.weight.grad is None
    common.step_of(run, state, forward)()
    assert moved()
    hook.remove()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "RECIPES", {"cpu": TINY})
    monkeypatch.setattr(benchmark, "MEASURED", ("small",))
    monkeypatch.setattr(benchmark, "INPUT_IMAGES", 100)
    monkeypatch.setattr(common, "LONG_ENOUGH", 0.0)
    implementations = (benchmark.of_this_code, benchmark.of_torchvision, absent)
    monkeypatch.setattr(benchmark, "IMPLEMENTATIONS", implementations)


def absent(shape):
    import a_package_that_nobody_has  # noqa: F401

    yield


def test_the_shares_of_a_step_by_hand(monkeypatch):
    """An epoch of 8 steps takes 10 s, a bare step 1 s, its forward and backward 0.5 s."""
    taken = {"epoch": [10.0], "step": [1.0], "passes": [0.5]}
    monkeypatch.setattr(benchmark, "time_alternating", lambda *_: taken)
    found = benchmark.time_outside(TINY, "eager", CPU, steps=8)
    shares = {"outside_share": 0.6, "optimizers_share": 0.4, "seconds_per_step": 1.25}
    assert found == pytest.approx(shares)


def test_the_benchmark_writes_all_its_parts(tiny, tmp_path, capsys):
    out = tmp_path / "b.json"
    flags = ["--device", "cpu", "--mode", "eager", "--rounds", "1", "--json", str(out)]
    assert benchmark.main(flags) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "memory" not in result and "| this code | own | eager | " in printed
    assert "a_package_that_nobody_has is not installed; skipping it" in printed
    found = {f"{row['implementation']} {row['attention']}" for row in result["train_step"]}
    assert found == {"torchvision fused", "this code own"}
    assert all(row["images_per_second"] > 0 for row in result["train_step"])
    assert len({row["parameters"] for row in result["train_step"]}) == 1
    assert result["ratio_to_fastest_peer"].keys() == {"eager"}
    assert result["ratio_to_fastest_peer"]["eager"] > 0 and result["input_ratio"] > 0
    shares = (result["outside_share"], result["optimizers_share"])
    assert all(map(math.isfinite, shares)) and result["seconds_per_step"] > 0  # noisy: one round
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_peers_are_those_that_are_named(tiny):
    found = benchmark.candidates(TINY.model, ("timm", "vit-pytorch"))
    assert {each.implementation for each in found} == {"this code"}
    found = benchmark.candidates(TINY.model, ("torchvision", "timm"))
    assert {each.implementation for each in found} == {"this code", "torchvision"}


def test_the_matrix_rate_is_that_of_the_median(monkeypatch):
    seconds = iter([1.0, *range(20, 0, -1)])
    monkeypatch.setattr(common, "seconds_of", lambda *_: next(seconds))
    assert common.matrix_rate(CPU.device, "fp32") == 2 * 1024**3 / 10.5


@pytest.mark.timeout(300)  # two processes import torch
def test_memory_is_a_part_by_itself_and_recomputing_saves_some(tiny, tmp_path, capsys):
    out = tmp_path / "m.json"
    assert benchmark.main(["--part", "memory", "--device", "cpu", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["memory"]
    assert not (tmp_path / "m.png").exists()  # no step was timed
    assert (row["model"], row["parameters"]) == ("small", 22_050_664)
    assert row["GFLOP an image"] == pytest.approx(6 * 4.6, rel=0.02)  # timm: 4.6e9 forward
    assert 0.2 < row["GB with --checkpoint-activations"] < row["GB"]
    assert f"| small | 22,050,664 | 27.6 | {row['GB']:.3g} | " in capsys.readouterr().out
