"""Finding a model: a local directory, an embedded model, or a name on the hub.

`resolve` gives a directory in the Hugging Face layout (config, safetensors, tokenizer) for
anything that `--model` takes. Embedded models live in `<cache>/models/<name>`, converted once.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ponderttt import config
from ponderttt.errors import ModelError
from ponderttt.models import convert, download, hub
from ponderttt.models.embedded import EMBEDDED, EmbeddedModel

# The scales of the PonderTTT paper, by size.
ALIASES = {
    "125m": "openai-community/gpt2",
    "350m": "openai-community/gpt2-medium",
    "1b": "openai-community/gpt2-large",
}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def resolve(name_or_path: str, *, progress: bool = True, offline: bool = False) -> Path:
    """The directory of a model's config, safetensors and tokenizer, fetched where it is missing.

    Args:
        name_or_path: a directory, an embedded model (`smollm2-135m`, `qwen2.5-coder-0.5b`), a
            scale (`125m`, `350m`, `1b`), or a name on the hub (`owner/model`).
        progress: whether to tell on stderr what takes time.
        offline: use only what is on this machine.
    Raises:
        ModelError: there is no such model, it can't be fetched or verified, or it has no
            safetensors; says what was tried and what to do.
    """
    if not name_or_path:
        raise ModelError(f"the model's name is empty: give a directory, {_choices()}")
    path = Path(name_or_path).expanduser()
    if (path / "config.json").is_file():
        return checked_directory(path)
    if model := EMBEDDED.get(name_or_path):
        return fetch_embedded(model, progress=progress, offline=offline)
    repository = ALIASES.get(name_or_path, name_or_path)
    if path.exists() and name_or_path not in ALIASES:
        raise ModelError(
            f"{path} is not a model: give a directory with config.json, safetensors and tokenizer"
        )
    if _looks_like_a_path(name_or_path):
        raise ModelError(f"there is no {name_or_path}: give a directory that exists, {_choices()}")
    if not _HUB_NAME.fullmatch(repository):
        raise ModelError(
            f"{name_or_path!r} is neither a directory nor a name a hub could have: give a "
            f"directory that exists, {_choices()}"
        )
    return checked_directory(hub.download_model(repository, progress=progress, offline=offline))


def model_directory(model: EmbeddedModel) -> Path:
    """Where an embedded model lives once it is converted."""
    return config.cache_dir() / "models" / model.name


def installed(model: EmbeddedModel) -> Path | None:
    """An embedded model's directory, or None where it is missing or damaged."""
    directory = model_directory(model)
    return directory if convert.is_converted(model, directory) else None


def fetch_embedded(
    model: EmbeddedModel,
    *,
    progress: bool = True,
    offline: bool = False,
    sources: download.Sources | None = None,
) -> Path:
    """An embedded model's directory; fetched, verified and converted where it is missing.

    Only one process at a time works on a model; the others wait and use what it made. An
    interrupted fetch goes on where it stopped.

    Raises:
        ModelError: it is missing and `offline` is set, no source has it, or the cache directory
            can't be written.
    """
    if found := installed(model):
        return found
    if offline:
        raise ModelError(
            f"{model.name} is not on this machine and offline was asked for: run "
            f"`ponderttt models fetch {model.name}` with a network"
        )
    try:
        with _alone(model, progress):
            # Whoever held the lock may just have made it.
            if found := installed(model):
                return found
            return _make(model, sources or download.Sources(), progress)
    except OSError as error:
        raise ModelError(
            f"{model.name} can't be put into {config.cache_dir()}: {error}. PONDERTTT_CACHE "
            "chooses another directory"
        ) from error


def checked_directory(directory: Path) -> Path:
    """The directory itself, if a model can be loaded from it.

    Raises:
        ModelError: config, safetensors or tokenizer are missing.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json, so it is not a whole model")
    if not any(directory.glob("*.safetensors")):
        pickles = any(any(directory.glob(pattern)) for pattern in _PICKLES)
        held = "only pickled weights, which are never loaded (they can run code)" if pickles else ""
        raise ModelError(
            f"{directory} has {held or 'no weights'}: convert them to safetensors where you trust "
            "their author, with transformers' `from_pretrained` and `save_pretrained`"
        )
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{directory} has no tokenizer (one of {', '.join(_TOKENIZER_FILES)}): save it there "
            "with the tokenizer's `save_pretrained`"
        )
    return directory


def _make(model: EmbeddedModel, sources: download.Sources, progress: bool) -> Path:
    """Fetch, convert and put in place; called by one process at a time."""
    say = _say if progress else _say_nothing
    work = _work_directory(model)
    work.mkdir(parents=True, exist_ok=True)
    # The parts and the file they make exist together for a moment; later the file and the weights.
    download.require_space(work, max(2 * model.size, model.size + model.converted_size))
    gguf, source = download.fetch_gguf(model, work, sources, progress=progress, say=say)
    say(f"converting {model.name} to safetensors, once: {model.converted_size / 1e9:.1f} GB")
    fresh = work / "converted"
    # What an interrupted conversion left behind.
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    convert.convert(gguf, model, fresh, source=source, progress=progress)
    directory = model_directory(model)
    if directory.exists():
        shutil.rmtree(directory)
    fresh.rename(directory)
    shutil.rmtree(work)
    say(f"{model.name} is ready in {directory}")
    return directory


def _work_directory(model: EmbeddedModel) -> Path:
    return config.cache_dir() / "models" / ".work" / model.name


@contextmanager
def _alone(model: EmbeddedModel, progress: bool) -> Iterator[None]:
    """Hold the model's lock; the system releases it if this process dies."""
    locks = config.cache_dir() / "models" / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{model.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            _say(f"another process is fetching {model.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _looks_like_a_path(text: str) -> bool:
    separators = text.count("/") + text.count("\\")
    return (
        text.startswith((".", "/", "~", "\\"))
        or separators > 1
        or os.path.isabs(text)
        or text.endswith((".gguf", ".safetensors", ".bin"))
    )


def _choices() -> str:
    return f"an embedded model ({', '.join(EMBEDDED)}) or a name on the hub (owner/model)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(_: str) -> None:
    return None
