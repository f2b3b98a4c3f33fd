"""`git:PATH-OR-URL[@REV]`: the tracked files of one commit, exactly as they were committed.

They are read out of the object database (`ls-tree`, `cat-file`), not by `git archive`, which
leaves out and rewrites what the commit's attributes tell it to. Nothing is checked out.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from filelock import FileLock

from ponderttt.errors import InvalidRequestError
from training.corpora.filters import Reason
from training.corpora.intake import File, Intake, Left
from training.corpora.repository import Repository

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*", re.IGNORECASE)
_SCP_LIKE = re.compile(r"[^/:]+@[^/:]+:")
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REVISION = re.compile(r"[\w./^~+#-]+")


def read(spec: str, intake: Intake) -> Iterator[Repository]:
    """The one repository of a commit; a remote one is fetched shallowly into the cache.

    A full commit that is in the cache is not fetched again, so it can be read offline.

    Raises:
        InvalidRequestError: git is missing, there is no such repository or revision, or it can't
            be fetched.
    """
    location, revision, remote = split_spec(spec)
    if revision.startswith("-") or not _REVISION.fullmatch(revision):
        raise InvalidRequestError("corpus", f"{revision!r} is no git revision; name one after @")
    if remote:
        directory, revision = _fetched(location, revision, intake.cache)
    else:
        directory = Path(location).expanduser()
        if not directory.is_dir():
            raise InvalidRequestError(
                "corpus", f"git:{location} is no directory; give a git repository, or its URL"
            )
    commit = _git(directory, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    name = directory.resolve().name if not remote else re.split(r"[/:]", location.rstrip("/"))[-1]
    source = f"git:{_without_credentials(location)}"
    with _Blobs(directory) as blob:
        files = _files(directory, commit.decode().strip(), blob)
        yield intake.repository(
            name.removesuffix(".git"), source, files, revision=commit.decode().strip()
        )


def split_spec(spec: str) -> tuple[str, str, bool]:
    """Location, revision (`HEAD` where none is named), and whether the location is a URL."""
    start = _URL.match(spec) or _SCP_LIKE.match(spec)
    if start is None and Path(spec).expanduser().exists():
        return spec, "HEAD", False
    head, rest = (spec[: start.end()], spec[start.end() :]) if start else ("", spec)
    location, at, revision = rest.rpartition("@")
    location, revision = (location, revision) if at else (rest, "HEAD")
    return head + location, revision, start is not None


def _fetched(url: str, revision: str, cache: Path) -> tuple[Path, str]:
    directory = cache / "corpora" / "git" / hashlib.sha256(url.encode()).hexdigest()[:32]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):
            if not (directory / "HEAD").exists():
                _git(directory, "init", "--quiet", "--bare", ".")
            if _COMMIT.fullmatch(revision) and _has(directory, revision):
                return directory, revision
            _git(directory, "fetch", "--quiet", "--depth=1", "--no-tags", "--", url, revision)
            fetched = _git(directory, "rev-parse", "--verify", "FETCH_HEAD^{commit}")
    except OSError as error:
        raise InvalidRequestError(
            "corpus", f"{directory} can't be written: {error}; choose another cache directory"
        ) from error
    return directory, fetched.decode().strip()


def _files(
    directory: Path, commit: str, blob: Callable[[str, int], bytes]
) -> Iterator[File | Left]:
    # -z: names as they are, ended by NUL.
    for entry in _git(directory, "ls-tree", "-r", "-z", "--long", commit).split(b"\0")[:-1]:
        meta, _, raw = entry.partition(b"\t")
        mode, _kind, sha, size = meta.decode().split()
        path = raw.decode("utf-8", "backslashreplace")
        if mode in ("100644", "100755"):
            yield File(path, int(size), partial(blob, sha))
        else:
            yield Left(path, Reason.IRREGULAR)


class _Blobs:
    """Reads blobs through one process of git while it is open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Callable[[str, int], bytes]:
        self._process = subprocess.Popen(
            _command(self._directory, "cat-file", "--batch"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=_environment(),
        )  # fmt: skip
        return self._read

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _read(self, sha: str, limit: int) -> bytes:
        to, of = _pipe(self._process.stdin), _pipe(self._process.stdout)
        to.write(f"{sha}\n".encode())
        to.flush()
        header = of.readline().split()
        if len(header) != 3:
            raise InvalidRequestError(
                "corpus",
                f"{self._directory} lacks the object {sha}; `git fetch` or clone it again",
            )
        content = of.read(int(header[2]))
        of.read(1)
        return content[:limit]


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("git was started without its pipes")
    return pipe


def _has(directory: Path, commit: str) -> bool:
    done = subprocess.run(
        _command(directory, "cat-file", "-e", f"{commit}^{{tree}}"),
        env=_environment(), capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


def _git(directory: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(
            _command(directory, *arguments),
            env=_environment(), capture_output=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InvalidRequestError("corpus", "git: needs git on the path; install it") from error
    if done.returncode != 0:
        words = _without_credentials(" ".join(done.stderr.decode(errors="replace").split()))
        raise InvalidRequestError(
            "corpus",
            f"git {arguments[0]} failed: {words[-600:]}; check repository, revision and network",
        )
    return done.stdout


def _command(directory: Path, *arguments: str) -> list[str]:
    return ["git", "-C", str(directory), *arguments]


def _environment() -> dict[str, str]:
    # Inside a hook of git, GIT_DIR and the like would point at that other repository.
    kept = {"GIT_SSH", "GIT_SSH_COMMAND", "GIT_SSL_CAINFO", "GIT_ASKPASS", "GIT_EXEC_PATH"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in kept}
    return {**clean, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def _without_credentials(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
