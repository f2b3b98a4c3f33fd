"""The hub's client against a small hub on this machine, and without any hub."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from ponderttt.errors import ModelError
from ponderttt.models import hub, store
from tests.ponderttt.models.fakes import FakeHub, running_hub

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b'{"version": "1.0"}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the weights once more",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"another format",
    "README.md": b"# model",
}
WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "generation_config.json",
    "chat_template.jinja",
}


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client reads its settings once, at import."""
    directory = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return directory


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub("owner/model", FILES) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def closed_port(monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub's address where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    return address


def test_resolve_hub_name_fetches_the_model_and_no_pickle(local_hub: FakeHub) -> None:
    directory = store.resolve("owner/model", progress=False)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: FILES[name] for name in WANTED
    }
    assert local_hub.fetched() == WANTED


def test_resolve_hub_name_again_fetches_nothing(local_hub: FakeHub) -> None:
    first = store.resolve("owner/model", progress=False)
    local_hub.requests.clear()
    assert store.resolve("owner/model", progress=False) == first
    assert local_hub.fetched() == set()


def test_resolve_hub_name_without_the_hub_takes_the_cached_copy(
    local_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.resolve("owner/model", progress=False)
    assert store.resolve("owner/model", progress=False, offline=True) == first
    local_hub.requests.clear()
    monkeypatch.setattr(hub, "why_unreachable", lambda: "the cable is out")
    assert store.resolve("owner/model", progress=False) == first
    assert hub.cached_model("owner/model") == first
    assert local_hub.requests == []


def test_resolve_hub_name_it_does_not_know_says_so(local_hub: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"knows no model 'owner/other'.*HF_TOKEN"):
        store.resolve("owner/other", progress=False)


def test_resolve_hub_name_with_only_a_pickle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"a pickle"}
    with running_hub("owner/old", files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(ModelError, match="safetensors"):
            store.resolve("owner/old", progress=False)
        assert "pytorch_model.bin" not in server.fetched()


def test_resolve_with_the_hub_away_says_what_to_do_within_seconds(closed_port: str) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        store.resolve("owner/model", progress=False)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    for part in ("'owner/model'", closed_port, "HF_ENDPOINT", "HF_TOKEN", "models list"):
        assert part in message


def test_resolve_scale_asks_for_gpt2(closed_port: str) -> None:
    with pytest.raises(ModelError, match="'openai-community/gpt2-medium'"):
        store.resolve("350m", progress=False)


def test_resolve_offline_asks_no_hub(local_hub: FakeHub) -> None:
    with pytest.raises(ModelError, match="offline was asked for"):
        store.resolve("owner/model", progress=False, offline=True)
    assert local_hub.requests == []


def test_why_unreachable_heeds_the_offline_setting(
    local_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.why_unreachable() is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(hub.why_unreachable())


def test_why_unreachable_with_a_silent_hub_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        assert "timed out" in str(hub.why_unreachable())
        assert time.monotonic() - start < 1.1


def test_why_unreachable_with_an_address_that_is_none_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "not-an-address")
    assert "not-an-address" in str(hub.why_unreachable())


def test_download_file_brings_one_file(local_hub: FakeHub, tmp_path: Path) -> None:
    path = hub.download_file("owner/model", "tokenizer.json", tmp_path, progress=False)
    assert path.read_bytes() == FILES["tokenizer.json"]
    assert local_hub.fetched() == {"tokenizer.json"}


def test_download_file_with_the_hub_away_fails_within_seconds(
    closed_port: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match="out of reach"):
        hub.download_file("owner/model", "model.gguf", tmp_path, progress=False)
    assert time.monotonic() - start < 5


def test_error_of_a_layer_below_the_hub_client_becomes_a_model_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A hub that answers and a file host that does not: the HTTP layer's own error comes through.
    class ConnectError(Exception):
        pass

    def fail(*_: object, **__: object) -> str:
        raise ConnectError("connection refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="connection refused") as caught:
        hub.download_model("owner/model", progress=False, offline=False)
    assert "owner/model" in str(caught.value)
