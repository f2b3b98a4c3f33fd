"""From a verified GGUF file to a Hugging Face directory with float32 safetensors.

Reading GGUF takes transformers half a minute and more, each time; a converted model loads in
seconds. The directory carries a manifest, `ponderttt.json`, by which a later start tells a whole
conversion from a damaged one without reading the weights.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ponderttt.errors import ModelError
from ponderttt.models.download import file_sha256
from ponderttt.models.embedded import EmbeddedModel

MANIFEST = "ponderttt.json"
# Raised when the conversion changes, so that models converted earlier are made anew.
CONVERTER_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Bytes and SHA-256 of one converted file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted directory holds and what it was made from."""

    name: str
    source: str
    gguf_sha256: str
    licence: str
    converter_version: int
    files: dict[str, FileRecord]

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory`."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a directory's manifest.

        Raises:
            ModelError: it is missing or damaged.
        """
        path = directory / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            files = {name: FileRecord(**record) for name, record in data.pop("files").items()}
            return cls(**data, files=files)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{path} can't be read: {error}") from error


def is_converted(model: EmbeddedModel, directory: Path) -> bool:
    """Whether `directory` holds this model, whole, by its manifest and file sizes."""
    try:
        manifest = Manifest.read(directory)
    except ModelError:
        return False
    made_from = (manifest.name, manifest.gguf_sha256, manifest.converter_version)
    if made_from != (model.name, model.sha256, CONVERTER_VERSION):
        return False
    return bool(manifest.files) and all(
        (directory / name).is_file() and (directory / name).stat().st_size == record.size
        for name, record in manifest.files.items()
    )


def convert(
    gguf: Path, model: EmbeddedModel, directory: Path, *, source: str, progress: bool
) -> None:
    """Write a GGUF file's model and tokenizer into `directory` and describe them in a manifest.

    Needs memory for about twice the float32 weights.

    Args:
        gguf: a file whose SHA-256 has been verified.
        model: what it is.
        directory: an empty directory; the manifest is the last file written.
        source: where the GGUF file came from, for the manifest.
        progress: whether to show progress bars.
    Raises:
        ModelError: transformers can't read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    with _progress_bars(progress):
        try:
            network = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, **where
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
            raise ModelError(f"{gguf} can't be converted: {error}") from error
        _forget_quantization(network)
        network.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    Manifest(
        name=model.name,
        source=source,
        gguf_sha256=model.sha256,
        licence=model.licence,
        converter_version=CONVERTER_VERSION,
        files={
            path.name: FileRecord(path.stat().st_size, file_sha256(path))
            for path in sorted(directory.iterdir())
        },
    ).write(directory)


def _forget_quantization(network: Any) -> None:
    """The weights are plain float32 now; transformers refuses to save while it thinks not."""
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.is_quantized = False
    network.hf_quantizer = None


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide transformers' progress bars, unless a person watches them; in a log they are noise."""
    from transformers.utils import logging

    if shown and sys.stderr.isatty():
        yield
        return
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The bar over GGUF tensors heeds no setting. Log messages still get through: their
        # handler holds the real stderr since transformers was imported.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if were_on:
            logging.enable_progress_bar()
