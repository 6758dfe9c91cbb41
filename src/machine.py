"""The machine: its devices, what they are called, how fast and how full they are."""

import ctypes
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch

from processes import ALONE, World
from utils import UsageError
from ViT import ViTConfig, patches_kept

_IMPORTED = time.perf_counter()


def best_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_device(name: str | None, world: World = ALONE) -> torch.device:
    """The named device, or the best there is; of several ranks, each on a GPU of its own.

    Raises:
        UsageError: this machine does not have it.
    """
    if world.size > 1:
        if name not in (None, "cuda", "cpu"):
            raise UsageError(f"--device {name} is one device for {world.size} processes; try cuda")
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        name = f"cuda:{world.local_rank}" if name == "cuda" else name
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise NotImplementedError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name} is not here; try cpu, or none for the best") from None
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL
    return device


def resolve_precision(choice: str, device: torch.device) -> str:
    """ "auto" to "bf16" where the device has instructions that multiply bfloat16, else "fp32"."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"
    return "fp32"


def device_name(device: torch.device) -> str:
    """The device as people call it, e.g. 'NVIDIA H200' or 'AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name
    return name if device.type == "mps" else f"{name}, {torch.get_num_threads()} threads"


def process_seconds() -> float:
    """Seconds since this process began, importing torch included."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf(
            "SC_CLK_TCK"
        )
    except (OSError, AttributeError):  # not Linux
        return time.perf_counter() - _IMPORTED


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory in use at any time: the GPU's for tensors, or the process' on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def training_flops(config: ViTConfig, patch_dropout: float = 0.0) -> int:
    """Floating-point operations of a training step for each image, as the scaling papers count.

    2 a weight and token forward, twice that backward, and the two products of attention; norms,
    softmax and GELU are left out (Kaplan et al., arXiv 2001.08361; PaLM, arXiv 2204.02311, B).
    """
    D, N = config.width, config.patches
    T = config.tokens - N + patches_kept(N, patch_dropout)
    block = T * (4 * D * D + 2 * D * config.hidden) + 2 * T * T * D
    patches = N * config.channels * config.patch_size**2 * D
    return 6 * (config.depth * block + patches + D * config.classes)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that square matrix products reach here, at their best."""
    size = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):  # the first of them warms up
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next tensor instead of unmapping them.

    By default every activation of over 32 MB is mapped afresh and its pages are zeroed by the
    kernel; training on a CPU is about 1.3 times faster without that. Elsewhere this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
