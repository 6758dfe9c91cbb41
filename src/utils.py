"""Shared helpers that import no other module of ours: errors, exit statuses, files, seeds."""

import argparse
import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

ROOT = Path(__file__).resolve().parent.parent  # the repository, whatever the current folder is

# Ctrl-C while our programs import exits at once: an exception would be a traceback, or lost.
_folder = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent
_ours = _folder in [ROOT / name for name in ("src", "visualization", "experiments")]
if _ours and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
if _ours:  # importing matplotlib would fail if a notebook's backend is not installed here
    os.environ.pop("MPLBACKEND", None)

import numpy as np

# Read when torch is loaded: makes its idle threads soon sleep instead of spinning. Alone,
# training takes as long; beside two busy processes, half as long.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

import torch
from torch import Tensor

# ---------------------------------------------------------------------------- errors


class UserError(argparse.ArgumentTypeError, ValueError):
    """A user's request that cannot be met; the message is one line for the user.

    It is an argparse.ArgumentTypeError, so that a flag's `type` may raise it.
    """

    status = 2


class Diverged(Exception):
    """The loss or a weight is no longer finite; all ranks of a job raise it together."""

    status = 1


class WorldError(Exception):
    """The processes of a job cannot work together; the message is one line for the user."""

    status = 1


class Stopped(BaseException):
    """A signal, such as Ctrl-C or SIGTERM, stops a run on all its ranks together.

    Like KeyboardInterrupt, it is not an Exception, so error handlers do not catch it.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number  # as a shell reports it: 130 for Ctrl-C, 143 for SIGTERM


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")  # CPU, CUDA, cuBLAS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an exception for CUDA, and messages for the rest."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        message in str(error) for message in OUT_OF_MEMORY
    )


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def one_line(error: Exception) -> str:
    """An error's whole message in one line."""
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------- programs


class Output(io.FileIO):
    """Standard output or error; a full disk or a closed pipe does not end the program."""

    lost: ClassVar[dict[int, OSError]] = {}  # the last error of each descriptor

    def write(self, content: Any) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            self.lost[self.fileno()] = error
            return len(content)


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs `main` on the command line, and exits with the status that it returns."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            output = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            # Characters that it cannot encode are escaped.
            kept = {"encoding": stream.encoding, "errors": "backslashreplace"}
            setattr(sys, name, io.TextIOWrapper(output, **kept, line_buffering=True))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(status_of(main, sys.argv[1:]))


def print_result(text: str) -> None:
    """Prints what is written nowhere else; ends the program if it cannot be printed."""
    print(text, flush=True)
    if error := Output.lost.get(1):
        if isinstance(error, BrokenPipeError):  # the reader is gone, as after `| head`
            sys.exit(141)
        raise UserError(f"the output cannot be written: {error.strerror}") from error


def status_of(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """What `main` returns, or an error's status, after one line with its message and notes."""
    try:
        return main(argv)
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    except (UserError, Diverged, WorldError, Stopped, RuntimeError, MemoryError) as error:
        ours = hasattr(error, "status")
        if not (ours or is_out_of_memory(error)):
            raise
        of_all_ranks = isinstance(error, Diverged | Stopped)
        if not of_all_ranks or os.environ.get("RANK", "0") == "0":
            message = str(error) if ours else "out of memory"
            complain("; ".join([message, *getattr(error, "__notes__", [])]))
        return error.status if ours else 1


def printable(text: str) -> str:
    """The text with its control characters, which file names may contain, escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def complain(message: str) -> None:
    """Prints a line on standard error, with the program's name and, above 0, the rank."""
    rank, line = os.environ.get("RANK", "0"), f"{Path(sys.argv[0]).name}: {printable(message)}"
    print(line if rank == "0" else f"rank {rank}: {line}", file=sys.stderr)


# ---------------------------------------------------------------------------- files


def named_path(text: str | Path) -> Path:
    """A path that a user gives, which need not exist; UserError if it cannot be a path."""
    try:
        path = Path(text)
        path = path if path.exists() else path.expanduser()  # "~x.png" may be a file's name
        if not str(text):
            raise ValueError("it is empty")
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(text)!r:.300} cannot be a path: {reason}") from error
    return path


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # after a kill, the next write replaces it
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_torch(path: Path, content: Any) -> None:
    """Writes a torch.save file, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def write_table(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes a CSV file with a header line and a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file; a value that JSON does not know, such as a path, becomes text."""
    write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


# ---------------------------------------------------------------------------- seeding


def seed_for(*key: int) -> int:
    """A seed that depends only on the key, say (seed, epoch), so that a draw can be redone."""
    (state,) = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1, np.uint64)
    return int(state) >> 1  # a seed must fit into an int64


def seed_default_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and one device, without its 0.3 ms for a stack trace."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends only on the key."""
    return torch.Generator(device).manual_seed(seed_for(*key))


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; to a GPU from pinned memory, so as not to wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
