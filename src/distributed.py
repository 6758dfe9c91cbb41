"""Signals that stop a run, the lock of its folder, and the processes that train it together.

    StopSignals    Ctrl-C and SIGTERM, handled between two steps of the training loop
    folder_lock    one run at a time in a folder
    World          the processes that train one model together, started by torchrun
    Job            the three of them, for one process

A process that torchrun did not start is a world of one, and no method then communicates.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import Stopped, UserError, WorldError, one_line

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


# ---------------------------------------------------------------------------- signals


class StopSignals:
    """Turns the first SIGINT or SIGTERM into `Stopped`: at once, or when the loop is ready.

    A second signal takes its default action, which ends the process there and then.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._postponed = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)
        self.received = number
        if not self._postponed:
            raise Stopped(number)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A block that no signal interrupts; it checks `received` itself, or is stopped at its end.

        Raises:
            Stopped: on leaving, a signal has come and nobody has raised for it.
        """
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
        if self.received:
            raise Stopped(self.received)


# ---------------------------------------------------------------------------- the run folder


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder until the block or the process ends, however it ends.

    The lock is on the folder itself: no lock file is left behind by a run that was killed.

    Raises:
        UserError: another run has it.
        OSError: there is no such folder, or it cannot be read.
    """
    if fcntl is None:
        print(f"cannot lock {folder} on this platform; do not start a second run in it")
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run; wait for it, or stop it") from None
        except OSError as error:  # some network file systems have no locks
            print(f"cannot lock {folder} ({error.strerror}); do not start a second run in it")
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------- many devices


@dataclass(frozen=True)
class World:
    """The processes that train one model together. Each has a rank from 0 to size - 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this host

    @property
    def leads(self) -> bool:
        """Only rank 0 prints, locks and writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of some rows; the parts of all ranks are as equal as can be."""
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

    def wait(self) -> None:
        """Waits until every rank is here."""
        self.any(False)

    @contextmanager
    def one_of_each_host_first(self) -> Iterator[None]:
        """A block that one process per host goes through before the others, say to download."""
        if self.local_rank:
            self.wait()
        try:
            yield
        finally:  # after an error too, which the others then meet themselves
            if not self.local_rank:
                self.wait()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, averaging its gradients over the ranks at the end of a backward pass."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model)


ALONE = World()


def without_averaging(model: nn.Module) -> AbstractContextManager:
    """A block whose backward passes leave the gradients on their rank, to be added to."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def joined_world(use_gpus: bool) -> Iterator[World]:
    """The world that torchrun's environment variables describe, or a world of one.

    Args:
        use_gpus: gradients live on GPUs and are averaged by NCCL; the rest goes by gloo.

    Raises:
        WorldError: a variable is missing, or the other processes cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    try:
        rank, size, local_rank = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpus else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        raise WorldError(
            f"cannot join the other processes of this job: {one_line(error)}"
        ) from error
    try:
        yield World(rank, size, local_rank)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise WorldError("another process of this job has ended, and so does this one") from error
    dist.destroy_process_group()  # not after an error: it might wait for a process that is gone


@dataclass(frozen=True)
class Job:
    """This process among others: its world, its signals, and the locks it holds."""

    world: World
    stop: StopSignals
    held: ExitStack

    def lock(self, folder: Path) -> None:
        """Takes a folder for all ranks until the job ends; raises what `folder_lock` does."""
        if self.world.leads:
            self.held.enter_context(folder_lock(folder))
        self.world.wait()


# Handles no signals; what it locks stays locked until the process ends.
ALONE_JOB = Job(ALONE, StopSignals(), ExitStack())


@contextmanager
def joined_job(use_gpus: bool) -> Iterator[Job]:
    """A job for the time of a block; see `joined_world` for what it takes and raises."""
    with ExitStack() as held, StopSignals() as stop, joined_world(use_gpus) as world:
        yield Job(world, stop, held)
