"""Loading repositories from where they are; every source has a prefix.

    PATH                              a local directory
    git:PATH-OR-URL[@REV]             the tracked files of one commit
    installed:NAME  installed:*       packages of this environment (offline)
    index:NAME==VERSION[#sha256=HEX]  one release of a package index
    stack:DATASET[:CONFIG]            The Stack, or one like it, from the hub or a local file

Nothing that is loaded is ever installed, imported or run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ponderttt import config
from ponderttt.errors import InvalidRequestError
from training.corpora import directory, git, index, installed, languages, stack
from training.corpora.filters import Limits
from training.corpora.intake import Intake
from training.corpora.repository import Repository

log = logging.getLogger(__name__)

_READERS: dict[str, Callable[[str, Intake], Iterator[Repository]]] = {
    "git": git.read,
    "installed": installed.read,
    "index": index.read,
    "stack": stack.read,
}
_DEFAULT_LIMITS = Limits()


def load(
    spec: str,
    *,
    languages: Sequence[str] = languages.DEFAULT,
    cache: Path | None = None,
    limits: Limits = _DEFAULT_LIMITS,
    allow_sdist: bool = False,
) -> Iterator[Repository]:
    """The repositories of one source, as they are read; those without documents are left out.

    Args:
        spec: as above.
        languages: names out of `languages.LANGUAGES`.
        cache: directory for what is fetched; None: `ponderttt.config.cache_dir()`.
        limits: on what is read.
        allow_sdist: whether `index:` may take a release that has no wheel. pip then runs the
            build script of the release to learn its metadata.
    Raises:
        InvalidRequestError: the spec is malformed or can't be loaded; says what to do.
    """
    intake = Intake(_checked(languages), limits, cache or config.cache_dir(), allow_sdist)
    kind, colon, rest = spec.partition(":")
    if not (rest if colon and kind in _READERS else spec).strip():
        raise InvalidRequestError("corpus", f"{spec!r} names no source; give a directory or spec")
    reader = _READERS.get(kind) if colon else None
    for repository in reader(rest, intake) if reader else directory.read(spec, intake):
        if repository.documents:
            yield repository
        else:
            log.warning("%s has no documents in %s", repository.name, ", ".join(languages))


def load_all(
    specs: Sequence[str],
    *,
    languages: Sequence[str] = languages.DEFAULT,
    cache: Path | None = None,
    limits: Limits = _DEFAULT_LIMITS,
    allow_sdist: bool = False,
    progress: bool = True,
) -> list[Repository]:
    """All repositories of some sources, sorted by name.

    Args:
        specs: each as for `load`.
        languages, cache, limits, allow_sdist: as for `load`.
        progress: whether to show a progress bar on stderr, where that is a terminal.
    Raises:
        InvalidRequestError: a source can't be loaded, two repositories have the same name, or
            there is no document at all.
    """
    found: dict[str, Repository] = {}
    # None: only on a terminal.
    with tqdm(desc="corpora", unit=" repositories", disable=None if progress else True) as bar:
        for spec in specs:
            for each in load(
                spec, languages=languages, cache=cache, limits=limits, allow_sdist=allow_sdist
            ):
                if each.name in found:
                    raise InvalidRequestError(
                        "corpus",
                        f"two repositories are called {each.name!r} ({found[each.name].source} "
                        f"and {each.source}); leave one out, or rename its directory",
                    )
                found[each.name] = each
                bar.set_postfix_str(each.name, refresh=False)
                bar.update()
    if not found:
        raise InvalidRequestError(
            "corpus",
            f"no documents in {', '.join(languages)} in {', '.join(specs) or 'no sources'}; give "
            "other sources or languages (the log tells what was left out, and why)",
        )
    return [found[name] for name in sorted(found)]


def _checked(names: Sequence[str]) -> frozenset[str]:
    return frozenset(languages.checked_languages(tuple(names)))
