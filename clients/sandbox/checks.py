"""Prepares checks, which are trusted, on the host."""

from __future__ import annotations

import ast
import marshal
from collections.abc import Sequence
from dataclasses import dataclass

from ponderttt.errors import InvalidRequestError

_METHODS: dict[type[ast.cmpop], str] = {
    ast.Eq: "__eq__",
    ast.Lt: "__lt__",
    ast.LtE: "__le__",
    ast.Gt: "__gt__",
    ast.GtE: "__ge__",
    ast.NotEq: "__ne__",
    ast.In: "in",
    ast.NotIn: "not in",
}
# Methods of `unittest.TestCase` that pass if their first two arguments compare so.
_ASSERTIONS = {
    f"assert{name}": "__eq__"
    for name in (
        "Equal", "AlmostEqual", "CountEqual", "SequenceEqual", "ListEqual", "TupleEqual",
        "SetEqual", "DictEqual", "MultiLineEqual",
    )
} | {
    "assertIn": "in",
    "assertLess": "__lt__",
    "assertLessEqual": "__le__",
    "assertGreater": "__gt__",
    "assertGreaterEqual": "__ge__",
}  # fmt: skip


class _Comparisons(ast.NodeTransformer):
    """Comparisons become calls that also ask who says so (`runner.compare`); lines stay."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        methods = [_METHODS.get(type(op)) for op in node.ops]
        # A call evaluates all operands, a chain only as many as it needs.
        if None in methods or not all(map(_is_simple, node.comparators[1:])):
            return node
        names = ast.Tuple([ast.Constant(method) for method in methods], ast.Load())
        return _call("__compare__", node, [names, node.left, *node.comparators])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        method = _ASSERTIONS.get(node.func.attr) if isinstance(node.func, ast.Attribute) else None
        if method is None or len(node.args) < 2 or isinstance(node.args[0], ast.Starred):
            return node
        arguments = [ast.Constant(method), node.func, *node.args]
        return _call("__assertion__", node, arguments, node.keywords)


def _is_simple(node: ast.expr) -> bool:
    """Whether it does no harm to evaluate it."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _call(
    name: str, node: ast.expr, arguments: list[ast.expr], keywords: Sequence[ast.keyword] = ()
) -> ast.expr:
    call = ast.Call(ast.Name(name, ast.Load()), arguments, list(keywords))
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
