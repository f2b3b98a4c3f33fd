"""What the repository benchmark will do, drawn from the seed before anything is asked.

A repository's files near the ones with targets are its context: they are taught, or stuffed into
the prompt. The files with targets are taught, too, but each only after its targets were asked for.
What would give a target away before is not taught at all (`clients.bench.repo_leaks`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from clients.bench.repo_leaks import Text, gives_away
from clients.bench.repo_targets import KINDS, Target, draw_targets
from clients.files import Skipped, TextFile, text_files
from ponderttt.errors import InvalidRequestError

_MAX_BYTES = 1 << 20
# A shorter file is nothing but its targets.
_LEAST_LINES = 60
# A file of unrelated code is scored as far as this, in characters.
_UNRELATED_LENGTH = 4000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is drawn.

    Args:
        files: with targets, per repository.
        targets: per file.
        max_lines: of a hidden block.
        context_chars: of a repository's context, in all.
        file_chars: of one file of the context; the rest of it is left out.
        left_chars: of the file before the target, in the prompt.
    """

    files: int = 4
    targets: int = 6
    max_lines: int = 8
    context_chars: int = 60_000
    file_chars: int = 8_000
    left_chars: int = 2_000


@dataclass(frozen=True, slots=True)
class Subject:
    """A file with targets."""

    file: TextFile
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Repository:
    """One repository.

    Args:
        name: in the result file.
        context: taught before any target is asked for; the nearest to the subjects come last.
        subjects: in the order in which they are asked and then taught.
        dropped: files that are left out of the context, since they hold hidden text or are nearly
            a copy of a subject.
    """

    name: str
    context: tuple[TextFile, ...]
    subjects: tuple[Subject, ...]
    dropped: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Changes with every character of it that is taught or asked for."""
        return _hash([_texts(self.context), _subjects(self.subjects)])


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a run: repositories, and unrelated code to see what is forgotten."""

    repositories: tuple[Repository, ...]
    unrelated: tuple[TextFile, ...]

    def fingerprint(self) -> str:
        """Changes with every character that is taught or asked for."""
        parts = [[r.name, _texts(r.context), _subjects(r.subjects)] for r in self.repositories]
        return _hash([*parts, _texts(self.unrelated)])

    def unrelated_fingerprint(self) -> str | None:
        """Changes with every character of the unrelated code; None without any."""
        return _hash(_texts(self.unrelated)) if self.unrelated else None


def _texts(files: Sequence[TextFile]) -> list[list[str]]:
    return [[file.path, file.text] for file in files]


def _subjects(subjects: Sequence[Subject]) -> list[list[Any]]:
    return [[s.file.path, s.file.text, [t.name for t in s.targets]] for s in subjects]


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def make_plan(
    paths: Sequence[str], unrelated: Sequence[Path], unrelated_files: int, sizes: Sizes, seed: int
) -> Plan:
    """Draw what to hide, to teach and to ask.

    Args:
        paths: directories, or names of installed packages.
        unrelated: files of other code; without any, `unrelated_files` of the standard library.
        unrelated_files: how many of those.
        sizes: how much.
        seed: the same gives the same plan from the same files.
    Raises:
        InvalidRequestError: a path names nothing, or holds too little Python.
    """
    roots = [resolve(path) for path in paths]
    again: Counter[str] = Counter()
    repositories = []
    for root in roots:
        again[root.name] += 1
        name = root.name if again[root.name] == 1 else f"{root.name}~{again[root.name]}"
        repositories.append(_draw(name, root, sizes, random.Random(f"{seed}/{name}")))
    return Plan(tuple(repositories), _unrelated(unrelated, unrelated_files, seed))


def resolve(path: str) -> Path:
    """The directory of a path or of an installed package, which is not imported.

    Raises:
        InvalidRequestError: there is neither.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory.resolve()
    if directory.exists():
        raise InvalidRequestError("path", f"{path} is a file; give the directory of a repository")
    if path.isidentifier():
        try:
            spec = importlib.util.find_spec(path)
        except ValueError:
            # Of a module that was not imported from anywhere, as `__main__`.
            spec = None
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    raise InvalidRequestError(
        "path", f"{path} is neither a directory nor an installed package with several files"
    )


def _draw(name: str, root: Path, sizes: Sizes, rng: random.Random) -> Repository:
    files = [
        TextFile(found.path, _unix(found.text))
        for found in text_files(root, _MAX_BYTES)
        if not isinstance(found, Skipped) and found.path.endswith(".py")
    ]
    rng.shuffle(files)
    subjects: list[Subject] = []
    for file in files:
        if len(subjects) == sizes.files:
            break
        if file.text.count("\n") < _LEAST_LINES:
            continue
        targets = _try_draw(file, sizes, rng)
        if targets and not _entangled(subjects, drawn := Subject(file, targets)):
            subjects.append(drawn)
    if not subjects:
        raise InvalidRequestError(
            "path",
            f"{root} has no Python file of {_LEAST_LINES} lines with a line, a block and a call to "
            "hide; name another",
        )
    subjects.sort(key=lambda subject: subject.file.path)
    taken = {subject.file.path for subject in subjects}
    others = [file for file in files if file.path not in taken]
    dropped = {file.path for file in others if _gives_away(file, subjects)}
    context = _context([f for f in others if f.path not in dropped], sorted(taken), sizes)
    if not context:
        raise InvalidRequestError(
            "path",
            f"{root} has no Python file left to teach ({len(dropped)} hold hidden text or are "
            "copies); name another, or fewer --files",
        )
    return Repository(name, context, tuple(subjects), tuple(sorted(dropped)))


def _entangled(subjects: Sequence[Subject], other: Subject) -> bool:
    """Whether one of them, taught after its targets were asked for, gives the other's away."""
    return _gives_away(other.file, subjects) or any(
        _gives_away(subject.file, [other]) for subject in subjects
    )


def _gives_away(file: TextFile, subjects: Sequence[Subject]) -> bool:
    text = Text(file.text)
    return any(gives_away(text, subject.file.text, subject.targets) for subject in subjects)


def _try_draw(file: TextFile, sizes: Sizes, rng: random.Random) -> tuple[Target, ...]:
    """Targets of all kinds, or none."""
    try:
        targets = draw_targets(file.text, sizes.targets, sizes.max_lines, rng)
    except (SyntaxError, ValueError, RecursionError):
        # Templates, Python 2 and test data that is broken on purpose are nothing to complete.
        return ()
    wanted = min(sizes.targets, len(KINDS))
    return targets if len({target.kind for target in targets}) == wanted else ()


def _context(
    files: Sequence[TextFile], subjects: Sequence[str], sizes: Sizes
) -> tuple[TextFile, ...]:
    """The files nearest to the subjects, as many as fit; the nearest last."""
    nearest = sorted(files, key=lambda file: -max(nearness(file.path, s) for s in subjects))
    chosen: list[TextFile] = []
    left = sizes.context_chars
    for file in nearest:
        text = whole_lines(file.text, min(sizes.file_chars, left))
        if text.strip():
            chosen.append(TextFile(file.path, text))
            left -= len(text)
    return tuple(reversed(chosen))


def nearness(path: str, other: str) -> int:
    """How many leading directories two files share."""
    here, there = PurePosixPath(path).parts[:-1], PurePosixPath(other).parts[:-1]
    pairs = zip(here, there, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def whole_lines(text: str, limit: int) -> str:
    """The beginning of a text: whole lines, at most `limit` characters."""
    return text if len(text) <= limit else text[: text.rfind("\n", 0, max(limit, 0)) + 1]


def left_context(text: str, end: int, limit: int) -> str:
    """What stands before `end`: whole lines (but for the last), about `limit` characters at most.

    A single line that is longer is cut in its middle. Lines without text don't stand alone, nor
    does the last line's indentation: they would tell nothing.
    """
    start = max(end - limit, 0)
    if start > 0:
        line = text.find("\n", start - 1, len(text[:end].rstrip())) + 1
        start = line if line > 0 else start
    return text[start:end]


def _unrelated(paths: Sequence[Path], count: int, seed: int) -> tuple[TextFile, ...]:
    if paths:
        texts = [(str(path), _read(path)) for path in paths]
    else:
        library = Path(os.__file__).parent
        modules = sorted(library.glob("[a-z]*.py"))
        chosen = random.Random(f"{seed}/unrelated").sample(modules, min(count, len(modules)))
        texts = [(f"stdlib/{path.name}", _read(path)) for path in chosen]
    return tuple(TextFile(name, whole_lines(text, _UNRELATED_LENGTH)) for name, text in texts)


def _read(path: Path) -> str:
    try:
        text = _unix(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("--unrelated", f"{path} can't be read: {error}") from error
    if not text.strip():
        raise InvalidRequestError("--unrelated", f"{path} is empty")
    return text


def _unix(text: str) -> str:
    """With the ends of lines that `ast` counts."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
