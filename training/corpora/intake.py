"""From the files that a source offers to a repository of documents, with a count of the rest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from training.corpora import duplicates
from training.corpora.filters import Limits, Reason, decoded, path_reason
from training.corpora.languages import language_of
from training.corpora.repository import Document, Repository, content_sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class File:
    """A file that a source offers; it is read only if its path and size are right.

    Args:
        path: relative to the repository, with `/`.
        size: bytes, as the source states them; not relied on.
        read: gives the first so many bytes. Called at once or never.
    """

    path: str
    size: int
    read: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Left:
    """A file or folder that the source itself left out."""

    path: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Intake:
    """What all sources share.

    Args:
        languages: documents in others are left out.
        limits: on what is read.
        cache: directory for what is fetched; may not exist yet.
        allow_sdist: whether `index:` may take source packages, whose build script pip runs.
    """

    languages: frozenset[str]
    limits: Limits
    cache: Path
    allow_sdist: bool = False

    def repository(
        self,
        name: str,
        source: str,
        files: Iterable[File | Left],
        *,
        revision: str | None = None,
        built: bool = False,
    ) -> Repository:
        """Read the files worth reading; say in one line of the log what was left out, and why.

        Args:
            name: of the repository.
            source: the spec it comes from.
            files: in any order; of two with one path the first counts.
            revision: None: the hash of the content.
            built: whether folders that builds leave behind are left out.
        Returns:
            The repository, its documents sorted by path; perhaps none.
        """
        found: dict[str, Document] = {}
        left: Counter[str] = Counter()
        for each in files:
            result = each.reason if isinstance(each, Left) else self._document(each, built)
            if isinstance(result, Document) and result.path in found:
                result = Reason.COPY
            if isinstance(result, Reason):
                log.debug("%s: %s is left out: %s", name, each.path, result.value)
                left[result.value] += 1
            else:
                found[result.path] = result
        kept, copies = duplicates.without_copies(found[path] for path in sorted(found))
        for copy in copies:
            log.debug("%s: %s is left out: %s", name, copy.path, Reason.COPY.value)
            left[Reason.COPY.value] += 1
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()))
        log.info("%s: %d documents; left out: %s", name, len(kept), reasons or "nothing")
        return Repository(name, source, kept, revision or f"sha256:{content_sha256(kept)}")

    def _document(self, file: File, built: bool) -> Document | Reason:
        if reason := path_reason(file.path, built=built):
            return reason
        language = language_of(file.path)
        if language is None or language not in self.languages:
            return Reason.LANGUAGE
        if file.size > self.limits.file_bytes:
            return Reason.TOO_LARGE
        try:
            text = decoded(file.read(self.limits.file_bytes + 1), self.limits)
        except OSError:
            return Reason.UNREADABLE
        return text if isinstance(text, Reason) else Document(file.path, text, language)
