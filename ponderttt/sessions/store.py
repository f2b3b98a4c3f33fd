"""Stored sessions: a directory per session, in it a directory per kept version.

    <root>/my-repo/v00000042/adapter_config.json         a PEFT adapter, which peft
    <root>/my-repo/v00000042/adapter_model.safetensors   and vLLM load as it is
    <root>/my-repo/v00000042/optimizer.safetensors
    <root>/my-repo/v00000042/session.json                written last: the commit
    <root>/~locks/my-repo                                who uses the session now

A version is there once its `session.json` is; it names the other files with their SHA-256. What
changes without a new version (the ledger, when a chunk is skipped) replaces `session.json` alone.
So a crash at any instant leaves the last commit, and the newest version that verifies is the
current one. Before a session is deleted it is marked, and is gone from then on; a deletion that was
cut short is finished by whoever opens the store next.

The store itself keeps no state; who calls it holds the session's lock (see `locks.py`).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ponderttt.errors import (
    AdapterFormatError,
    ConflictError,
    DamagedSessionError,
    NotFoundError,
    StoreError,
)
from ponderttt.fast_weights.bank import AdapterState
from ponderttt.sessions.codec import STATE_FILES, StateCodec
from ponderttt.sessions.files import Files
from ponderttt.sessions.names import is_session_id, key_id_of, plain_name, qualified_name
from ponderttt.sessions.record import RECORD_FILE, Facts, RecordError, StoredFile

_LOG = logging.getLogger(__name__)

_VERSION = re.compile(r"v(\d{8,16})")
_DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A session as it was read.

    Args:
        facts, state: of the newest version that verifies.
        kept: committed versions, ascending.
        damaged: what is wrong with newer versions, if anything.
    """

    facts: Facts
    state: AdapterState
    kept: tuple[int, ...]
    damaged: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """The session's from now on: a version that was lost keeps its number to itself."""
        return max(self.kept) + 1 if self.damaged else self.facts.version

    @property
    def nbytes(self) -> int:
        """Bytes of the files that were read, `session.json` not counted."""
        return sum(file.bytes for file in self.facts.files.values())


@dataclass(frozen=True, slots=True)
class Commit:
    """What a commit wrote, in bytes, and the versions that are kept after it."""

    nbytes: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """A store's sessions.

    Args:
        readable: facts and kept versions of those that can be read, oldest first.
        unreadable: what is wrong with the others, by id.
        deleted: ids of those whose deletion was cut short, or is under way.
    """

    readable: list[tuple[Facts, tuple[int, ...]]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)


class SessionStore:
    """Reads and writes stored sessions. Thread-safe for different sessions.

    Args:
        files: where.
        codec: of the fast weights.
        keep: versions that are kept of each session, snapshots not counted.
    """

    def __init__(self, files: Files, codec: StateCodec, keep: int) -> None:
        self.files = files
        self.codec = codec
        self._keep = keep

    def listing(self) -> Listing:
        """All sessions, without their tensors."""
        listing = Listing()
        for directory in self.files.names():
            name = _name_of(directory)
            if name is None:
                continue
            try:
                if self.is_marked(name):
                    listing.deleted.append(name)
                    continue
                listing.readable.append(self._usable(name))
            except NotFoundError:
                continue  # its first commit was cut short
            except (DamagedSessionError, StoreError) as error:
                # One that can't be read keeps none of the others away.
                listing.unreadable[name] = str(error)
        listing.readable.sort(key=lambda each: each[0].created)
        return listing

    def _usable(self, name: str) -> tuple[Facts, tuple[int, ...]]:
        facts = self.peek(name)
        self._check_model(facts)
        return facts, self._committed(name)

    def exists(self, name: str) -> bool:
        """Whether a version of the session has been committed."""
        return bool(self._committed(name))

    def peek(self, name: str) -> Facts:
        """The newest `session.json` that verifies; its tensors are not looked at.

        Raises:
            NotFoundError: no such session.
            DamagedSessionError: there is one, but none of its records can be read.
        """
        problems = []
        for version in reversed(self._committed(name)):
            try:
                return self._facts(name, version)
            except RecordError as error:
                problems.append(f"{_version_dir(name, version)}: {error}")
        raise _nothing_left(name, problems)

    def load(self, name: str, version: int | None = None) -> Loaded:
        """A session's newest version that verifies, or the version asked for.

        Raises:
            NotFoundError: no such session, or version.
            DamagedSessionError: no version can be read, or it was made for another model.
            StoreError: the store fails.
        """
        kept = self._committed(name)
        if version is not None and version not in kept:
            raise NotFoundError("version", _not_kept(name, version, kept))
        problems: list[str] = []
        for candidate in (version,) if version is not None else reversed(kept):
            try:
                facts, state = self._read(name, candidate)
            except (RecordError, AdapterFormatError) as error:
                if version is not None and not self._is_committed(name, version):
                    # A commit has made it one too many while it was read.
                    remaining = self._committed(name)
                    raise NotFoundError("version", _not_kept(name, version, remaining)) from error
                problems.append(f"{_version_dir(name, candidate)}: {error}")
                _LOG.warning("session %s, version %d is damaged: %s", name, candidate, error)
                continue
            return Loaded(facts, state, kept, tuple(problems))
        raise _nothing_left(name, problems)

    def commit(
        self,
        facts: Facts,
        state: AdapterState | None,
        check: Callable[[], None] = lambda: None,
    ) -> Commit:
        """Write a version; it is there, and stays, once this has returned.

        Args:
            facts: of the session.
            state: its tensors; None where this version's are stored already.
            check: called before each file is written; what it raises prevents the commit.
        Raises:
            StoreError: the store fails; what was committed before is as it was.
            ConflictError: another server has stored this version; not on local disk.
            RecordError: without a state, and the stored version can't be read.
        """
        try:
            stored = self._write_tensors(facts, state, check) if state is not None else None
            nbytes = sum(file.bytes for file in stored.values()) if stored is not None else 0
            if stored is None:
                stored = self._facts(facts.id, facts.version).files
            record = facts.model_copy(update={"files": stored}).to_json()
            check()
            self._write_record(facts, stored, record, is_new=state is not None)
        except StoreError:
            self._clear_away(facts)
            raise
        return Commit(nbytes + len(record), self._prune(facts))

    def _write_tensors(
        self, facts: Facts, state: AdapterState, check: Callable[[], None]
    ) -> dict[str, StoredFile]:
        directory, stored = _version_dir(facts.id, facts.version), {}
        is_new = not self.files.names(directory_of(facts.id))
        for name, data in self.codec.encode(state).items():
            check()
            self.files.write(f"{directory}/{name}", data)
            digest = hashlib.sha256(data).hexdigest()
            stored[name] = StoredFile(bytes=len(data), sha256=digest)
        self.files.sync(directory, directory_of(facts.id), *([""] if is_new else []))
        return stored

    def _write_record(
        self, facts: Facts, stored: dict[str, StoredFile], record: bytes, *, is_new: bool
    ) -> None:
        path = f"{_version_dir(facts.id, facts.version)}/{RECORD_FILE}"
        if is_new and not self.files.is_local:
            # Leases end; a server that stood still since `check` must not undo another's commit.
            if self.files.create(path, record):
                return
            if not self._has_record_of(facts, stored):
                raise ConflictError(
                    "session",
                    f"version {facts.version} of session {facts.id!r} was stored by another server",
                )
        self.files.replace(path, record)

    def _has_record_of(self, facts: Facts, stored: dict[str, StoredFile]) -> bool:
        """Whether the version's record names these files, or is of no use to anybody."""
        try:
            return self._facts(facts.id, facts.version).files == stored
        except RecordError:
            return True

    def _clear_away(self, facts: Facts) -> None:
        """What a failed commit left of a version that is not there: it may fill up the disk."""
        try:
            if not self._is_committed(facts.id, facts.version):
                self.files.remove(_version_dir(facts.id, facts.version))
        except StoreError as error:
            _LOG.debug("%s is not cleared away: %s", _version_dir(facts.id, facts.version), error)

    def is_marked(self, name: str) -> bool:
        """Whether a deletion of the session has begun and not ended."""
        return _DELETED in self.files.names(directory_of(name))

    def delete(self, name: str) -> None:
        """Delete a session with all its versions; nothing where it does not exist."""
        directory = directory_of(name)
        if not self.files.names(directory):
            return
        # Were it cut short without the mark, an older version would come back.
        self.files.replace(f"{directory}/{_DELETED}", b"")
        for each in self.files.names(directory):
            if each != _DELETED:
                self.files.remove(f"{directory}/{each}")
        self.files.sync(directory)
        self.files.remove(directory)
        self.files.sync("")

    def _versions(self, name: str) -> list[int]:
        """All that there is of a session, committed or not, ascending."""
        found = self.files.names(directory_of(name))
        if _DELETED in found:
            return []
        return sorted(int(m[1]) for m in map(_VERSION.fullmatch, found) if m is not None)

    def _committed(self, name: str) -> tuple[int, ...]:
        return tuple(v for v in self._versions(name) if self._is_committed(name, v))

    def _is_committed(self, name: str, version: int) -> bool:
        return RECORD_FILE in self.files.names(_version_dir(name, version))

    def _facts(self, name: str, version: int) -> Facts:
        text = self.files.read(f"{_version_dir(name, version)}/{RECORD_FILE}")
        if text is None:
            raise RecordError(f"{RECORD_FILE} is missing")
        facts = Facts.from_json(text)
        if (facts.id, facts.version) != (name, version):
            raise RecordError(f"{RECORD_FILE} is of {facts.id!r}, version {facts.version}")
        return facts

    def _read(self, name: str, version: int) -> tuple[Facts, AdapterState]:
        facts = self._facts(name, version)
        self._check_model(facts)
        directory = _version_dir(name, version)
        contents = {}
        for file, stored in facts.files.items():
            data = self.files.read(f"{directory}/{file}") if file in STATE_FILES else None
            if data is None:
                raise RecordError(f"{file} is missing")
            if len(data) != stored.bytes or hashlib.sha256(data).hexdigest() != stored.sha256:
                raise RecordError(f"{file} does not match its checksum")
            contents[file] = data
        return facts, self.codec.decode(contents, directory)

    def _check_model(self, facts: Facts) -> None:
        if facts.model != self.codec.model:
            raise DamagedSessionError(
                f"session {facts.id!r} was made for the model {facts.model!r}; this server serves "
                f"{self.codec.model!r}. Use another session, or serve that model"
            )
        mine, theirs = self.codec.layout.model_dump(), facts.layout.model_dump()
        for field_name, value in theirs.items():
            if mine[field_name] != value:
                raise DamagedSessionError(
                    f"session {facts.id!r} was made with {field_name} = {value!r} of the fast "
                    f"weights; this server has {mine[field_name]!r}. Use another session, or "
                    "start the server as it was (--rank, --alpha, --adaptive-layers, --targets)"
                )

    def _prune(self, facts: Facts) -> tuple[int, ...]:
        """Delete what need not be kept; the versions that are."""
        kept: list[int] = []
        for version in reversed(self._versions(facts.id)):
            wanted = len(kept) < self._keep or version in facts.pinned
            if version == facts.version or (wanted and self._is_committed(facts.id, version)):
                kept.append(version)
                continue
            directory = _version_dir(facts.id, version)
            # The commit first: half a version must not pass for a whole one.
            self.files.remove(f"{directory}/{RECORD_FILE}")
            self.files.remove(directory)
        return tuple(reversed(kept))


def directory_of(name: str) -> str:
    """A session's directory. Ids that some file systems would confuse get a suffix of their own.

    Raises:
        NotFoundError: not a session's id; nothing else may become part of a path.
    """
    if not is_session_id(name):
        raise _nothing_left(name, [])
    key_id, plain = key_id_of(name), plain_name(name)
    directory = plain
    if plain != plain.lower() or plain.endswith("."):
        directory = f"{plain}~{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
    # No file system minds it, and no session's id has it.
    return directory if key_id is None else f"{key_id}@{directory}"


def _name_of(directory: str) -> str | None:
    """The session whose directory this is, or None."""
    owner, _, rest = directory.rpartition("@")
    name = qualified_name(owner or None, rest.split("~", 1)[0])
    return name if is_session_id(name) and directory_of(name) == directory else None


def _version_dir(name: str, version: int) -> str:
    return f"{directory_of(name)}/v{version:08d}"


def _not_kept(name: str, version: int, kept: tuple[int, ...]) -> str:
    versions = ", ".join(map(str, kept)) or "none"
    return f"version {version} of session {name!r} is not kept; kept are {versions}"


def _nothing_left(name: str, problems: list[str]) -> Exception:
    if not problems:
        return NotFoundError(
            "session", f"session {name!r} does not exist; create it with POST /v1/sessions"
        )
    return DamagedSessionError(
        f"session {name!r} can't be read ({problems[0]}); restore its directory from a backup, or "
        "delete it"
    )
