"""`ponderttt adapt` against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from clients.adapt import adapt
from clients.api import Client, ServerError
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.test_answers import CHUNK, REPORT
from tests.helpers import source_text
from tests.server.live import Live, live_server


@pytest.fixture(scope="module")
def live(tiny_llama_dir: Path) -> Iterator[Live]:
    """A server of the tiny Llama."""
    with live_server(tiny_llama_dir) as server:
        yield server


@pytest.fixture
def app() -> typer.Typer:
    """The command alone."""
    command = typer.Typer()
    command.command()(adapt)
    return command


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two files of code and one that is none."""
    text = source_text()
    root = tmp_path / "project"
    (root / "sub").mkdir(parents=True)
    (root / "one.py").write_text(text[:2000])
    (root / "sub" / "two.py").write_text(text[2000:3000])
    (root / "picture.png").write_bytes(b"\0\1")
    return root


def test_adapt_teaches_a_directory_and_reports_it(
    live: Live, app: typer.Typer, project: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    options = ["--gate", "fixed", "--budget", "2.5", "--chunk-size", "64", "--json", str(out)]
    arguments = [str(project), "--session", "taught", "--base-url", f"{live.url}/v1", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    state = live.session("taught")
    assert [document["path"] for document in written["documents"]] == ["one.py", "sub/two.py"]
    assert (written["files"], written["skipped"]) == (2, 1)
    assert written["version_before"] == 0
    assert written["version_after"] == state["version"] > 5
    assert written["chunks"] == state["chunks"] == sum(written["actions"].values())
    assert written["actions"] == state["chunks_by_action"]
    assert written["session_in_all"]["chunks"] == state["chunks"]
    assert written["cost"]["nominal"] == pytest.approx(state["cost"]["nominal"])
    assert written["cost"]["nominal"] <= 2.5
    assert written["loss_after"] < written["loss_before"]
    for shown in ("picture.png: binary", "made session taught", "loss before", "UPDATE_1"):
        assert shown in result.output

    again = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert again.exit_code == 0, again.output
    written = json.loads(out.read_text())
    # Learned before: that is what makes an interrupted run go on.
    assert written["reasons"]["seen"] == state["chunks_by_action"]["UPDATE_1"]
    assert "skipped picture.png" not in again.output
    # The session's ledger has both runs, whatever the first one's own tally had when it ended.
    in_all = live.session("taught")
    assert in_all["chunks"] == state["chunks"] + written["chunks"]
    assert written["session_in_all"] == {
        name: in_all[name] for name in ("chunks", "learned_tokens", "chunks_by_action", "cost")
    }
    assert f"{in_all['chunks']} chunks, " in again.output


def test_adapt_sends_many_files_in_batches(
    live: Live, app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.adapt._BATCH_FILES", 2)
    for i in range(5):
        (tmp_path / f"{i}.py").write_text(f"value_{i} = {i}\n")
    route = "/v1/sessions/{session_id}/adapt"
    before = live.value("http_requests_total", method="POST", route=route, status="200")
    result = CliRunner().invoke(
        app, [str(tmp_path), "--session", "batches", "--base-url", live.url]
    )
    assert result.exit_code == 0, result.output
    after = live.value("http_requests_total", method="POST", route=route, status="200")
    assert after == before + 3
    assert live.session("batches")["chunks"] == 5


@pytest.mark.parametrize(
    ("options", "tells"),
    [
        (["--session", "a b"], "not a session id"),
        (["--session", "refused", "--budget", "0.5"], "budget"),
        (["--session", "refused", "--gate", "policy"], "--policy"),
    ],
)
def test_adapt_passes_on_what_the_server_refuses(
    live: Live, app: typer.Typer, project: Path, options: list[str], tells: str
) -> None:
    result = CliRunner().invoke(app, [str(project), "--base-url", live.url, *options])
    assert isinstance(result.exception, ServerError)
    assert result.exception.status == 400
    assert tells in str(result.exception)


def test_adapt_without_a_server_says_how_to_start_one(app: typer.Typer, project: Path) -> None:
    result = CliRunner().invoke(
        app, [str(project), "--session", "a", "--base-url", "http://127.0.0.1:1"]
    )
    assert isinstance(result.exception, PonderError)
    assert "ponderttt serve" in str(result.exception)


def test_adapt_of_nothing_to_learn_is_refused(app: typer.Typer, project: Path) -> None:
    result = CliRunner().invoke(app, [str(project / "picture.png"), "--session", "a"])
    assert isinstance(result.exception, InvalidRequestError)
    assert "no text file" in str(result.exception)


def test_adapt_with_a_result_that_can_not_be_written_does_not_begin(
    app: typer.Typer, project: Path, tmp_path: Path
) -> None:
    out = tmp_path / "missing" / "out.json"
    result = CliRunner().invoke(app, [str(project), "--session", "a", "--json", str(out)])
    assert isinstance(result.exception, InvalidRequestError)
    assert "missing is no directory" in str(result.exception)


def test_adapt_shows_the_result_that_it_fails_to_write(
    live: Live, app: typer.Typer, project: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("x" * 300)
    arguments = [str(project), "--session", "shown", "--base-url", live.url, "--json", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, PonderError)
    assert "can't be written" in str(result.exception)
    assert "loss before" in result.output


def test_busy_server_is_asked_again_after_the_time_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("clients.api.time.sleep", waited.append)
    answers = iter(
        [
            httpx.Response(429, headers={"Retry-After": "3"}, json={"error": {"message": "full"}}),
            httpx.Response(200, text=f"data: {json.dumps(REPORT)}\n\ndata: [DONE]\n\n"),
        ]
    )
    with Client("http://test/v1/") as client:
        client._http.close()
        client._http = httpx.Client(
            base_url=client.base_url, transport=httpx.MockTransport(lambda _: next(answers))
        )
        assert list(client.adapt("a", [], {})) == [REPORT]
    assert waited == [3.0]


@pytest.mark.parametrize(
    ("text", "tells"),
    [
        ('event: error\ndata: {"error": {"message": "it broke"}}\n\n', "it broke"),
        ('data: {"object": "x"}\n\n', "broke off"),
    ],
)
def test_stream_that_does_not_end_well_is_an_error(text: str, tells: str) -> None:
    with Client("http://test") as client:
        client._http.close()
        client._http = httpx.Client(
            base_url=client.base_url,
            transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)),
        )
        with pytest.raises(ServerError, match=tells):
            list(client.adapt("a", [], {}))


def test_adapt_sends_its_key_and_bears_a_server_that_does_not_say_how_far_it_is(
    app: typer.Typer, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [CHUNK | {"progress": [None, 3]}, REPORT]

    def handler(request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != "Bearer s3cret":
            return httpx.Response(401, json={"error": {"message": "no key"}})
        if request.method == "GET":
            return httpx.Response(200, json={"id": "a"})
        lines = "".join(f"data: {json.dumps(each)}\n\n" for each in events)
        return httpx.Response(200, text=lines + "data: [DONE]\n\n")

    monkeypatch.setattr(
        "clients.api.Client", partial(Client, transport=httpx.MockTransport(handler))
    )
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    arguments = [str(project), "--session", "a", "--base-url", "http://test"]
    result = CliRunner().invoke(app, [*arguments, "--api-key-file", str(key)])
    assert result.exit_code == 0, result.exception
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ServerError)
    assert "no key" in str(refused.exception)


def test_wait_for_a_busy_server_is_said(
    app: typer.Typer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(503))
    monkeypatch.setattr("clients.api.Client", partial(Client, transport=transport, retries=1))
    monkeypatch.setattr("clients.api.time.sleep", lambda seconds: None)
    result = CliRunner().invoke(app, [str(project), "--session", "s"])
    assert "the server is busy (503), asking again in" in result.stderr
    assert "1 of 1" in result.stderr


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([CHUNK], "without a report"),
        ([{"action": "SKIP"}], "no usable field 'object'"),
        ([CHUNK | {"measured": float("nan")}, REPORT], "event.measured is nan"),
    ],
)
def test_lesson_of_another_form_is_named(
    app: typer.Typer,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    events: list[dict[str, object]],
    told: str,
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"id": "a"})
        lines = "".join(f"data: {json.dumps(each)}\n\n" for each in events)
        return httpx.Response(200, text=lines + "data: [DONE]\n\n")

    transport = httpx.MockTransport(handler)
    monkeypatch.setattr("clients.api.Client", partial(Client, transport=transport))
    result = CliRunner().invoke(app, [str(project), "--session", "a"])
    assert isinstance(result.exception, ServerError), result.exception
    assert told in str(result.exception)
