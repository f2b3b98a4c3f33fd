"""Which files are worth learning."""

from __future__ import annotations

from pathlib import Path

from clients.files import Skipped, TextFile, text_files


def walk(root: Path, max_bytes: int = 1000) -> tuple[dict[str, str], dict[str, str]]:
    """Texts by path, and reasons by path."""
    found = list(text_files(root, max_bytes))
    return (
        {each.path: each.text for each in found if isinstance(each, TextFile)},
        {each.path: each.reason for each in found if isinstance(each, Skipped)},
    )


def test_walk_takes_text_and_says_why_it_leaves_the_rest(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"b = 1\n",
        "a.md": "ä\n".encode(),
        "sub/c.rs": b"fn c() {}\n",
        "sub/.hidden.py": b"x\n",
        ".git/config": b"x\n",
        ".venv/lib/x.py": b"x\n",
        "node_modules/x/index.js": b"x\n",
        "picture.png": b"\x89PNG\0\0",
        "latin.txt": b"\xe4\n",
        "empty.py": b"  \n",
        "large.txt": b"x" * 1001,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "link.py").symlink_to(tmp_path / "b.py")
    texts, reasons = walk(tmp_path)
    assert texts == {"a.md": "ä\n", "b.py": "b = 1\n", "sub/c.rs": "fn c() {}\n"}
    assert list(texts) == ["a.md", "b.py", "sub/c.rs"]
    assert set(reasons) == {
        ".git/", ".venv/", "node_modules/", "sub/.hidden.py", "picture.png", "latin.txt",
        "empty.py", "large.txt", "link.py",
    }  # fmt: skip
    assert "1001 bytes, more than 1000" in reasons["large.txt"]
    assert reasons["picture.png"] == "binary"


def test_walk_of_a_single_file_takes_it_even_where_it_is_hidden(tmp_path: Path) -> None:
    path = tmp_path / ".vimrc"
    path.write_text("set number\n")
    assert walk(path) == ({".vimrc": "set number\n"}, {})


def test_size_counts_bytes() -> None:
    assert TextFile("a", "ä€").size == 5
