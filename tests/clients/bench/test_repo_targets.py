"""Hidden pieces of code: where they lie, and that they can be told from what follows."""

from __future__ import annotations

import ast
import inspect
import json.decoder
import random
import textwrap
from itertools import chain
from pathlib import Path

import pytest

from clients.bench.code_metrics import cut
from clients.bench.repo_targets import KINDS, Target, draw_targets, find_targets
from ponderttt.models.tokenizer import Tokenizer

TEXTS = [inspect.getsource(module) for module in (json.decoder, textwrap, inspect)]
LEFT = "# " + "x" * 200 + "\n"


def by_kind(code: str, max_lines: int = 8) -> dict[str, list[str]]:
    """The hidden texts of a piece of code that has enough before it."""
    found = find_targets(LEFT + code, max_lines)
    return {kind: [target.hidden for target in found[kind]] for kind in KINDS}


@pytest.mark.parametrize("text", TEXTS, ids=["decoder", "textwrap", "inspect"])
def test_targets_are_what_stands_at_their_place(text: str) -> None:
    found = find_targets(text, 8)
    for kind in KINDS:
        assert found[kind], kind
        for target in found[kind]:
            assert text[target.start : target.end] == target.hidden
            assert text.count("\n", 0, target.start) + 1 == target.line
            assert target.hidden.strip()
            assert target.start >= 200


@pytest.mark.parametrize("text", TEXTS, ids=["decoder", "textwrap", "inspect"])
def test_file_itself_as_completion_is_cut_to_the_target(text: str) -> None:
    for targets in find_targets(text, 8).values():
        for target in targets:
            # Tells that the call is closed.
            closing = ")" if target.kind == "call" else ""
            expected = (target.hidden + closing).rstrip()
            assert cut(target, text[target.start :]) == expected


@pytest.mark.parametrize("text", TEXTS, ids=["decoder", "textwrap", "inspect"])
def test_hidden_code_is_whole_code(text: str) -> None:
    found = find_targets(text, 8)
    for target in found["call"]:
        ast.parse(f"call{target.hidden})")
    for target in found["block"]:
        wrapped = "def f():\n  for _ in ():\n" + textwrap.indent(
            textwrap.dedent(target.margin + target.hidden), "    "
        )
        ast.parse(wrapped)
        assert 2 <= target.hidden.count("\n") + 1 <= 8


def test_lines_leave_out_docstrings_imports_and_parts_of_statements() -> None:
    code = (
        "import something_long\n"
        "def f():\n"
        '    """A docstring of some length."""\n'
        "    first = call_it(\n        argument_one)\n"
        "    second = other_name + 1\n"
        "    x = 1\n"
        "    third = 1; fourth = 2222222\n"
        "    return first_name, second  # why\n"
    )
    assert by_kind(code)["line"] == [" second = other_name + 1"]


def test_block_begins_after_the_docstring_and_keeps_decorators() -> None:
    code = (
        'def f(a):\n    """Doc."""\n    @wrap\n    def g():\n        pass\n    return g\n\n'
        "if a: b = 1\n"
    )
    assert by_kind(code)["block"] == [" @wrap\n    def g():\n        pass\n    return g"]


def test_block_longer_than_allowed_or_of_one_line_is_left_out() -> None:
    code = "def f():\n" + "    a = 1\n" * 5 + "def g():\n    return 1\n"
    assert by_kind(code, 4)["block"] == []
    assert len(by_kind(code, 5)["block"]) == 1


def test_arguments_count_characters_not_bytes_and_leave_out_f_strings() -> None:
    code = (
        'été = "ééé"; appel(été, "é", (1, 2))\nprint(f"{inner(value)}")\nplain()\nnumber(12345)\n'
    )
    assert by_kind(code)["call"] == ['(été, "é", (1, 2)', '(f"{inner(value)}"']


def test_draw_is_seeded_and_takes_all_kinds_in_turn() -> None:
    first = draw_targets(TEXTS[0], 6, 8, random.Random("a"))
    assert first == draw_targets(TEXTS[0], 6, 8, random.Random("a"))
    assert first != draw_targets(TEXTS[0], 6, 8, random.Random("b"))
    assert sorted(target.kind for target in first) == ["block"] * 2 + ["call"] * 2 + ["line"] * 2
    assert len({target.name for target in first}) == 6


def test_draw_of_more_than_there_is_takes_all() -> None:
    code = LEFT + "value = some_call(argument)\n"
    drawn = draw_targets(code, 9, 8, random.Random(0))
    assert [target.kind for target in drawn] == ["line", "call"]


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("(a, b) + c)", "(a, b)"),
        ("(f(x)[1], ')'), 2", "(f(x)[1], ')')"),
        ("(never closed", "(never closed"),
        ("(a,\n    b)", "(a,"),
        ("({1: (2)}, 3)\n", "({1: (2)}, 3)"),
        (" ()", " ()"),
        ("\n(a)", ""),
        (" = f(a)", ""),
        ("", ""),
    ],
)
def test_arguments_end_with_the_parenthesis_that_closes_the_call(
    completion: str, kept: str
) -> None:
    assert cut(Target("call", 0, 1, 1, 0, "x"), completion) == kept


def test_block_ends_with_the_first_line_that_is_indented_no_deeper() -> None:
    target = Target("block", 0, 1, 1, 4, "x", margin="       ")
    completion = " a = 1\n\n        b = 2\n\n    def other():\n        c = 3\n"
    assert cut(target, completion) == " a = 1\n\n        b = 2"
    # One column short of the other lines, but still inside.
    assert cut(target, "a = 1\n        b = 2") == "a = 1\n        b = 2"
    # What is shown of the indentation doesn't count where nothing comes of it.
    assert cut(target, "\n    def other():") == ""


def test_line_at_the_margin_after_an_empty_one_is_left_out() -> None:
    code = "value = some_name\n\nother = some_name\n"
    assert by_kind(code)["line"] == ["value = some_name"]


@pytest.mark.real_model
def test_prompt_ends_where_a_token_of_the_code_ends(smollm2_dir: Path, coder_dir: Path) -> None:
    for tokenizer in map(Tokenizer.from_dir, (smollm2_dir, coder_dir)):
        for text in TEXTS:
            for target in random.Random(text).sample([*chain(*find_targets(text, 8).values())], 40):
                shown = tokenizer.encode(text[target.start - 200 : target.start])
                whole = tokenizer.encode(text[target.start - 200 : target.end])
                assert shown == whole[: len(shown)], target
