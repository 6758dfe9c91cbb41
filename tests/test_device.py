"""Choosing a device and a precision, on a machine that may have only a CPU."""

import os

import pytest
import torch

import device as devices
from distributed import World
from utils import UserError

BEST_DEVICE = devices.best_device  # a fixture of all tests replaces it


def test_without_a_name_the_best_device_is_chosen(monkeypatch):
    monkeypatch.setattr(devices, "best_device", BEST_DEVICE)
    assert devices.choose_device("cpu") == torch.device("cpu")
    for cuda, mps, best in ((1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        assert devices.choose_device(None).type == best


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "", "a b"])
def test_a_device_that_this_machine_lacks_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"--device {name} is not available; use cpu"):
        devices.choose_device(name)


def test_a_full_device_is_out_of_memory_and_not_missing(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        devices.choose_device("cuda")
    assert not isinstance(caught.value, UserError)


def test_each_of_several_ranks_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world = World(rank=1, size=2, local_rank=1)
    assert devices.choose_device(None, world) == devices.choose_device("cpu", world)
    for name in ("cuda:0", "mps"):
        with pytest.raises(UserError, match=f"{name} is one device for 2 processes"):
            devices.choose_device(name, world)


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_bf16_on_a_cpu_that_multiplies_it(monkeypatch, feature):
    flags = {"avx2": True, "avx512_bf16": False} | ({feature: True} if feature else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    cpu = torch.device("cpu")
    assert devices.resolve_precision("auto", cpu) == ("bf16" if feature else "fp32")
    assert [devices.resolve_precision(name, cpu) for name in ("bf16", "fp32")] == ["bf16", "fp32"]


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_is_float16_on_a_gpu_without_bfloat16(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert devices.resolve_precision("auto", torch.device("cuda")) == expected


def test_a_device_has_a_name_and_a_memory():
    cpu = torch.device("cpu")
    assert devices.device_name(cpu).endswith(f", {torch.get_num_threads()} threads")
    before = devices.peak_memory_bytes(cpu)
    held = torch.ones(2**26)  # 256 MiB
    assert devices.peak_memory_bytes(cpu) >= max(before, held.nbytes)
    devices.keep_freed_memory()


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.Path, "glob", lambda *_: iter(["/dev/nvidia0"]))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in devices.unusable_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, cannot use it" in devices.unusable_gpu()
    monkeypatch.setattr(devices.Path, "glob", lambda *_: iter([]))
    assert devices.unusable_gpu() is None


def test_deterministic_asks_cuda_for_kernels_that_repeat(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        devices.use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
