"""What a split was, as JSON, and whether a corpus that is loaded again is still the same."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ponderttt.errors import InvalidRequestError
from training.corpora.repository import Repository

if TYPE_CHECKING:
    from training.corpora.split import Split

FORMAT_VERSION = 1
_SETS = ("train", "validation", "test")
_SETTINGS = ("seed", "shares", "held_out", "threshold")


def of(split: Split) -> dict[str, Any]:
    """The record: settings, per set and repository its revision, number of documents and
    SHA-256 (after dropping), and the dropped documents."""
    return {
        "format_version": FORMAT_VERSION,
        "seed": split.seed,
        "shares": list(split.shares),
        "held_out": list(split.held_out),
        "threshold": split.threshold,
        "sets": {name: _entries(getattr(split, name)) for name in _SETS},
        "dropped": [asdict(each) for each in split.dropped],
    }


def _entries(repositories: Iterable[Repository]) -> list[dict[str, Any]]:
    return [
        {
            "name": each.name,
            "source": each.source,
            "revision": each.revision,
            "documents": len(each.documents),
            "sha256": each.sha256,
        }
        for each in repositories
    ]


def write(path: Path, split: Split) -> None:
    """Write the record; the file is either the old one or the whole new one.

    Raises:
        InvalidRequestError: the folder is missing or can't be written.
    """
    text = json.dumps(of(split), indent=2, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InvalidRequestError(
            "record", f"{path} can't be written: {error.strerror}; choose another folder"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """A record that `write` wrote.

    Raises:
        InvalidRequestError: the file can't be read, or is no whole record of this version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(
            "record", f"{path} can't be read: {error.strerror}; split the corpus again"
        ) from error
    except ValueError as error:
        raise InvalidRequestError(
            "record", f"{path} is damaged: {error}; split the corpus again"
        ) from error
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise InvalidRequestError(
            "record", f"{path} has format version {version!r}, not {FORMAT_VERSION}; split again"
        )
    if missing := {*_SETTINGS, "sets", "dropped"} - set(found):
        raise InvalidRequestError("record", f"{path} lacks {sorted(missing)}; split again")
    return dict(found)


def check(split: Split, recorded: Mapping[str, Any]) -> None:
    """Make sure that a split of a corpus loaded again is the recorded one.

    Where a source lies does not matter, only what was read from it.

    Raises:
        InvalidRequestError: a setting or a repository differs; names all of them.
    """
    now = of(split)
    differing = [
        f"{key} is {now[key]!r}, recorded {recorded[key]!r}"
        for key in _SETTINGS
        if now[key] != recorded[key]
    ]
    ours, theirs = _by_name(now["sets"]), _by_name(recorded["sets"])
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            differing.append(f"{name} is missing")
        elif name not in theirs:
            differing.append(f"{name} is not in the record")
        else:
            differing += [
                f"{name}: {key} is {value!r}, recorded {theirs[name].get(key)!r}"
                for key, value in ours[name].items()
                if key != "source" and value != theirs[name].get(key)
            ]
    if differing:
        raise InvalidRequestError(
            "corpus",
            f"it is not the recorded one: {'; '.join(differing)}. Load the recorded revisions, "
            "or split again",
        )


def _by_name(sets: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: {"set": name, **entry} for name in sets for entry in sets[name]}
