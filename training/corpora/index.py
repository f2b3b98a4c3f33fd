"""`index:NAME==VERSION[#sha256=HEX]`: one release of a package index, read and never installed.

pip fetches it, so its settings (mirrors, proxies, certificates) hold. What was fetched once stays
in the cache and is read from there.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from ponderttt.errors import InvalidRequestError, ModelError
from ponderttt.models.download import pip_download
from training.corpora import archives
from training.corpora.installed import canonical
from training.corpora.intake import Intake
from training.corpora.repository import Repository

_SPEC = re.compile(
    r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


def read(spec: str, intake: Intake) -> Iterator[Repository]:
    """The one repository of a release.

    Raises:
        InvalidRequestError: no exact version is named, it can't be fetched, its SHA-256 is
            another than the one given, or the file is damaged.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InvalidRequestError(
            "corpus",
            f"index:{spec} names no exact release; write index:NAME==VERSION, so that everybody "
            "gets the same text (#sha256=HEX may follow)",
        )
    name, version = canonical(match["name"]), match["version"]
    archive = _archive(name, version, intake)
    found = sha256_of(archive)
    if match["sha256"] not in (None, found):
        raise InvalidRequestError(
            "corpus",
            f"{archive} has SHA-256 {found}, not {match['sha256']}; correct the spec, or delete "
            "the file to have it fetched again",
        )
    files = archives.files(archive, intake.limits.archive_bytes)
    yield intake.repository(name, f"index:{spec}", files, revision=version)


def cache_folder(cache: Path, name: str, version: str) -> Path:
    """Where a release lies once it is fetched; a file put there by hand is used as it is."""
    return cache / "corpora" / "index" / f"{canonical(name)}=={version}"


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _archive(name: str, version: str, intake: Intake) -> Path:
    folder = cache_folder(intake.cache, name, version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if found := _archives_in(folder):
                return found[0]
            # Beside its place, so that only a whole file ever gets there.
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                fetched = _fetch(f"{name}=={version}", Path(work), intake.allow_sdist)
                os.replace(fetched, folder / fetched.name)
            return folder / fetched.name
    except OSError as error:
        raise InvalidRequestError(
            "corpus", f"{folder} can't be written: {error}; choose another cache directory"
        ) from error


def _archives_in(folder: Path) -> list[Path]:
    # Wheels first, as when fetching.
    found = (each for each in folder.iterdir() if each.name.endswith(archives.SUFFIXES))
    return sorted(found, key=lambda path: (path.suffix != ".whl", path.name))


def _fetch(requirement: str, directory: Path, allow_sdist: bool) -> Path:
    try:
        return pip_download(requirement, directory, progress=False)
    except ModelError as error:
        if allow_sdist:
            return _fetch_sdist(requirement, directory)
        raise InvalidRequestError(
            "corpus",
            f"index:{requirement} can't be had as a wheel: {error}. Check version and network; a "
            "release without wheels needs sources allowed explicitly, since pip runs their "
            "build script",
        ) from error


def _fetch_sdist(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = _archives_in(directory)
    if done.returncode != 0 or not found:
        words = " ".join(done.stderr.split())[-600:]
        raise InvalidRequestError(
            "corpus", f"index:{requirement} can't be had: {words}; check version and network"
        )
    return found[0]
