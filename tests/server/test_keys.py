"""The file of API keys: its form, its mistakes, its changes; the command that makes keys."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ponderttt.errors import InvalidRequestError
from server.keys import RELOAD_SECONDS, KeyRing, bearer_token, digest_of, load_keys, new_key
from server.keys_cli import app

DIGEST = digest_of(b"secret").hex()


def entry(key_id: str = "alice", key: str = "secret", **values: str) -> str:
    """One key as it stands in a file; `values` in TOML."""
    fields = {"sha256": f'"{digest_of(key.encode()).hex()}"', "scopes": '["completions"]'} | values
    return f"[keys.{key_id}]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_file_of_keys_is_read(path: Path) -> None:
    path.write_text(entry() + entry("ops-1", "other", scopes='["metrics", "admin"]',
                                    max_sessions="0", max_waiting="3"))  # fmt: skip
    alice, ops = load_keys(path)
    assert (alice.id, alice.digest) == ("alice", digest_of(b"secret"))
    assert alice.scopes == {"completions"}
    assert (alice.max_sessions, alice.max_waiting) == (None, None)
    assert (ops.max_sessions, ops.max_waiting) == (0, 3)
    assert alice.may("completions")
    assert not alice.may("metrics")
    assert not alice.may("admin")
    assert ops.may("completions")  # an administrator may everything


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "keys: Field required"),
        ("[keys]", "keys: Dictionary should have at least 1 item"),
        ("keys = [", "not valid TOML"),
        ("a = 1\n" + entry(), "a: Extra inputs"),
        (entry(scopes="[]"), "keys.alice.scopes: List should have at least 1 item"),
        (entry(scopes='["root"]'), "keys.alice.scopes.0: Input should be 'completions'"),
        (entry(sha256='"ABC"'), "keys.alice.sha256: String should match"),
        (entry(key_="1"), "keys.alice.key_: Extra inputs"),
        (entry(max_sessions="-1"), "keys.alice.max_sessions: Input should be greater"),
        (entry(max_waiting="0"), "keys.alice.max_waiting: Input should be greater"),
        (entry(max_waiting="true"), "keys.alice.max_waiting: Input should be a valid integer"),
        (entry('"../alice"'), "'../alice' is not a key's id"),
        (entry('"al~ice"'), "'al~ice' is not a key's id"),
        (entry("Alice"), "'Alice' is not a key's id"),
        (entry("a" * 33), "is not a key's id"),
        (entry() + entry("bob"), "alice and bob have the same sha256"),
    ],
)  # fmt: skip
def test_file_with_a_mistake_is_refused_with_its_place_but_without_hashes(
    path: Path, text: str, said: str
) -> None:
    path.write_text(text)
    with pytest.raises(InvalidRequestError) as caught:
        load_keys(path)
    assert caught.value.param == "api_key_file"
    assert said in str(caught.value)
    assert DIGEST not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"#" * (1 << 20) + b"\n"])
def test_file_that_can_not_be_read_is_refused(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"keys\.toml"):
        load_keys(path)


def test_ring_finds_every_key_and_nothing_else(path: Path) -> None:
    path.write_text(entry() + entry("bob", "other"))
    ring = KeyRing(path)
    for key, key_id in ((b"secret", "alice"), (b"other", "bob")):
        found = ring.find(key)
        assert found is not None
        assert found.id == key_id
    for wrong in (b"", b"Secret", b"secret ", DIGEST.encode(), b"s" * 100_000, b"\xff"):
        assert ring.find(wrong) is None


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_ring_notices_a_changed_file_and_looks_once_a_second_at_most(path: Path) -> None:
    path.write_text(entry())
    clock = Clock()
    ring = KeyRing(path, clock)
    path.write_text(entry() + entry("bob", "other"))
    assert ring.find(b"other") is None
    clock.now = RELOAD_SECONDS
    assert ring.find(b"other") is not None
    # Revoked.
    path.write_text(entry("bob", "other"))
    clock.now = 2 * RELOAD_SECONDS
    assert ring.find(b"secret") is None


@pytest.mark.parametrize("breakage", ["gone", "torn", "empty"])
def test_broken_file_keeps_the_keys_as_they_were_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture, breakage: str
) -> None:
    path.write_text(entry())
    clock = Clock()
    ring = KeyRing(path, clock)
    if breakage == "gone":
        os.remove(path)
    else:
        path.write_text("" if breakage == "empty" else entry()[:40])
    with caplog.at_level(logging.INFO, "server.keys"):
        for _ in range(3):
            clock.now += RELOAD_SECONDS
            assert ring.find(b"secret") is not None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "1 keys stay as they were" in record.getMessage()
    path.write_text(entry("bob", "other"))
    clock.now += RELOAD_SECONDS
    assert ring.find(b"secret") is None
    assert ring.find(b"other") is not None


@pytest.mark.parametrize(
    ("values", "token"),
    [
        ([], None),
        ([b"Bearer abc"], b"abc"),
        ([b"bearer  abc "], b"abc"),
        ([b"Bearer"], None),
        ([b"Bearer "], None),
        ([b"Bearer a b"], None),
        ([b"Basic YTpi"], None),
        ([b"Bearer \xff\xfe"], b"\xff\xfe"),
        ([b"Bearer abc", b"Bearer abc"], None),
    ],
)
def test_bearer_token_of_one_header_of_the_right_form(
    values: list[bytes], token: bytes | None
) -> None:
    assert bearer_token([(b"authorization", value) for value in values]) == token


def test_command_prints_a_key_once_and_an_entry_that_can_be_appended(path: Path) -> None:
    runner = CliRunner()
    keys = []
    for options in (["--id", "alice"], ["--id", "ops", "--scope", "metrics", "--scope", "admin",
                                        "--max-sessions", "3", "--max-waiting", "4"]):  # fmt: skip
        result = runner.invoke(app, ["new", *options])
        assert result.exit_code == 0
        keys.append(result.stderr.splitlines()[0])
        assert keys[-1] not in result.stdout
        with path.open("a") as file:
            file.write(result.stdout)
    ring = KeyRing(path)
    found = [ring.find(key.encode()) for key in keys]
    assert [key.id for key in found if key is not None] == ["alice", "ops"]
    assert found[1] is not None
    assert found[1].scopes == {"metrics", "admin"}
    assert (found[1].max_sessions, found[1].max_waiting) == (3, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--id", "Bad Id"], "--id"), (["--id", "a", "--scope", "root"], "not one of completions")],
)
def test_command_refuses_what_the_file_could_not_hold(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["new", *options])
    assert isinstance(result.exception, InvalidRequestError)
    assert said in str(result.exception)
    assert result.stdout == ""


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) > 40
