"""Devices: choosing one and a precision for it, its name and its memory."""

import ctypes
import os
import platform
import re
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch

from distributed import ALONE, World
from utils import UserError, is_out_of_memory


def best_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def unusable_gpu() -> str | None:
    """Why torch cannot use this machine's NVIDIA GPU, if that is so."""
    if torch.cuda.is_available() or not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__}, built {built}, cannot use "
        "it; nvidia-smi shows the driver"
    )


def choose_device(name: str | None, world: World = ALONE) -> torch.device:
    """The named device, or the best available; with several ranks, a GPU for each."""
    if world.size > 1:
        if name not in (None, "cuda", "cpu"):
            raise UserError(f"--device {name} is one device for {world.size} processes; use cuda")
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        name = f"cuda:{world.local_rank}" if name == "cuda" else name
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise NotImplementedError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"--device {name} is not available; use cpu, or omit --device") from None
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # for NCCL
    return device


def use_deterministic_kernels() -> None:
    """Makes CUDA use kernels that repeat bit for bit, and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it is never read
    torch.backends.cudnn.benchmark = False


def resolve_precision(choice: str, device: torch.device) -> str:
    """Replaces "auto": "bf16" if the device multiplies it, else "fp16" on CUDA, else "fp32"."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Has a forward pass use bfloat16 or float16, where autocast finds it safe, or float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def device_name(device: torch.device) -> str:
    """The device's usual name, e.g. 'NVIDIA H200' or 'AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # not Linux, or a processor without a name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return name if device.type == "mps" else f"{name}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory use: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, where `ru_maxrss` starts from the parent's
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next tensor instead of unmapping them.

    By default, every activation of over 32 MB is mapped afresh and its pages are zeroed by the
    kernel; without that, a CPU trains about 1.3 times faster. Without glibc, this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
