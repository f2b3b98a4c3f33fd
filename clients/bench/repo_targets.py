"""What of a Python file can be hidden: lines, blocks and the arguments of calls.

A target begins where tokens of ordinary code do, whatever the tokenizer: those of GPT-2's kind join
an end of line to the indentation after it, nearly all join the last space before a word to the
word, and many a parenthesis to what it opens. A prompt that ends within a token is continued as no
code ever was. So what is shown ends before the last character of an indentation, as an editor would
set it, and before a call's parenthesis.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

Kind = Literal["line", "block", "call"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Shorter ones are guessed by anybody.
_LEAST_LINE, _LEAST_CALL = 10, 3
# Characters before a target, so that there is something to go by.
_LEAST_LEFT = 200
_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Raise, ast.Assert)
_COMPOUND = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Target:
    """A piece of a file that is hidden and asked for.

    Args:
        kind: `line` and `block` are whole lines, without the last line's end and all but the last
            character of the first line's indentation; `call` is a call's opening parenthesis and
            what it holds.
        start, end: characters of the file.
        line: where it begins, from 1.
        indent: of the statement that opens a block, in characters; 0 for other kinds.
        hidden: the text.
        margin: what is shown of the indentation before it; of kind `call` nothing.
    """

    kind: Kind
    start: int
    end: int
    line: int
    indent: int
    hidden: str
    margin: str = ""

    @property
    def name(self) -> str:
        """What tells it from the others of its file."""
        return f"{self.line}:{self.kind}:{self.start}"


def find_targets(text: str, max_lines: int) -> dict[Kind, list[Target]]:
    """Everything that can be hidden, by kind, in the order of the file.

    Args:
        text: of a Python file, with `\\n` as the end of lines.
        max_lines: of a block.
    Raises:
        SyntaxError, ValueError: it is no Python.
    """
    source = _Source(text)
    with warnings.catch_warnings():
        # Odd escapes in strings are the repository's affair.
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    found: dict[Kind, set[tuple[int, int, int]]] = {kind: set() for kind in KINDS}
    for node in _walk(tree):
        if isinstance(node, ast.stmt) and (span := source.simple(node)):
            found["line"].add(span)
        elif isinstance(node, _COMPOUND + _FUNCTIONS) and (span := source.body(node, max_lines)):
            found["block"].add(span)
        elif isinstance(node, ast.Call) and (span := source.arguments(node)):
            found["call"].add(span)
    return {kind: [source.target(kind, *span) for span in sorted(found[kind])] for kind in KINDS}


def draw_targets(text: str, count: int, max_lines: int, rng: random.Random) -> tuple[Target, ...]:
    """At most `count` targets, the kinds in turn; in the order of the file.

    Raises:
        SyntaxError, ValueError: the file is no Python.
    """
    found = find_targets(text, max_lines)
    for kind in KINDS:
        rng.shuffle(found[kind])
    drawn: list[Target] = []
    while len(drawn) < count and any(found.values()):
        drawn += [found[kind].pop() for kind in KINDS if found[kind]][: count - len(drawn)]
    return tuple(sorted(drawn, key=lambda target: (target.start, target.end)))


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those inside f-strings, whose places Python 3.11 doesn't know."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.JoinedStr):
            yield node
            yield from _walk(node)


class _Source:
    """A text and its lines; `ast` counts lines from 1 and columns in bytes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lines = text.split("\n")
        self._starts = list(accumulate((len(line) + 1 for line in self._lines), initial=0))

    def target(self, kind: Kind, start: int, end: int, indent: int) -> Target:
        line = self._text.count("\n", 0, start) + 1
        margin = self._text[self._starts[line - 1] : start] if kind != "call" else ""
        return Target(kind, start, end, line, indent, self._text[start:end], margin)

    def simple(self, node: ast.stmt) -> tuple[int, int, int] | None:
        """A statement that has a line for itself and is more than a constant."""
        if not isinstance(node, _SIMPLE) or node.end_lineno != node.lineno:
            return None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return None
        line = self._lines[node.lineno - 1]
        before = line.encode()[: node.col_offset].decode()
        after = line.encode()[node.end_col_offset or 0 :].decode()
        if before.strip() or after.strip() or len(line.strip()) < _LEAST_LINE:
            return None
        # Tokenizers don't agree on whether two ends of lines before a word are one token.
        if not before and node.lineno > 1 and not self._lines[node.lineno - 2].strip():
            return None
        return self._lines_between(node.lineno, node.lineno, 0)

    def body(self, node: ast.AST, max_lines: int) -> tuple[int, int, int] | None:
        """The statements under a header, without a docstring."""
        statements: list[ast.stmt] = node.body  # type: ignore[attr-defined]  # checked by the caller
        if isinstance(node, _FUNCTIONS) and ast.get_docstring(node, clean=False) is not None:
            statements = statements[1:]
        if not statements:
            return None
        first, last = _first_line(statements[0]), statements[-1].end_lineno or 0
        header = self._lines[first - 2] if first > 1 else ""
        indent = node.col_offset  # type: ignore[attr-defined]  # all statements have one
        lines = self._lines[first - 1 : last]
        own = all(_indent(line) > indent for line in lines if line.strip())
        if not 2 <= len(lines) <= max_lines or not own or header.endswith("\\"):
            return None
        return self._lines_between(first, last, indent)

    def arguments(self, node: ast.Call) -> tuple[int, int, int] | None:
        """The opening parenthesis and what it holds, if it is one line of code."""
        line = node.func.end_lineno
        if line is None or line != node.end_lineno or not (node.args or node.keywords):
            return None
        start = self._place(line, node.func.end_col_offset or 0)
        end = self._place(line, node.end_col_offset or 0) - 1
        opening = re.compile(r"[ \t]*\(").match(self._text, start)
        if opening is None or start < _LEAST_LEFT or self._text[end] != ")":
            return None
        hidden = self._text[opening.end() : end]
        if len(hidden.strip()) < _LEAST_CALL or not re.search(r"[^\W\d]", hidden):
            return None
        # `)(` and `__(` may be one token.
        return (start, end, 0) if self._text[start - 1].isalnum() else None

    def _lines_between(self, first: int, last: int, indent: int) -> tuple[int, int, int] | None:
        hidden_indent = min(_indent(self._lines[first - 1]), 1)
        start = self._starts[first - 1] + _indent(self._lines[first - 1]) - hidden_indent
        end = self._starts[last] - 1
        return (start, end, indent) if start >= _LEAST_LEFT else None

    def _place(self, line: int, column: int) -> int:
        characters = len(self._lines[line - 1].encode()[:column].decode())
        return self._starts[line - 1] + characters


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
