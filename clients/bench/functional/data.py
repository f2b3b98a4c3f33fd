"""Records of a data set: from a local file, or from the Hugging Face hub."""

from __future__ import annotations

import ast
import gzip
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ponderttt.errors import InvalidRequestError, PonderError, UnavailableError

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Entry:
    """One record, with the words to complain about it.

    Args:
        source: where it is from.
        number: in its source, from 1.
        fields: as they came.
    """

    source: str
    number: int
    fields: Mapping[str, Any]

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of these fields that is there; it has to be a string."""
        value = self._value(names, default)
        if not isinstance(value, str):
            raise self.wrong(names[0], value, "a string")
        return value

    def texts(self, *names: str, default: Sequence[str] | None = None) -> list[str]:
        """The first of these fields that is there; it has to be a list of strings."""
        value = self._value(names, default)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise self.wrong(names[0], value, "a list of strings")
        if not all(isinstance(each, str) for each in value):
            raise self.wrong(names[0], value, "a list of strings")
        return list(value)

    def check_code(self, **sources: str) -> None:
        """See that fields are Python, so that no answer is paid for that can't be judged.

        Args:
            sources: by field.
        Raises:
            InvalidRequestError: one isn't.
        """
        for name, source in sources.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    compile(source, f"<{name}>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise self.bad(f"{name} is no Python: {error}") from error

    def parsed(self, name: str, source: str) -> ast.Module:
        """The same of one field, and what it says.

        Raises:
            InvalidRequestError: it is no Python.
        """
        self.check_code(**{name: source})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)

    def name(self) -> str:
        """The field task_id, which may be a number."""
        value = self._value(("task_id",), None)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong("task_id", value, "a name or a number")
        return str(value)

    def wrong(self, name: str, value: Any, wanted: str) -> InvalidRequestError:
        """What to raise where a field has no such value."""
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else shown[:59] + "…"
        return self.bad(f"{name} is {shown}, not {wanted}")

    def bad(self, what: str) -> InvalidRequestError:
        """What to raise where something is amiss."""
        name = self.fields.get("task_id")
        task = f" (task_id {name})" if isinstance(name, str | int) else ""
        return InvalidRequestError(
            "--data", f"{self.source}, record {self.number}{task}: {what}; mend or remove it"
        )

    def _value(self, names: Sequence[str], default: Any) -> Any:
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        if default is None:
            fields = " or ".join(repr(name) for name in names)
            raise self.bad(f"no field {fields}")
        return default


def finds_fault(tests: ast.AST) -> bool:
    """Whether tests look as if they could fail by themselves: there is an `assert`, a `raise`, or a
    call of `assert…`, `fail` or `exit`.

    A guess: whether it is ever reached isn't known, and what else may fail isn't seen.
    """
    for node in ast.walk(tests):
        if isinstance(node, ast.Assert | ast.Raise):
            return True
        if isinstance(node, ast.Call):
            called = node.func
            name = getattr(called, "attr", "") or getattr(called, "id", "")
            if name.startswith("assert") or name in ("fail", "exit"):
                return True
    return False


def used_by(name: str, tests: ast.Module) -> list[ast.stmt]:
    """What defines a name at top level, and what it uses of the rest by name; may be empty.

    Definitions are functions, classes and assignments, also those under an `if`.
    """
    defined: dict[str, list[ast.stmt]] = {}
    for statement in _top_level(tests.body):
        for each in _names_defined(statement):
            defined.setdefault(each, []).append(statement)
    found: list[ast.stmt] = []
    waiting = [name]
    while waiting:
        for statement in defined.pop(waiting.pop(), ()):
            found.append(statement)
            waiting += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return found


def _top_level(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _top_level([*statement.body, *statement.orelse])


def _names_defined(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            yield name


def is_file(data: str) -> bool:
    """Whether `data` means a file rather than a name on the hub."""
    return data.endswith(_SUFFIXES) or Path(data).is_file()


def read_file(path: Path) -> list[Entry]:
    """Records of a file with a JSON list or with a JSON object per line; also gzipped.

    Raises:
        InvalidRequestError: the file can't be read, holds something else, or holds nothing.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequestError("--data", f"{path} can't be read: {reason}") from error
    records = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    if not records:
        raise InvalidRequestError("--data", f"{path} has no record; name another file")
    return [_entry(str(path), number, record) for number, record in enumerate(records, 1)]


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise InvalidRequestError("--data", f"{path} is no JSON: {error}") from error


def _json_lines(path: Path, text: str) -> list[Any]:
    records = []
    # Not `splitlines`, which also splits at characters that a JSON string may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise InvalidRequestError(
                    "--data", f"{path}, line {number} is no JSON: {error}"
                ) from error
    return records


def read_hub(name: str, subset: str | None, split: str) -> list[Entry]:
    """Records of a data set on the Hugging Face hub.

    Args:
        name: of the data set.
        subset: its configuration; None for the only one.
        split: which part.
    Raises:
        UnavailableError: the library `datasets` is not installed.
        PonderError: the hub can't be reached or has no such data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            "data from the hub need `pip install 'ponderttt[stack]'`; or give a file with --data"
        ) from error
    try:
        records = list(datasets.load_dataset(name, subset, split=split))
    except Exception as error:
        # The library, the hub's client and its transport each have errors of their own.
        raise PonderError(
            f"{name} can't be loaded from the Hugging Face hub ({type(error).__name__}: {error}); "
            "download it elsewhere and give the file with --data"
        ) from error
    source = f"{name} ({', '.join(filter(None, (subset, split)))})"
    return [_entry(source, number, record) for number, record in enumerate(records, 1)]


def _entry(source: str, number: int, record: Any) -> Entry:
    if not isinstance(record, Mapping):
        raise InvalidRequestError("--data", f"{source}, record {number} is no JSON object")
    return Entry(source, number, record)
