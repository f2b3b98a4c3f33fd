"""Conversion against what the `gguf` package itself reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from ponderttt.errors import ModelError
from ponderttt.models import convert, download
from ponderttt.models.embedded import EMBEDDED, SMOLLM2, EmbeddedModel
from ponderttt.models.tokenizer import Tokenizer
from tests import helpers
from tests.ponderttt.models import gguf_files

# Digests of layer 11, printed by `python -m tests.ponderttt.models.gguf_files FILE.gguf 11`.
LAYER = "model.layers.11."
LAYER_DIGESTS = {
    "smollm2-135m": "4b6dfdd5c7563f2d5e7625da1a6f4e49c6452277938af752b36c248e3e606a38",
    "qwen2.5-coder-0.5b": "dc8ee1822eba67f43babda1ce79e51cb749bc3a9104b2cfdb40cdbef2dcd5584",
}


@pytest.fixture(scope="module")
def tiny_gguf(tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write_tiny_gguf(tiny_qwen2_dir, path)
    return path


@pytest.fixture(scope="module")
def tiny_model(tiny_gguf: Path) -> EmbeddedModel:
    return dataclasses.replace(
        SMOLLM2,
        name="tiny",
        size=tiny_gguf.stat().st_size,
        sha256=download.file_sha256(tiny_gguf),
    )


@pytest.fixture(scope="module")
def converted(
    tiny_gguf: Path, tiny_model: EmbeddedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    convert.convert(tiny_gguf, tiny_model, directory, source="a test", progress=False)
    return directory


def test_convert_gives_the_tensors_that_gguf_dequantises(converted: Path, tiny_gguf: Path) -> None:
    ours = load_file(converted / "model.safetensors")
    reference = gguf_files.dequantised(tiny_gguf)
    assert ours.keys() == reference.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, reference[name](), err_msg=name)


def test_convert_keeps_shape_tokenizer_and_template(converted: Path, tiny_qwen2_dir: Path) -> None:
    ours, original = (
        json.loads((directory / "config.json").read_text())
        for directory in (converted, tiny_qwen2_dir)
    )
    same = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    assert {key: ours[key] for key in same} == {key: original[key] for key in same}
    assert "quantization_config" not in ours
    mine, reference = Tokenizer.from_dir(converted), Tokenizer.from_dir(tiny_qwen2_dir)
    # Qwen2 splits digits one by one, which the tiny tokenizer does not.
    text = "".join(c for c in helpers.source_text()[:2000] if not c.isdigit())
    assert mine.decode(mine.encode(text)) == text
    assert mine.fim == reference.fim
    assert mine.decode(mine.apply_chat_template([{"role": "user", "content": "hi"}])) == "hi"


def test_manifest_tells_source_licence_and_digests(
    converted: Path, tiny_model: EmbeddedModel
) -> None:
    manifest = convert.Manifest.read(converted)
    assert (manifest.name, manifest.source, manifest.licence) == ("tiny", "a test", "Apache-2.0")
    assert manifest.gguf_sha256 == tiny_model.sha256
    weights = converted / "model.safetensors"
    assert manifest.files["model.safetensors"] == convert.FileRecord(
        weights.stat().st_size, download.file_sha256(weights)
    )
    assert set(manifest.files) == {path.name for path in converted.iterdir()} - {convert.MANIFEST}


def test_convert_shows_nothing_when_nobody_wants_to_see_it(
    tiny_gguf: Path,
    tiny_model: EmbeddedModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    convert.convert(tiny_gguf, tiny_model, tmp_path, source="a test", progress=False)
    assert capfd.readouterr() == ("", "")


def test_convert_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="can't be converted"):
        convert.convert(path, SMOLLM2, tmp_path / "out", source="a test", progress=False)
    assert not convert.is_converted(SMOLLM2, tmp_path / "out")


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("model", "fixture"), [("smollm2-135m", "smollm2_dir"), ("qwen2.5-coder-0.5b", "coder_dir")]
)
def test_cached_model_has_the_values_of_its_gguf(
    model: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(fixture)
    assert convert.Manifest.read(directory).gguf_sha256 == EMBEDDED[model].sha256
    with safe_open(directory / "model.safetensors", framework="np") as weights:
        names = [name for name in weights.keys() if name.startswith(LAYER)]  # noqa: SIM118
        digests = {name: gguf_files.digest(weights.get_tensor(name)) for name in names}
    assert gguf_files.layer_digest(digests) == LAYER_DIGESTS[model]
