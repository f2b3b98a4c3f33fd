"""`installed:NAME` and `installed:*`: packages of this environment, read and never imported."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ponderttt.errors import InvalidRequestError
from training.corpora.directory import reader
from training.corpora.filters import Reason
from training.corpora.intake import File, Intake, Left
from training.corpora.repository import Repository

log = logging.getLogger(__name__)

#: This project: it must not be trained on what it is tested with.
OWN = frozenset({"ponderttt"})


def read(name: str, intake: Intake) -> Iterator[Repository]:
    """One package, by the name of its distribution or of what is imported, or all for `*`.

    What belongs to a package is what its installer recorded, so that packages which share a
    namespace stay apart. Packages in editable mode have no files in the environment.

    Returns:
        For `*`, in the order of their names, those of at least `limits.min_documents` documents.
    Raises:
        InvalidRequestError: the package is not installed, is in editable mode, or is our own, or
            several packages provide that name.
    """
    installed = _distributions()
    if name != "*":
        yield _repository(_one(name, installed), intake)
        return
    for each in sorted(installed):
        if each in OWN or _is_editable(installed[each]):
            log.debug("installed:*: %s is left out: our own, or in editable mode", each)
            continue
        repository = _repository(installed[each], intake)
        if len(repository.documents) >= intake.limits.min_documents:
            yield repository


def canonical(name: str) -> str:
    """A distribution's name as the packaging specifications normalise it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions() -> dict[str, metadata.Distribution]:
    found: dict[str, metadata.Distribution] = {}
    for each in metadata.distributions():
        # A broken installation has no name. The first on the path is the one that is imported.
        if name := each.metadata["Name"]:
            found.setdefault(canonical(name), each)
    return found


def _one(name: str, installed: dict[str, metadata.Distribution]) -> metadata.Distribution:
    names = {canonical(name)} & set(installed)
    if not names:
        names = {canonical(each) for each in metadata.packages_distributions().get(name, ())}
    if names & OWN:
        raise InvalidRequestError("corpus", f"installed:{name} is this project; give another")
    if not names:
        raise InvalidRequestError(
            "corpus",
            f"installed:{name} is not installed here; install it, or take index:{name}==VERSION",
        )
    if len(names) > 1:
        raise InvalidRequestError(
            "corpus", f"installed:{name} is several packages; name one of {sorted(names)}"
        )
    found = installed[names.pop()]
    if _is_editable(found):
        raise InvalidRequestError(
            "corpus", f"installed:{name} is in editable mode; give the path of its directory"
        )
    return found


def _is_editable(distribution: metadata.Distribution) -> bool:
    # PEP 610; the first line of the file is all that there is.
    url = distribution.read_text("direct_url.json")
    return url is not None and bool(json.loads(url).get("dir_info", {}).get("editable", False))


def _repository(distribution: metadata.Distribution, intake: Intake) -> Repository:
    name = canonical(distribution.metadata["Name"])
    return intake.repository(
        name, f"installed:{name}", _files(distribution), revision=distribution.version
    )


def _files(distribution: metadata.Distribution) -> Iterator[File | Left]:
    for entry in distribution.files or ():
        path = entry.as_posix()
        if entry.is_absolute() or ".." in entry.parts:
            # Scripts and manual pages, outside of the packages.
            yield Left(path, Reason.UNSAFE)
            continue
        located = Path(str(distribution.locate_file(entry)))
        if located.is_symlink() or not located.is_file():
            yield Left(path, Reason.IRREGULAR)
        else:
            yield File(path, located.stat().st_size, reader(located))
