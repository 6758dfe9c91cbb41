"""Signals that stop a run, and the processes that train one model together."""

import gc
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import Stopped, UserError, WorldError, one_line

# ---------------------------------------------------------------------------- signals


class StopSignals:
    """Inside this context, Ctrl-C, SIGTERM and SIGHUP only set `received`, for the training loop.

    A second signal takes its default action, which ends the process at once; but not within a
    second, as launchers pass on what a terminal has already sent. If a signal has arrived, the
    end of the block raises `Stopped`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # else Python refuses
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
        if self.received and error is None:
            raise Stopped(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


# ---------------------------------------------------------------------------- many devices


@dataclass(frozen=True)
class World:
    """The processes that torchrun started to train one model; each has a rank, 0 to size - 1.

    Without torchrun it is a world of one, in which no method communicates.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this host

    @property
    def leads(self) -> bool:
        """Only rank 0 prints, locks and writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of some rows; the ranks' parts are as equal as possible."""
        return rows.tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on the CPU."""
        values = values.cpu().clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags are set on any rank, so that all ranks do the same."""
        return self.sum(torch.tensor(flags, dtype=torch.int64)).bool().tolist()

    def refuse_differing(self, argv: list[str]) -> None:
        """Raises UserError, on every rank, unless all have the same flags, except these."""
        own = {"--data-dir", "--output-dir", "--wait-minutes"}  # may differ by host
        line = shlex.join(w for i, w in enumerate(argv) if not {argv[i - 1], w.split("=")[0]} & own)
        lines = [line] * self.size
        if self.size > 1:
            dist.all_gather_object(lines, line)
        for rank, other in enumerate(lines):
            if other != lines[0]:
                raise UserError(f"rank {rank} was started with {other}, rank 0 with {lines[0]}")

    def wait(self) -> None:
        """Waits until every rank is here."""
        self.any(False)

    @contextmanager
    def one_of_each_host_first(self) -> Iterator[None]:
        """A block that one process per host runs before the others, say to download."""
        if self.local_rank:
            self.wait()
        try:
            yield
        finally:  # also after an error, which the others then meet too
            if not self.local_rank:
                self.wait()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, averaging its gradients over the ranks at the end of a backward pass."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)


ALONE = World()


def without_averaging(model: nn.Module) -> AbstractContextManager:
    """A block whose backward passes accumulate gradients on their rank, without averaging."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def joined_world(device: str | None, minutes: float = 5.0) -> Iterator[World]:
    """The world that torchrun's environment variables describe, or a world of one.

    Unless --device is cpu, NCCL averages the gradients of GPUs; gloo does the rest. A rank
    waits at most `minutes` for another.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    answers = in_main and before != signal.SIG_IGN
    try:
        rank, size, local_rank = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        if not 0 <= rank < size:
            raise ValueError(f"RANK {rank} is not below WORLD_SIZE {size}")
        use_gpus = device != "cpu" and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if use_gpus else "gloo"
        if answers:  # Ctrl-C exits at once; Python's handler would wait until torch is done
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    except (KeyError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise WorldError(f"cannot join the other processes of this job: {reason}") from error
    finally:
        if answers:
            signal.signal(signal.SIGINT, before)
    try:
        yield World(rank, size, local_rank)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        what = "another process of this job has ended, and so does this one"
        if "imed out" in str(error):
            what = f"waited {minutes:g} minutes for another process; see --wait-minutes"
        raise WorldError(what) from error
    # A leftover DistributedDataParallel holds the group. If it holds the last reference, torch
    # 2.11 deadlocks: the group's destructor waits for a thread that waits for Python's lock.
    gc.collect()
    dist.destroy_process_group()  # not after an error: it might wait for a process that is gone
