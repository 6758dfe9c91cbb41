"""The benchmark's instruments against counts by hand, and the whole of it at a tiny size."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import machine
from benchmark import Setting, Shape, in_turns, kept_bytes, ratio
from recipes import Recipe, TrainConfig
from ViT import ViT, ViTConfig

CPU = Setting(torch.device("cpu"), "fp32", rounds=3)
TINY = Recipe(
    about="Tiny.",
    model=ViTConfig(patch_size=8, width=16, depth=2, heads=2),
    train=TrainConfig(batch_size=20, optimizer="muon"),
)


def test_works_take_turns_and_begin_with_another_one_each_round(monkeypatch):
    monkeypatch.setattr(benchmark, "LONG_ENOUGH", 0.0)
    done = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    taken = in_turns(works, CPU)
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in taken.values())
    assert "".join(done) == "aabbcc" + "abc" + "bca" + "cab"  # twice each, to set their number


def test_a_ratio_is_the_median_of_the_rounds():
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0]) == 3.0


def test_kept_memory_is_the_sum_of_the_layers_inputs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images = torch.randn(5, 4)
    # The first layer keeps its input; ReLU's output is kept by itself and by the second layer.
    assert kept_bytes(model, lambda: model(images)) == 4 * (5 * 4 + 5 * 8)


def test_counting_kept_memory_gives_it_back():
    """Softmax keeps its own output, which must not come to keep itself."""
    weights = nn.Linear(4, 4)
    kept = []

    def forward():
        attention = weights(torch.ones(4, 4)).softmax(dim=1)
        kept.append(weakref.ref(attention))
        return attention.sum()

    gc.disable()
    try:
        kept_bytes(weights, forward)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_candidate_that_does_not_compile_is_left_out(monkeypatch, capsys):
    def no_compiler(model, **_):
        def forward(images):
            raise RuntimeError("no C++ compiler found\nand a long story")

        return forward

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(benchmark, "IMPLEMENTATIONS", (benchmark.of_this_code,))
    shape = Shape(patch_size=16, width=8, depth=1, heads=1, batch_size=2)
    rows, ratios = benchmark.time_steps(shape, ["eager", "compiled"], CPU, rate=1e9)
    assert "this code own compiled: left out, no C++ compiler found\n" in capsys.readouterr().out
    assert [row["mode"] for row in rows] == ["eager"]
    assert ratios == {"eager": None, "compiled": None}


@pytest.mark.parametrize(("pooling", "dropped"), [("class", 0.0), ("mean", 0.0), ("class", 0.7)])
def test_the_arithmetic_of_a_step_is_what_torch_counts(pooling, dropped):
    config = ViTConfig(patch_size=8, width=32, depth=3, heads=4, pooling=pooling, mlp_ratio=3)
    model = ViT(config)
    model.embed.patch_dropout = dropped
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    # Images get no gradient, so the third product of the patch embedding is not made.
    patches = 2 * 16 * 3 * 8**2 * 32
    assert counter.get_total_flops() == 2 * (machine.training_flops(config, dropped) - patches)


def test_the_matrix_rate_is_that_of_a_product(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(clock)))
    assert machine.matrix_rate(torch.device("cpu"), "fp32") == 2 * 1024**3


def test_torchvisions_model_has_the_same_parameters():
    shape = Shape(patch_size=8, width=32, depth=2, heads=4, batch_size=4)
    ours, theirs = (
        next(make(shape)).model for make in (benchmark.of_this_code, benchmark.of_torchvision)
    )
    assert sum(w.numel() for w in ours.parameters()) == sum(w.numel() for w in theirs.parameters())


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "RECIPES", {"cpu": TINY})
    monkeypatch.setattr(benchmark, "INPUT_IMAGES", 100)
    monkeypatch.setattr(benchmark, "LONG_ENOUGH", 0.0)
    monkeypatch.setattr(
        benchmark, "IMPLEMENTATIONS", (benchmark.of_this_code, benchmark.of_torchvision, absent)
    )


def absent(shape):
    import a_package_that_nobody_has  # noqa: F401

    yield


def test_the_benchmark_writes_all_its_parts(tiny, tmp_path, capsys):
    out = tmp_path / "b.json"
    flags = ["--device", "cpu", "--mode", "eager", "--rounds", "1", "--json", str(out)]
    assert benchmark.main(flags) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "a_package_that_nobody_has is not installed; going on without it" in printed
    found = {(row["implementation"], row["attention"]) for row in result["train_step"]}
    torchvisions = {("torchvision", "fused"), ("torchvision", "plain")}
    assert found == torchvisions | {("this code", "own")}
    assert all(row["images_per_second"] > 0 for row in result["train_step"])
    assert result["ratio_to_fastest_peer"].keys() == {"eager"}
    assert result["ratio_to_fastest_peer"]["eager"] > 0 and result["input_ratio"] > 0
    assert result["outside_share"] == result["outside"]["outside_share"] < 1
    assert len(result["growth"]) == 16
    kept = [row["kept_bytes"] for row in result["growth"] if row["size"] == "batch_size"]
    assert kept[3] - kept[2] == 2 * (kept[2] - kept[1]) == 4 * (kept[1] - kept[0]) > 0
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--rounds 0", "0"),
        ("--json b.txt", "b.txt"),
        ("--json /dev/null/b.json", "/dev/null/b.json"),
        ("--device tpu", "tpu"),
        ("--recipe nonsense", "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("benchmark.py: ") and named in line
