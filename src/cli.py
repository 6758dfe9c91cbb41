"""The command line: flags made from configs, errors of one line, the arguments of trainer.py."""

import argparse
import difflib
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import Config, UserError
from device import best_device
from recipes import RECIPES, TrainConfig
from run import RunOptions
from utils import ROOT, existing_path
from ViT import MODELS, ViTConfig

# ---------------------------------------------------------------------------- programs


def run_program(main: Callable[[list[str]], int]) -> typing.NoReturn:
    """Ends the process with the status of `main` for its command line."""
    try:
        status = status_of(main, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        status = 141
    sys.exit(status)


def status_of(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """What `main` returns; after a `UserError` one line and 2, after Ctrl-C 130."""
    try:
        return main(argv)
    except UserError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("stopped")
        return 130


def complain(message: str) -> None:
    """One line on standard error, with the program and, of several, the rank of the process."""
    rank = os.environ.get("RANK", "0")
    program = Path(sys.argv[0]).name
    print(f"rank {rank}: " * (rank != "0") + f"{program}: {message}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest flag for a misspelled one."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2]
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            message += f" (did you mean {near[0]}?)" if near else " (--help lists all)"
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(
    group: argparse._ArgumentGroup, config: Config, leave_out: tuple[str, ...] = ()
) -> None:
    """Adds a flag for each field of a config; help shows its text and, in brackets, its value.

    A flag that is not given leaves nothing in the parsed arguments, so that `given` can tell.
    """
    for name, (kind, text, _) in config.fields().items():
        if name in leave_out:
            continue
        inner = [each for each in typing.get_args(kind) if each is not types.NoneType]
        if types.NoneType in typing.get_args(kind):
            kind, inner = inner[0], [*typing.get_args(inner[0])]
        options: dict[str, Any] = {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": inner, "type": str}
        elif len(inner) > 1:  # int | tuple[int, int]
            options |= {"type": _height_and_width, "metavar": "PIXELS"}
        else:
            options["metavar"] = "DIR" if kind is Path else options["type"].__name__.upper()
        value = getattr(config, name)
        if isinstance(value, tuple):
            value = "x".join(map(str, value))
        elif isinstance(value, Path) and value.is_relative_to(ROOT):
            value = f"{value.relative_to(ROOT)}/"
        shown = "" if value is None else f" ({value})"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, help=f"{text}{shown}", default=argparse.SUPPRESS, **options)


def given(arguments: argparse.Namespace, config_class: type[Config]) -> dict[str, Any]:
    """The fields of a config class that the command line gave a value."""
    fields = config_class.fields()
    return {name: value for name, value in vars(arguments).items() if name in fields}


def changed_flags(config: Config, names: Iterable[str]) -> list[str]:
    """The flags of those of the named fields whose value is not the default."""
    flags = []
    for name in config.changed():
        value, flag = getattr(config, name), name.replace("_", "-")
        if name not in names:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", shlex.quote(str(value))]
    return flags


def _height_and_width(text: str) -> tuple[int, int]:
    """'32' or '32x48'."""
    if not (sides := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 32 or 32x48")
    return int(sides[1]), int(sides[2] or sides[1])


# ---------------------------------------------------------------------------- trainer.py

TASKS = {
    "resume": ("RUN", "resume a run"),
    "evaluate": ("CHECKPOINT", "evaluate a checkpoint, or a run's last, on the test set"),
    "export": ("RUN", "write the model of a run to model.pt: weights only, for sharing"),
}
DATA_FLAGS = ("data_dir", "device", "strict")
TASK_FLAGS = {  # that each task takes
    "resume": (*DATA_FLAGS, "test", "save_minutes", "keep_best", "epochs", "accumulate"),
    "evaluate": DATA_FLAGS,
    "export": ("library", "overwrite"),
}


@dataclass(frozen=True)
class Command:
    """What a command line of trainer.py asks for."""

    task: str  # "train", or one of TASKS
    path: Path | None  # of the task
    recipe: str
    model: ViTConfig
    training: TrainConfig
    options: RunOptions
    model_changes: dict[str, Any]  # the fields of the configs that flags set
    training_changes: dict[str, Any]
    note: str  # on how the recipe was chosen


def parse(argv: list[str], description: str) -> Command:
    """The command line of trainer.py; help shows the values of the chosen recipe.

    Raises:
        UserError: a value is refused by its config.
    """
    first = Parser(prog="trainer.py", add_help=False)
    first.add_argument("--recipe", choices=RECIPES, help="the options that flags override")
    first.add_argument("--device", default=None, help=argparse.SUPPRESS)
    known = first.parse_known_args(argv)[0]
    name, note = known.recipe, ""
    if name is None:
        name, note = default_recipe(known.device)
    recipe = RECIPES[name]

    parser = Parser(
        prog=first.prog,
        description=description,
        epilog="recipes:\n"
        + "\n".join(f"  {name:16}{each.about.splitlines()[0]}" for name, each in RECIPES.items()),
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, help=f"the options that flags override ({name})"
    )
    run = parser.add_argument_group("run")
    tasks = run.add_mutually_exclusive_group()
    for task, (metavar, text) in TASKS.items():
        tasks.add_argument(f"--{task}", metavar=metavar, type=existing_path, help=text)
    add_flags(run, RunOptions())
    model = parser.add_argument_group("model (value of the recipe)")
    model.add_argument("--model", choices=MODELS, help="a size: sets --width, --depth and --heads")
    add_flags(model, recipe.model, leave_out=("channels", "classes"))  # the data set's
    add_flags(parser.add_argument_group("training (value of the recipe)"), recipe.train)
    arguments = parser.parse_args(argv)

    task = next((task for task in TASKS if getattr(arguments, task)), "train")
    size = MODELS[arguments.model] if arguments.model else {}
    model_changes = size | given(arguments, ViTConfig)
    changes = given(arguments, TrainConfig)
    if task == "train":
        if "library" in arguments:
            raise UserError("--library works only with --export")
        configs = replace(recipe.model, **model_changes), replace(recipe.train, **changes)
    else:
        _refuse_other_flags(arguments, task)
        configs = recipe.model, recipe.train
    return Command(
        task,
        getattr(arguments, task, None),
        name,
        *configs,
        RunOptions(**given(arguments, RunOptions)),
        model_changes,
        changes,
        note,
    )


def default_recipe(device: str | None) -> tuple[str, str]:
    """The recipe for this machine, and why it is that one."""
    kind = (device or best_device().type).split(":")[0]
    if kind == "cpu":
        return "cpu", "recipe cpu, made for a CPU (--recipe chooses another)"
    return "default", f"recipe default, made for a GPU such as this {kind} device"


def _refuse_other_flags(arguments: argparse.Namespace, task: str) -> None:
    for name, value in vars(arguments).items():
        if value is not None and name not in (task, *TASK_FLAGS[task]):
            allowed = ", ".join(f"--{each}" for each in TASK_FLAGS[task]).replace("_", "-")
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} cannot be used with --{task}, which takes {allowed}")
