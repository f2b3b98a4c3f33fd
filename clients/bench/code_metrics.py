"""How close a completion comes to the code that was there.

As in RepoBench (arXiv 2306.03091) and CrossCodeEval (arXiv 2310.11248): exact match, edit
similarity, and the identifiers apart from everything else.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from dataclasses import dataclass

from clients.bench.repo_targets import Target
from ponderttt.errors import UnavailableError

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_STRING = r"\"\"\".*?(?:\"\"\"|\Z)|'''.*?(?:'''|\Z)|\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?"
_PIECE = re.compile(rf"(?:{_STRING})|#[^\n]*|\d[\w.]*|(?P<name>[^\W\d]\w*)|[^\s]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Closeness:
    """A completion beside the hidden text.

    Args:
        exact: the same, apart from white space at the end of lines (and around lines and
            arguments); and a call is closed.
        edit_similarity: 1 - Levenshtein distance / length of the longer one, in characters.
        identifier_exact: the same names in the same order.
        identifier_f1: harmonic mean of precision and recall of the names, counted with repeats.
    """

    exact: bool
    edit_similarity: float
    identifier_exact: bool
    identifier_f1: float


def compare_code(target: Target, completion: str) -> Closeness:
    """How close a completion, cut by `cut`, comes to what was hidden.

    Of a call, what stands behind the parenthesis is compared.

    Raises:
        UnavailableError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise UnavailableError(
            "edit similarity needs rapidfuzz: `pip install 'ponderttt[bench]'`"
        ) from error
    wanted, got = _compared(target, target.hidden), _compared(target, completion)
    whole = target.kind != "call" or _closing(completion) is not None
    names, guessed = identifiers(wanted), identifiers(got)
    return Closeness(
        exact=whole and wanted == got,
        edit_similarity=float(Levenshtein.normalized_similarity(wanted, got)),
        identifier_exact=names == guessed,
        identifier_f1=_f1(Counter(names), Counter(guessed)),
    )


def cut(target: Target, completion: str) -> str:
    """The part of a completion that stands for the target; what follows it is not judged.

    A line ends with the line; a block with the first line that is indented no deeper than the
    statement that opens it; a call with the parenthesis that closes it, or with the line. That
    parenthesis is kept, since it tells a call from one that is cut off. What begins with none is no
    call.
    """
    line = completion.split("\n", 1)[0]
    match target.kind:
        case "line":
            return line
        case "call":
            closing = _closing(line)
            kept_line = line if closing is None else line[: closing + 1]
            return kept_line if _is_call(line) else ""
        case "block":
            kept: list[str] = []
            for line in (target.margin + completion).split("\n"):
                if line.strip() and len(line) - len(line.lstrip()) <= target.indent:
                    break
                kept.append(line)
            return "\n".join(kept).rstrip()[len(target.margin) :]


def identifiers(code: str) -> list[str]:
    """Names in their order, without keywords, strings and comments; also of code that is cut off.

    Prefixes of strings count as parts of them only where the string follows at once.
    """
    found = []
    for piece in _PIECE.finditer(code):
        name = piece.group("name")
        is_prefix = code[piece.end() : piece.end() + 1] in ("'", '"')
        if name and not keyword.iskeyword(name) and not is_prefix:
            found.append(name)
    return found


def _is_call(text: str) -> bool:
    return text.lstrip().startswith("(")


def _closing(text: str) -> int | None:
    """Where the parenthesis is that closes the call with which a text begins; None if nowhere."""
    if not _is_call(text):
        return None
    open_brackets: list[str] = []
    for piece in _PIECE.finditer(text):
        mark = piece.group()
        if mark in _BRACKETS:
            open_brackets.append(_BRACKETS[mark])
        elif mark == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return piece.start()
    return None


def _compared(target: Target, text: str) -> str:
    """What counts of a text."""
    if target.kind == "call":
        if not _is_call(text):
            return ""
        return text[: _closing(text)].strip().removeprefix("(").strip()
    lines = "\n".join(line.rstrip() for line in text.split("\n")).rstrip()
    return lines if target.kind == "block" else lines.strip()


def _f1(wanted: Counter[str], got: Counter[str]) -> float:
    if not wanted and not got:
        return 1.0
    return 2 * (wanted & got).total() / (wanted.total() + got.total())
