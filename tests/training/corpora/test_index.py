"""Releases of a package index; pip looks into a local folder."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import CODE, intake, paths
from training.corpora import archives
from training.corpora.index import cache_folder, sha256_of
from training.corpora.intake import File, Left
from training.corpora.sources import load

METADATA = b"Metadata-Version: 2.1\nName: demo-pkg\nVersion: 1.0\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def zip_file(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return path


def tar_file(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the index, and no other."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path) -> Path:
    # Were it ever imported, the test would end here.
    bad = b"raise SystemExit('imported')\n"
    return zip_file(folder / "demo_pkg-1.0-py3-none-any.whl", {
        "demo_pkg/__init__.py": bad, "demo_pkg/a.py": CODE, "demo_pkg/_vendor/x.py": CODE,
        "demo_pkg/x.so": b"\0", "demo_pkg-1.0.dist-info/METADATA": METADATA,
        "demo_pkg-1.0.dist-info/WHEEL": WHEEL, "demo_pkg-1.0.dist-info/RECORD": b"",
    })  # fmt: skip


def test_load_of_a_release_fetches_its_wheel_once(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = sha256_of(wheel(index))
    (found,) = load("index:Demo_Pkg==1.0", cache=cache)
    assert (found.name, found.revision, found.source) == ("demo-pkg", "1.0", "index:Demo_Pkg==1.0")
    assert paths(found) == ["demo_pkg/__init__.py", "demo_pkg/a.py"]
    for path in index.iterdir():
        path.unlink()
    (again,) = load(f"index:demo-pkg==1.0#sha256={digest}", cache=cache)
    assert again.documents == found.documents
    with pytest.raises(InvalidRequestError, match=f"has SHA-256 {digest}, not 0{{64}}"):
        list(load(f"index:demo-pkg==1.0#sha256={'0' * 64}", cache=cache))
    with pytest.raises(InvalidRequestError, match=r"demo-pkg==2\.0 can't be had as a wheel"):
        list(load("index:demo-pkg==2.0", cache=cache))
    assert not list((cache / "corpora" / "index").glob("tmp*"))


def test_load_of_a_release_without_wheel_runs_its_script_only_where_allowed(
    index: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    backend = (
        f"import os\nopen({str(marker)!r}, 'w').close()\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        "    os.mkdir(folder + '/demo_pkg-1.0.dist-info')\n"
        "    with open(folder + '/demo_pkg-1.0.dist-info/METADATA', 'w') as file:\n"
        f"        file.write({METADATA.decode()!r})\n"
        "    return 'demo_pkg-1.0.dist-info'\n"
        "def build_wheel(*_): raise SystemExit\ndef build_sdist(*_): raise SystemExit\n"
    )
    project = b'[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n'
    tar_file(index / "demo_pkg-1.0.tar.gz", {
        "demo_pkg-1.0/PKG-INFO": METADATA, "demo_pkg-1.0/pyproject.toml": project,
        "demo_pkg-1.0/own.py": backend.encode(), "demo_pkg-1.0/src/demo_pkg/a.py": CODE,
    })  # fmt: skip
    with pytest.raises(InvalidRequestError, match="sources allowed explicitly"):
        list(load("index:demo-pkg==1.0", cache=tmp_path / "cache"))
    assert not marker.exists()
    (found,) = load("index:demo-pkg==1.0", cache=tmp_path / "cache", allow_sdist=True)
    assert paths(found) == ["own.py", "src/demo_pkg/a.py"]
    assert marker.exists()


@pytest.mark.parametrize(
    "spec", ["numpy", "numpy>=1", "numpy==1.*", "numpy==", "--pre==1", "a/b==1", "../x==1",
             "numpy==1#sha256=12", "numpy==1 --pre", "numpy==1/../.."],
)  # fmt: skip
def test_load_without_an_exact_release_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="NAME==VERSION"):
        list(load(f"index:{spec}", cache=tmp_path))
    assert not list(tmp_path.iterdir())


def test_load_of_a_damaged_archive_says_to_delete_it(tmp_path: Path) -> None:
    whole = wheel(tmp_path / "w").read_bytes()
    source = tar_file(tmp_path / "s.tar.gz", {"d-1/a.py": CODE * 1000}).read_bytes()
    for name, content in {
        "x-1.whl": whole[: len(whole) // 2], "x-1.tar.gz": source[: len(source) // 2],
        "x-1.zip": b"no archive", "x-1.tar.bz2": b"no archive",
        # Inside the compressed content, behind a directory that is whole.
        "x-2.whl": whole.replace(whole[140:150], b"\xff" * 10, 1),
    }.items():  # fmt: skip
        folder = cache_folder(tmp_path / name, "x", "1")
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        with pytest.raises(InvalidRequestError, match=r"is damaged .*; delete it"):
            list(load("index:x==1", cache=tmp_path / name))


def test_load_where_the_cache_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for spec in ("index:x==1", "git:file:///x"):
        with pytest.raises(InvalidRequestError, match="choose another cache"):
            list(load(spec, cache=tmp_path / "file"))


def test_files_of_an_archive_with_hostile_names_leave_them_out(tmp_path: Path) -> None:
    names = {"d-1/../../x.py": CODE, "/etc/x.py": CODE, "d-1\\x.py": CODE, "d-1/ok.py": CODE}
    zipped = zip_file(tmp_path / "x.zip", names)
    tarred = tar_file(tmp_path / "x.tar.gz", names)
    for archive in (zipped, tarred):
        found = list(archives.files(archive, 10_000))
        assert [each.path for each in found if isinstance(each, File)] == ["ok.py"]
        left = {each.path: each.reason.value for each in found if isinstance(each, Left)}
        assert set(left.values()) == {"unsafe path"}
        assert len(left) == 3


def test_files_of_an_archive_with_links_leave_them_out(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        for name, kind in (("d/s.py", tarfile.SYMTYPE), ("d/h.py", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
    assert [each.path for each in archives.files(path, 100) if isinstance(each, Left)] == [
        "s.py", "h.py",
    ]  # fmt: skip
    link = zipfile.ZipInfo("l.py")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
    (found,) = archives.files(tmp_path / "x.whl", 100)
    assert isinstance(found, Left)


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    bomb = {f"d/{index}.py": b"\n" * 100_000 for index in range(20)}
    for name, make in (("x.whl", zip_file), ("x.tar.gz", tar_file)):
        folder = cache_folder(tmp_path / name, "x", "1")
        make(folder / name, bomb)
        with pytest.raises(InvalidRequestError, match="more than 1000000 bytes"):
            list(archives.files(folder / name, 1_000_000))


def test_a_member_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "x.whl", {"a.py": b"x = 1\n" * 100_000})
    raw = bytearray(path.read_bytes())
    # Uncompressed size in the central directory (its 24th byte on).
    at = raw.index(b"PK\1\2") + 24
    raw[at : at + 4] = (5).to_bytes(4, "little")
    path.write_bytes(raw)
    (member,) = [each for each in archives.files(path, 10**6) if isinstance(each, File)]
    assert member.size == 5
    with pytest.raises(InvalidRequestError, match="damaged"):
        intake(tmp_path, file_bytes=1000).repository("r", "s", archives.files(path, 10**6))
