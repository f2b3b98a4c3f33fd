"""Commits of git repositories; a file URL stands for a remote one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ponderttt.errors import InvalidRequestError
from tests.training.corpora.samples import CODE, paths, write_files
from training.corpora.git import split_spec
from training.corpora.sources import load


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, "-C", str(directory), *arguments],
        check=True, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two commits, the first tagged v1, and work that is not committed."""
    root = write_files(tmp_path / "work.git", {
        "a.py": CODE, "sub/ö.py": b"u = 1\n", "secret.py": b"x = '$Format:%H$'\n",
        "bad.py": b"\0\0", "large.py": b"x\n" * 600_000,
        # `git archive` would leave out the one and rewrite the other.
        ".gitattributes": b"sub/* export-ignore\nsecret.py export-subst\n",
    })  # fmt: skip
    (root / "link.py").symlink_to("a.py")
    git(root, "init", "--quiet", "--initial-branch=main", ".")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "one")
    git(root, "tag", "v1")
    (root / "a.py").write_text("second = 2\n")
    git(root, "commit", "--quiet", "--all", "-m", "two")
    (root / "a.py").write_text("uncommitted = 3\n")
    (root / "untracked.py").write_text("untracked = 4\n")
    return root


def test_load_of_a_checkout_reads_the_commit_and_not_the_files(checkout: Path) -> None:
    (found,) = load(f"git:{checkout}")
    assert found.name == "work"
    assert found.revision == git(checkout, "rev-parse", "HEAD")
    assert paths(found) == ["a.py", "secret.py", "sub/ö.py"]
    assert [each.text for each in found.documents] == [
        "second = 2\n", "x = '$Format:%H$'\n", "u = 1\n",
    ]  # fmt: skip


def test_load_of_a_revision_reads_that_one(checkout: Path) -> None:
    (found,) = load(f"git:{checkout}@v1")
    assert found.revision == git(checkout, "rev-parse", "v1")
    assert found.documents[0].text == CODE.decode()
    (same,) = load(f"git:{checkout}@{found.revision[:10]}")
    assert same.documents == found.documents


def test_load_inside_a_hook_reads_the_named_repository(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert next(load(f"git:{checkout}")).name == "work"


def test_load_of_a_url_is_shallow_and_a_full_commit_is_read_offline(
    checkout: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    url = checkout.as_uri()
    (found,) = load(f"git:{url}", cache=cache)
    assert (found.name, found.source) == ("work", f"git:{url}")
    assert found.documents == next(load(f"git:{checkout}")).documents
    (clone,) = (cache / "corpora" / "git").glob("*[!k]")
    assert git(clone, "rev-list", "--count", found.revision) == "1"
    (tagged,) = load(f"git:{url}@v1", cache=cache)
    assert tagged.revision == git(checkout, "rev-parse", "v1")
    checkout.rename(tmp_path / "away")
    (again,) = load(f"git:{url}@{found.revision}", cache=cache)
    assert again.documents == found.documents
    with pytest.raises(InvalidRequestError, match="git fetch failed"):
        list(load(f"git:{url}", cache=cache))


@pytest.mark.parametrize("revision", ["nothing", "--upload-pack=touch x", "-x", "a b", ""])
def test_load_of_no_revision_is_refused(checkout: Path, revision: str) -> None:
    for location in (str(checkout), checkout.as_uri()):
        with pytest.raises(InvalidRequestError, match="corpus"):
            list(load(f"git:{location}@{revision}", cache=checkout.parent / "cache"))


def test_load_of_what_is_no_repository_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequestError, match="no directory"):
        list(load(f"git:{tmp_path}/none"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(InvalidRequestError, match="git rev-parse failed"):
        list(load(f"git:{tmp_path}/bare"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InvalidRequestError, match="install it"):
        list(load(f"git:{tmp_path}/bare"))


def test_load_by_a_transport_that_runs_commands_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(InvalidRequestError):
        list(load(f"git:ext::touch% {marker}", cache=tmp_path))
    assert not marker.exists()


def test_load_error_does_not_repeat_credentials(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        list(load("git:file://user:secret@localhost/none/such", cache=tmp_path))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("https://h.org/o/r", ("https://h.org/o/r", "HEAD", True)),
        ("https://u@h.org/o/r", ("https://u@h.org/o/r", "HEAD", True)),
        ("https://u:p@h.org/o/r@feature/x", ("https://u:p@h.org/o/r", "feature/x", True)),
        ("git@h.org:o/r.git", ("git@h.org:o/r.git", "HEAD", True)),
        ("git@h.org:o/r.git@v1", ("git@h.org:o/r.git", "v1", True)),
        ("some/where@v1", ("some/where", "v1", False)),
    ],
)
def test_split_spec_tells_revision_from_user(spec: str, parts: tuple[str, str, bool]) -> None:
    assert split_spec(spec) == parts
