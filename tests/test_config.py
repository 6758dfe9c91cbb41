"""Configs: what they refuse, by type and range."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from config import Config, is_a
from recipes import TrainConfig
from utils import UserError
from ViT import ViTConfig


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    count: Annotated[int, "how many", "[1, 3)"]
    rate: Annotated[float, "how fast", "(0, 1]"] = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    kind: Annotated[Literal["a", "b"], "which"] = "a"
    size: int | tuple[int, int] = 4
    note: str | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be in [1, 3), not 0"),
        ({"count": 3}, "count must be in [1, 3), not 3"),
        ({"count": True}, "count must be int, not True"),
        ({"count": 1.0}, "count must be int, not 1.0"),
        ({"count": "x" * 1000}, f"count must be int, not '{'x' * 79}"),
        ({"count": 1, "rate": 0}, "rate must be in (0, 1], not 0"),
        ({"count": 1, "rate": 1.1}, "rate must be in (0, 1], not 1.1"),
        ({"count": 1, "rate": math.nan}, "rate must be a finite number, not nan"),
        ({"count": 1, "rate": -math.inf}, "rate must be a finite number, not -inf"),
        ({"count": 1, "rate": [0.5]}, "rate must be a finite number, not a list"),
        ({"kind": "c"}, "kind must be 'a' or 'b', not 'c'"),
        ({"size": (1, 2, 3)}, "size must be int | tuple[int, int], not (1, 2, 3)"),
        ({"note": ""}, "note must not be empty"),
        ({"note": 3}, "note must be str | None, not 3"),
    ],
    ids=str,
)
def test_a_value_of_another_type_range_or_choice_is_refused_by_name(values, message):
    with pytest.raises(UserError) as refusal:
        (Inner if "count" in values else Outer)(**values)
    assert str(refusal.value) == message


def test_the_closed_end_of_a_range_belongs_to_it_and_an_int_is_a_float():
    assert Inner(count=1, rate=1).rate == 1 and Inner(count=2).rate == 0.5


@pytest.mark.parametrize("config", [ViTConfig, TrainConfig])
def test_every_number_of_a_recipe_has_a_range_with_two_ends(config):
    for name, (kind, _, limits) in config.fields().items():
        numbers = (int, float, bool | int)
        assert bool(limits) == (kind in numbers) and "inf" not in limits, name


@pytest.mark.parametrize(
    ("value", "kind", "answer"),
    [
        (10**400, float, False),
        (True, float, False),
        (-(10**400), int, True),
        ((1, 2.5), tuple[float, ...], True),
        ((1, "2"), tuple[float, ...], False),
        ([1], tuple[int, ...], False),
        ((1, 2, 3), tuple[int, int], False),
        ([1, 2], list[int], True),
        ([1, 2.0], list[int], False),
        ("cls", str | tuple[int, int] | None, True),
        (Path("x"), Path, True),
        ("x", Path, False),
    ],
    ids=str,
)
def test_a_value_is_of_a_type_with_all_that_it_contains(value, kind, answer):
    assert is_a(value, kind) == answer
