"""Configs: frozen dataclasses that check their values and become command-line flags."""

import argparse
import dataclasses
import difflib
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from utils import ROOT, UserError, named_path, printable


class Config:
    """Base of the dataclasses whose fields are declared `name: Annotated[type, help, range]`.

    The command line shows the help text. The range is an interval such as "[0, 1)" and may be
    omitted; so may the whole annotation, in a config without flags. A value of the wrong type
    or out of range raises a UserError that names it.
    """

    def __post_init__(self):
        for name, (kind, _, interval) in self.fields().items():
            value = getattr(self, name)
            if not is_a(value, kind):
                raise UserError(f"{name} must be {_spelled(kind)}, not {_shown(value)}")
            if isinstance(value, Path):
                object.__setattr__(self, name, named_path(value))  # as self is frozen
            if value == "" and is_a(None, kind):
                raise UserError(f"{name} must not be empty")
            if interval and not _contains(interval, value):
                raise UserError(f"{name} must be in {interval}, not {value}")

    @classmethod
    def fields(cls) -> dict[str, tuple[Any, str, str]]:
        """The type, help text and range of each field; "" for those not declared."""
        kinds = typing.get_type_hints(cls)
        hints = typing.get_type_hints(cls, include_extras=True)
        texts = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
        names = [field.name for field in dataclasses.fields(cls)]
        return {name: (kinds[name], *texts[name], "", "")[:3] for name in names}

    def changed(self) -> tuple[str, ...]:
        """The fields that differ from their default; every field must have one."""
        default = type(self)()
        return tuple(n for n in self.fields() if getattr(self, n) != getattr(default, n))


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value has a field's declared type. An int is a float too; floats are finite."""
    container, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if container in (types.UnionType, typing.Union):
        return any(is_a(value, each) for each in inner)
    if container is typing.Literal:
        return type(value) is str and value in inner
    if container is dict:
        pairs = value.items() if type(value) is dict else [(None, None)]
        return all(is_a(key, inner[0]) and is_a(each, inner[1]) for key, each in pairs)
    if container in (list, tuple):
        if type(value) is not container:
            return False
        any_length = container is list or inner[-1] is Ellipsis
        kinds = inner[:1] * len(value) if any_length else inner
        return len(value) == len(kinds) and all(map(is_a, value, kinds))
    return type(value) is kind or (kind is Path and isinstance(value, Path))


def _contains(interval: str, value: float) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _spelled(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_args(kind):
        return str(kind)
    return "a finite number" if kind is float else kind.__name__


def _shown(value: Any) -> str:
    """A value in a message; from an untrusted file, it may have any type and length."""
    if isinstance(value, int | float | str | None) or is_a(value, tuple[int, ...]):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


# ---------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, which suggest a flag for a misspelled one."""

    def __init__(self, **options: Any):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=as_written, **options)

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(" ")[2]
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            hint = " (--help lists all)" if unknown else "''"
            message += f" (did you mean {near[0]}?)" if near else hint
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def add_flags(
    group: argparse._ArgumentGroup, config: Config, leave_out: tuple[str, ...] = ()
) -> None:
    """Adds a flag for each field of a config; --help shows its text and its value.

    A flag that is not given is absent from the parsed arguments, so `given` can tell.
    """
    for name, (kind, text, _) in config.fields().items():
        if name in leave_out:
            continue
        inner = [each for each in typing.get_args(kind) if each is not types.NoneType]
        if types.NoneType in typing.get_args(kind):
            kind, inner = inner[0], [*typing.get_args(inner[0])]
        options: dict[str, Any] = {"type": kind}
        if inner == [bool, int]:
            options = {"type": int, "nargs": "?", "const": True, "metavar": "N"}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": inner, "type": str}
        elif typing.get_origin(kind) is tuple:
            options |= {"type": _numbers, "metavar": "NUMBERS"}
        elif len(inner) > 1:  # int | tuple[int, int]
            options |= {"type": _height_and_width, "metavar": "PIXELS"}
        else:
            options["metavar"] = "DIR" if kind is Path else options["type"].__name__.upper()
            options["type"] = named_path if kind is Path else kind
        value = getattr(config, name)
        if isinstance(value, tuple):
            value = "x".join(map(str, value))
        elif isinstance(value, Path) and value.is_relative_to(ROOT):
            value = f"{value.relative_to(ROOT)}/"
        shown = "" if value is None else f" ({value})"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, help=f"{text}{shown}", default=argparse.SUPPRESS, **options)


def given(arguments: argparse.Namespace, config_class: type[Config]) -> dict[str, Any]:
    """The fields of a config class that the command line sets."""
    fields = config_class.fields()
    return {name: value for name, value in vars(arguments).items() if name in fields}


def _height_and_width(text: str) -> tuple[int, int]:
    """'32' or '32x48'."""
    if not (sides := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 32 or 32x48")
    return int(sides[1]), int(sides[2] or sides[1])


def _numbers(text: str) -> tuple[float, ...]:
    """'0.5' or '0.485,0.456,0.406'."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 0.5,0.4,0.3") from None
