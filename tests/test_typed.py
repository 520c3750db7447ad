"""Which plain data is of the kind that a hint asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, Optional, TypedDict

import pytest

from peftlight.typed import fits, kind_of, misfit


class Point(TypedDict):
    x: int
    y: NotRequired[str | None]


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0, 0.5], [False, "0.5", None]),
        (bool, [True], [0, "true", None]),
        (str, ["", "a"], [1, None, ["a"]]),
        (int | None, [None, 3], [True, "3"]),
        (Optional[str], [None, "a"], [3]),  # noqa: UP045
        (str | list[str] | None, [None, "a", ["a", "b"], [], ("a",)], [3, [3], {"a": 1}]),
        (dict[str, int], [{}, {"a": 1}], [{"a": "1"}, {"a": True}, [], None]),
        (dict[str, Any], [{"a": object()}], [{1: 1}]),
        (Literal["a", "b"] | None, ["a", "c", None], [3]),
        (float | Literal["learned"], [1, "learned"], [None, [1]]),
        (Point, [{"x": 1}, {"x": 1, "y": None, "z": "other"}], [{}, {"x": "1"}, {"x": 1, "y": 2}, [], None]),
        (list[Point] | None, [None, [], [{"x": 1}]], [[{}], {"x": 1}]),
        (list[Any] | dict[str, float | None], [[{}], {"a": None}], ["a", {"a": "b"}]),
    ],
)
def test_kinds(hint: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []


def test_hints_that_are_not_about_plain_data_take_everything() -> None:
    for hint in (Any, Path, Sequence[int], tuple[int, ...], object):
        assert fits("a", hint)


def test_kinds_are_named() -> None:
    assert [kind_of(hint) for hint in (int, list[str], str | None, Any)] == ["int", "list[str]", "str | None", "Any"]
    assert kind_of(Point | None) == "an object with x, y | None"


def test_the_first_field_that_does_not_fit_is_found() -> None:
    assert [misfit(values, Point) for values in ({}, {"x": 1, "y": "a", "z": 0})] == [None, None]
    assert misfit({"y": 3, "z": 0}, Point) == ("y", "str | None")
    assert misfit({"y": 3, "x": "1"}, Point) == ("x", "int")
