"""Mutated solutions are programs, and wrong."""

from __future__ import annotations

from typing import Any

import pytest

from clients.bench.functional.mutation import mutate


def run(program: str, names: set[str]) -> dict[str, Any]:
    """Global names after the mutated program."""
    names_after: dict[str, Any] = {}
    exec(mutate(program, names), names_after)
    return names_after


@pytest.mark.parametrize(
    ("value", "mutated"),
    [
        ("True", False),
        ("3", 4),
        ("0.5", 1.5),
        ("'a'", "a?"),
        ("[1]", [1, None]),
        ("1, 2", (1, 2, None)),
        ("{1}", {1, "?"}),
        ("{1: 2}", {1: 2, "?": None}),
        ("None", 0),
        ("b'x'", None),
        ("(\n        1\n        + 1\n    )", 3),
        ("'é' + 'ü'", "éü?"),
    ],
)
def test_returned_value_becomes_another_of_its_type(value: str, mutated: object) -> None:
    found = run(f"def f():\n    x = 'ä'; return {value}\n", {"f"})["f"]()
    assert found == mutated
    assert type(found) is type(mutated)


def test_every_branch_is_mutated_but_no_inner_function() -> None:
    program = (
        "def f(n):\n    def inner():\n        return 10\n    square = lambda x: x * x\n"
        "    try:\n        for i in range(3):\n            if i == n:\n"
        "                return inner()\n        else:\n            [][0]\n"
        "    except IndexError:\n        return square(5)\n"
        "def g():\n    return 1\n"
    )
    found = run(program, {"f"})
    assert [found["f"](1), found["f"](9), found["g"]()] == [11, 26, 1]


def test_methods_are_mutated_by_name() -> None:
    program = "class A:\n    def m(self):\n        return 1\n    def n(self):\n        return 1\n"
    instance = run(program, {"m"})["A"]()
    assert (instance.m(), instance.n()) == (2, 1)


def test_function_without_a_result_raises() -> None:
    found = run("def f(items):\n    items.append(1)\n", {"f"})
    with pytest.raises(RuntimeError, match="mutated"):
        found["f"]([])


def test_unknown_function_is_refused() -> None:
    with pytest.raises(ValueError, match="none of g, h"):
        mutate("def f():\n    return 1\n", {"h", "g"})
