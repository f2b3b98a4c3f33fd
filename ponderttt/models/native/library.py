"""Compiling and loading the C sources."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from ponderttt.config import cache_dir

_LOG = logging.getLogger(__name__)
_HEADERS = ("lanes.h", "kernels.h")
_SOURCES = ("products.c", "attention.c", "elementwise.c", "blocks.c", "encode.c")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp")
# Where kernels are compiled beforehand, for machines without a compiler, such as a container.
_PACKAGE = Path(__file__).parent

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_BLOCKS = [_POINTER, _LONG, _LONG, _POINTER, _POINTER, *[_LONG] * 3, _POINTER, _POINTER]
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ponderttt_product": (
        None,
        [_POINTER, _LONG, _LONG, _POINTER, *[_LONG] * 4, *[_POINTER] * 3, _LONG],
    ),
    "ponderttt_add_rms_norm": (
        None,
        [
            *[_POINTER, _LONG] * 2,
            *[_LONG] * 2,
            _POINTER,
            _FLOAT,
            *[_POINTER] * 2,
            _LONG,
        ],
    ),
    "ponderttt_rms_norm_back": (
        None,
        [_POINTER, _LONG, _LONG, _POINTER, _FLOAT, *[_POINTER, _LONG] * 2, _POINTER, _LONG],
    ),
    "ponderttt_silu_gate": (
        None,
        [_POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG],
    ),
    "ponderttt_silu_gate_back": (
        None,
        [*[_POINTER, _LONG] * 3, *[_LONG] * 2, *[_POINTER] * 2, _LONG],
    ),
    "ponderttt_rotate": (None, [_POINTER, *[_LONG] * 3, *[_POINTER] * 2, _LONG]),
    "ponderttt_blocks": (
        None,
        [*_BLOCKS, _FLOAT, *[_POINTER] * 7, _LONG],
    ),
    "ponderttt_encode": (
        _LONG,
        [_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _LONG],
    ),
    "ponderttt_attend": (
        None,
        [*[_POINTER, _LONG] * 3, *[_POINTER] * 5, *[_LONG] * 3, _FLOAT, _POINTER, _LONG],
    ),
}


class NativeUnavailableError(RuntimeError):
    """The kernels cannot be had on this machine; the message says why."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled once per machine and version; None where there are none (logged)."""
    # The vectors work on other machines, too, but oneDNN is faster there.
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        _LOG.info("going on without kernels in C: this CPU has no AVX-512")
        return None
    try:
        return load()
    except NativeUnavailableError as error:
        _LOG.info("going on without kernels in C: %s", error)
        return None


def identity() -> str | None:
    """Of the kernels in use, by their sources; None where there are none."""
    return _digest() if library() is not None else None


def load() -> ctypes.CDLL:
    """Compile what isn't in the cache, and load it; else take what was compiled beforehand.

    Raises:
        NativeUnavailableError: there is no gcc, it fails, or the result can't be loaded, and
            nothing was compiled beforehand from these sources.
    """
    try:
        path = _built(_compiler())
        try:
            return _opened(path)
        except NativeUnavailableError:
            # Damaged, perhaps.
            path.unlink(missing_ok=True)
            return _opened(_built(_compiler()))
    except (NativeUnavailableError, OSError) as error:
        if (beforehand := _prebuilt()).is_file():
            return _opened(beforehand)
        if isinstance(error, OSError):
            raise NativeUnavailableError(f"{cache_dir() / 'native'}: {error}") from error
        raise


def prebuild() -> Path:
    """Compile for any CPU with AVX-512, into the package, for use where there is no compiler.

    Raises:
        NativeUnavailableError: there is no gcc, it fails, or the package can't be written.
    """
    target = _prebuilt()
    try:
        _compile(_compiler(), "x86-64-v4", target)
    except OSError as error:
        raise NativeUnavailableError(f"{target.parent}: {error}") from error
    return target


def _prebuilt() -> Path:
    # By the sources, since older code would be called with the wrong arguments.
    return _PACKAGE / f"kernels-{_digest()}.so"


def _opened(path: Path) -> ctypes.CDLL:
    try:
        # Its OpenMP calls go to the runtime that torch has loaded, so both share one pool of
        # threads: two pools would wait for each other's cores.
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} can't be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is None:
            raise NativeUnavailableError(f"{path} has no {name}")
        function.restype, function.argtypes = result, arguments
    return found


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    if shutil.which(command[0]) is None:
        raise NativeUnavailableError(
            f"no compiler: {command[0]} is not installed (or set CC to a gcc)"
        )
    return command


def _built(compiler: list[str]) -> Path:
    target = cache_dir() / "native" / f"kernels-{_digest(_version(compiler), _cpu())}.so"
    if not target.is_file():
        _compile(compiler, "native", target)
    return target


def _digest(*further: str) -> str:
    digest = hashlib.sha256()
    for part in (*_texts().values(), *_FLAGS, *further):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _texts() -> dict[str, str]:
    sources = files("ponderttt.models") / "native"
    return {name: (sources / name).read_text("utf-8") for name in (*_HEADERS, *_SOURCES)}


def _compile(compiler: list[str], architecture: str, target: Path) -> None:
    """Whole or not at all: others may be about to load it, or to compile it as well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        for name, text in _texts().items():
            (Path(work) / name).write_text(text, "utf-8")
        _run([*compiler, *_FLAGS, f"-march={architecture}", "-c", *_SOURCES], work)
        # Without -fopenmp, which would link a second OpenMP runtime.
        objects = [name.replace(".c", ".o") for name in _SOURCES]
        _run([*compiler, "-shared", *objects, "-o", target.name, "-lm"], work)
        os.replace(Path(work) / target.name, target)


def _run(command: list[str], directory: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailableError(f"{command[0]} did not end within 120 s") from error
    except OSError as error:
        raise NativeUnavailableError(f"{command[0]} can't be run: {error}") from error
    if done.returncode:
        raise NativeUnavailableError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _version(compiler: list[str]) -> str:
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{compiler[0]} can't be run: {error}") from error
    return done.stdout


def _cpu() -> str:
    """What `-march=native` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
