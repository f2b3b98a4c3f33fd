"""Prepares checks, which are trusted, on the host."""

from __future__ import annotations

import ast
import marshal
from dataclasses import dataclass

from ponderttt.errors import InvalidRequestError

_METHODS: dict[type[ast.cmpop], str] = {
    ast.Eq: "__eq__",
    ast.Lt: "__lt__",
    ast.LtE: "__le__",
    ast.Gt: "__gt__",
    ast.GtE: "__ge__",
}


class _Comparisons(ast.NodeTransformer):
    """`a == b` becomes a call that also asks who says so (`runner.compare`); lines stay."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        method = _METHODS.get(type(node.ops[0]))
        if len(node.ops) > 1 or method is None:
            return node
        call = ast.Call(
            ast.Name("__compare__", ast.Load()),
            [ast.Constant(method), node.left, node.comparators[0]],
            [],
        )
        return ast.fix_missing_locations(ast.copy_location(call, node))


@dataclass(frozen=True, slots=True)
class Check:
    """A check as the runner takes it.

    Args:
        code: its code object, marshalled; host and sandbox run the same interpreter.
        modules: names of what it imports.
    """

    code: bytes
    modules: tuple[str, ...]


def prepare(source: str) -> Check:
    """Compile a check.

    Raises:
        InvalidRequestError: it is no Python.
    """
    try:
        tree = ast.parse(source, "<check>")
        code = compile(_Comparisons().visit(tree), "<check>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            "check", f"is no Python ({error}); give statements that can stand after the program"
        ) from error
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    return Check(marshal.dumps(code), tuple(sorted(modules)))
