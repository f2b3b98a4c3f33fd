"""`ponderttt bench repo` where the server is busy, or answers what can't be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.results import read_results
from ponderttt.errors import PonderError
from tests.clients.bench import fake_server
from tests.clients.bench.conftest import Run
from tests.clients.bench.fake_server import FakeServer, FakeSession

NAN, INF = float("nan"), float("inf")
Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def rescore(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Has the server's log-probabilities changed before they are sent."""
    real = fake_server.scores

    def change(how: Change) -> None:
        def scores(tokens: list[str], learned: str) -> dict[str, Any]:
            scored = real(tokens, learned)
            return scored | how(scored)

        monkeypatch.setattr(fake_server, "scores", scores)

    return change


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits take no time."""
    monkeypatch.setattr("clients.api.time.sleep", lambda seconds: None)


def last_is(value: float | None) -> Change:
    """The last token has another log-probability."""
    return lambda scored: {"token_logprobs": [*scored["token_logprobs"][:-1], value]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: {"token_logprobs": [None] * len(s["tokens"])}, "the server gave nothing as"),
        (last_is(None), "the server gave nothing as the log-probability of token"),
        (last_is(-INF), "the server gave -inf as"),
        (last_is(NAN), "the server gave nan as"),
        (
            lambda s: {"tokens": [f"{t}·" for t in s["tokens"]], "text_offset": None},
            "doesn't say where in the prompt its tokens begin",
        ),
    ],
    ids=["nothing", "gap", "infinite", "nan", "no places"],
)
def test_server_that_does_not_score_all_of_the_text_gives_no_loss(
    run: Run, project: Path, rescore: Callable[[Change], None], change: Change, told: str
) -> None:
    rescore(change)
    result = run(FakeServer(), str(project), "--arm", "off")
    assert isinstance(result.exception, PonderError), result.exception
    assert told in str(result.exception)
    assert "give --no-loss to do without" in str(result.exception)


def test_server_that_scores_no_token_of_a_text_is_told(
    run: Run, project: Path, tmp_path: Path
) -> None:
    unrelated = tmp_path / "word.py"
    unrelated.write_text("word")
    result = run(FakeServer(), str(project), "--arm", "off", "--unrelated", str(unrelated))
    assert isinstance(result.exception, PonderError)
    assert "scored no token of the text" in str(result.exception)


def test_server_that_does_not_say_where_tokens_begin_gives_the_same_loss(
    run: Run, project: Path, tmp_path: Path, rescore: Callable[[Change], None]
) -> None:
    def losses(output: str) -> list[float]:
        assert run(FakeServer(), str(project), "--arm", "off", output=output).exit_code == 0
        return [r["loss"] for r in read_results(tmp_path / output)[1] if r["record"] == "target"]

    expected = losses("told")
    # As SGLang has it.
    rescore(lambda scored: {"text_offset": [-1] * len(scored["tokens"])})
    assert losses("untold") == expected


def test_records_keep_the_whole_answer(run: Run, project: Path, tmp_path: Path) -> None:
    server = FakeServer()
    assert run(server, str(project), "--arm", "off", "--no-loss").exit_code == 0
    for record in read_results(tmp_path / "r.jsonl")[1]:
        assert record["answer"].startswith(record["completion"])
    assert any(r["answer"] != r["completion"] for r in read_results(tmp_path / "r.jsonl")[1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda events: events[:-1], "without a report"),
        (lambda events: [{"action": "SKIP"}, *events], "no usable field 'object'"),
        (
            lambda events: [*events[:-1], events[-1] | {"cost": {"nominal": NAN}}],
            "event.cost.nominal is nan",
        ),
    ],
    ids=["no report", "no object", "nan"],
)
def test_lesson_of_another_form_is_named_and_keeps_what_is_done(
    run: Run, project: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], told: str,
) -> None:  # fmt: skip
    real = fake_server.adapt

    def adapt(session: FakeSession, body: dict[str, Any], cut: bool) -> list[dict[str, Any]]:
        return change(list(real(session, body, cut)))

    monkeypatch.setattr(fake_server, "adapt", adapt)
    result = run(FakeServer(), str(project), "--arm", "adapt")
    assert isinstance(result.exception, PonderError), result.exception
    assert told in str(result.exception)
    assert "run the same command again to go on" in str(result.exception)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"id": "s"}, "no usable field 'version'"),
        ({"version": "x"}, "session.version is 'x'"),
        ({"version": 0, "digest": 3}, "session.digest is 3"),
    ],
)
def test_session_of_another_form_is_named(
    run: Run,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: dict[str, Any],
    told: str,
) -> None:
    arguments = [str(project), "--arm", "adapt", "--keep-sessions"]
    server = FakeServer()
    assert run(server, *arguments).exit_code == 0
    monkeypatch.setattr(FakeSession, "state", lambda *_: state)
    result = run(server, *arguments)
    assert isinstance(result.exception, PonderError), result.exception
    assert told in str(result.exception)


def test_settings_of_the_server_may_hold_numbers_that_json_can_not(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FakeServer.answer

    def answer(self: FakeServer, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/models":
            return real(self, request)
        card = '{"data": [{"id": "fake", "max_model_len": 700, "ttt": {"clip": NaN}}]}'
        return httpx.Response(200, text=card)

    monkeypatch.setattr(FakeServer, "answer", answer)
    result = run(FakeServer(), str(project), "--arm", "off")
    assert result.exit_code == 0, result.exception
    assert read_results(tmp_path / "r.jsonl")[0].settings["server.clip"] is None


@pytest.mark.parametrize("status", [401, 403, 405, 501])
def test_server_that_keeps_its_sessions_to_itself_has_none(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    real = FakeServer.answer

    def answer(self: FakeServer, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/sessions":
            return httpx.Response(status)
        return real(self, request)

    monkeypatch.setattr(FakeServer, "answer", answer)
    result = run(FakeServer(), str(project))
    assert result.exit_code == 0, result.exception
    assert {r["arm"] for r in read_results(tmp_path / "r.jsonl")[1]} == {"off", "stuffed"}


def is_busy(monkeypatch: pytest.MonkeyPatch, path: str, times: int) -> list[str]:
    """The server has no time for the first requests to a path; which these were."""
    real = FakeServer.answer
    asked: list[str] = []

    def answer(self: FakeServer, request: httpx.Request) -> httpx.Response:
        if request.url.path == path and len(asked) < times:
            asked.append(path)
            return httpx.Response(503)
        return real(self, request)

    monkeypatch.setattr(FakeServer, "answer", answer)
    return asked


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(("given", "tries"), [([], 3), (["--retries", "4"], 5)])
def test_look_ups_before_the_run_are_tried_as_often_as_was_said(
    run: Run, project: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], tries: int
) -> None:
    asked = is_busy(monkeypatch, "/v1/models", 99)
    result = run(FakeServer(), str(project), *given)
    assert f"tried {tries} times" in str(result.exception)
    assert len(asked) == tries


@pytest.mark.usefixtures("no_wait")
def test_counting_tokens_before_the_run_is_given_all_retries(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrelated = tmp_path / "long.py"
    unrelated.write_text("value = other(1, 2)\n" * 150)
    asked = is_busy(monkeypatch, "/tokenize", 9)
    result = run(FakeServer(), str(project), "--arm", "off", "--unrelated", str(unrelated))
    assert result.exit_code == 0, result.exception
    assert len(asked) == 9
