"""Wrong versions of right programs, to see that checks notice.

Every `return` of the named functions gives another value of the same type: truth values are
negated, numbers are one higher, texts, lists, tuples, sets and dictionaries have one item more,
anything else becomes None. That is the mutation operator *return values* of mutation testing;
unlike a swapped operator it leaves no equivalent program behind, and it ends when the original
ends.

Source: the operators of PIT, https://pitest.org/quickstart/mutators/ (true, false, primitive, empty
and null returns), with one more item instead of none, since an empty value may be the right one.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

_HELPER = '''

def _another(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, list):
        return [*value, None]
    if isinstance(value, tuple):
        return (*value, None)
    if isinstance(value, (set, frozenset)):
        return value | {"?"}
    if isinstance(value, dict):
        return {**value, "?": None}
    return 0 if value is None else None
'''


def mutate(program: str, names: Collection[str]) -> str:
    """The program with wrong results of the functions and methods called `names`.

    A function without any `return` of a value raises instead.

    Raises:
        ValueError: the program has no function of such a name.
        SyntaxError: it is no program.
    """
    functions = [
        node
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in names
    ]
    if not functions:
        raise ValueError(f"the program defines none of {', '.join(sorted(names))}")
    edits: dict[int, bytes] = {}
    lines = program.encode().splitlines(keepends=True)
    for function in functions:
        returned = list(_returned(function.body))
        for value in returned:
            edits[_at(lines, value.lineno, value.col_offset)] = b"_another(("
            edits[_at(lines, value.end_lineno or 0, value.end_col_offset or 0)] = b"))"
        if not returned:
            last = function.body[-1]
            end = _at(lines, last.end_lineno or 0, last.end_col_offset or 0)
            indent = b" " * function.body[0].col_offset
            edits[end] = b"\n" + indent + b'raise RuntimeError("mutated")'
    mutated = b"".join(lines)
    for place in sorted(edits, reverse=True):
        mutated = mutated[:place] + edits[place] + mutated[place:]
    return mutated.decode() + _HELPER


def _at(lines: list[bytes], line: int, column: int) -> int:
    """Place of a node's end in the program, in bytes."""
    return sum(map(len, lines[: line - 1])) + column


def _returned(body: Collection[ast.stmt]) -> Iterator[ast.expr]:
    """Values that a function returns itself, not those of functions inside it."""
    for statement in body:
        if isinstance(statement, ast.Return) and statement.value is not None:
            yield statement.value
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "finalbody"):
                yield from _returned(getattr(statement, block, ()))
            for handler in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                yield from _returned(handler.body)
