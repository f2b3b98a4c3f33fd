"""Closeness of code."""

from __future__ import annotations

import io
import keyword
import tokenize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.bench.code_metrics import compare_code, cut, identifiers
from clients.bench.repo_targets import Kind, Target
from tests.helpers import source_text


def target(hidden: str, kind: Kind = "line") -> Target:
    """A target with this text."""
    return Target(kind, 0, len(hidden), 1, 0, hidden)


def levenshtein(one: str, other: str) -> int:
    """By the textbook (Wagner and Fischer, 1974)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@given(st.text(alphabet="ab(=", min_size=1, max_size=12), st.text(alphabet="ab(=", max_size=12))
def test_edit_similarity_is_one_minus_the_distance_over_the_longer_length(
    wanted: str, got: str
) -> None:
    expected = 1 - levenshtein(wanted, got) / max(len(wanted), len(got))
    assert compare_code(target(wanted), got).edit_similarity == pytest.approx(expected)


def test_identifiers_are_those_of_pythons_own_tokenizer() -> None:
    code = source_text()
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    names = [t.string for t in tokens if t.type == tokenize.NAME]
    assert identifiers(code) == [name for name in names if not keyword.iskeyword(name)]


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("return self.parse(text, sep=',')", ["self", "parse", "text", "sep"]),
        ("a = 'unfinished b", ["a"]),
        ("f(r'raw', b\"x\")  # comment", ["f"]),
        ("x = 1e5 + y2", ["x", "y2"]),
        ("", []),
    ],
)
def test_identifiers_of_fragments(code: str, names: list[str]) -> None:
    assert identifiers(code) == names


def test_identifier_scores_by_hand() -> None:
    # Two of three names on either side: F1 = 2 · 2 / (3 + 3).
    close = compare_code(target("a = f(b)"), "a = g(b)")
    assert (close.exact, close.identifier_exact) == (False, False)
    assert close.identifier_f1 == pytest.approx(2 / 3)
    renamed = compare_code(target("a = f(b, 1)"), "a = f(b, 2)")
    assert (renamed.exact, renamed.identifier_exact, renamed.identifier_f1) == (False, True, 1.0)


def test_white_space_counts_inside_a_block_and_nowhere_else() -> None:
    assert compare_code(target("    a = 1  "), "a = 1").exact
    assert compare_code(target("    a\n    b", "block"), "    a  \n    b\n").exact
    assert not compare_code(target("    a\n    b", "block"), "    a\n        b").exact


def test_nothing_is_as_far_as_can_be() -> None:
    close = compare_code(target("a = b"), "")
    assert (close.exact, close.edit_similarity, close.identifier_f1) == (False, 0.0, 0.0)


@pytest.mark.parametrize(
    ("hidden", "answer", "exact", "similarity"),
    [
        ("(alpha", "(alpha)", True, 1.0),
        ("( alpha ", "(alpha)", True, 1.0),
        (" (alpha", "( alpha ) + 1", True, 1.0),
        # Never closed, or not in its line.
        ("(alpha", "(alpha", False, 1.0),
        ("(alpha", "(alpha\n)", False, 1.0),
        # The parenthesis counts for nothing.
        ("(abcd", "(xyz)", False, 0.0),
        ("(abcd", "abcd)", False, 0.0),
        ("(f(x)", "(f(x))", True, 1.0),
        ("(f(x)", "(f(x)", False, 1.0),
    ],
)
def test_of_a_call_that_is_closed_what_stands_behind_the_parenthesis_counts(
    hidden: str, answer: str, exact: bool, similarity: float
) -> None:
    call = target(hidden, "call")
    close = compare_code(call, cut(call, answer))
    assert (close.exact, close.edit_similarity) == (exact, similarity)


def test_call_that_is_not_cut_and_begins_with_no_parenthesis_is_nothing() -> None:
    assert compare_code(target("(alpha", "call"), "alpha").edit_similarity == 0.0
