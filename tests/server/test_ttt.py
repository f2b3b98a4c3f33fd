"""The `ttt` extension, through the official client."""

from __future__ import annotations

import inspect
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import openai
import pytest

from tests.helpers import source_text
from tests.server.live import PROMPT, Live

FIELDS = {
    "session", "version_before", "version_after", "digest", "gate", "budget", "cost_model",
    "chunk_size", "when", "pending", "choice", "cost", "chunks",
}  # fmt: skip
CHUNK_FIELDS = {
    "index", "phase", "tokens", "action", "reason", "loss_before", "loss_after", "cost",
    "nominal", "measured", "seconds",
}  # fmt: skip
LONG = source_text()[:600]


def complete(live: Live, prompt: str = LONG, **ttt: Any) -> dict[str, Any]:
    """The `ttt` object of a greedy completion."""
    answer = live.openai.completions.create(
        model=live.model, prompt=prompt, max_tokens=4, temperature=0, extra_body={"ttt": ttt}
    )
    report: dict[str, Any] = (answer.model_extra or {})["ttt"]
    return report


def test_report_has_the_documented_fields(live: Live) -> None:
    name = live.new_session()
    report = complete(live, session=name, gate="fixed", chunk_size=64)
    assert set(report) == FIELDS
    assert report["session"] == name
    assert (report["gate"], report["budget"], report["cost_model"]) == ("fixed", None, "nominal")
    assert (report["chunk_size"], report["when"], report["pending"]) == (64, "inline", 0)
    chunks = report["chunks"]
    assert len(chunks) > 3
    updated = [chunk for chunk in chunks if chunk["action"] == "UPDATE_1"]
    assert report["version_before"] == 0
    assert report["version_after"] == len(updated) > 0
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
    for before, after in pairwise(chunks):
        assert before["tokens"][1] == after["tokens"][0]
    for chunk in updated:
        assert set(chunk) == CHUNK_FIELDS
        assert chunk["phase"] == "prompt"
        assert chunk["reason"] == "fixed"
        assert chunk["nominal"] == chunk["cost"] == 3
        assert chunk["loss_after"] < chunk["loss_before"] + 0.02
    cost = report["cost"]
    assert cost["chunks"] == len(chunks)
    assert cost["nominal"] == pytest.approx(sum(c["nominal"] for c in chunks) / len(chunks))
    assert cost["measured"] == pytest.approx(sum(c["measured"] for c in chunks) / len(chunks))
    assert cost["seconds"] == pytest.approx(sum(c["seconds"] for c in chunks))


def test_session_keeps_what_it_learned_and_reports_the_weights_it_read(live: Live) -> None:
    name = live.new_session()
    first = complete(live, session=name, gate="fixed", chunk_size=64)
    state = live.session(name)
    second = complete(live, session=name, gate="fixed", chunk_size=64)
    assert second["version_before"] == first["version_after"] == state["version"]
    assert second["digest"] == state["digest"] != first["digest"]
    assert {chunk["reason"] for chunk in second["chunks"]} <= {"seen", "short"}
    assert second["version_after"] == second["version_before"]


def test_teaching_a_session_lowers_its_loss_on_text_of_the_same_family(live: Live) -> None:
    def loss(session: str) -> float:
        held_out = inspect.getsource(textwrap)[3000:3800]
        answer = live.openai.completions.create(
            model=live.model,
            prompt=held_out,
            max_tokens=0,
            echo=True,
            logprobs=0,
            extra_body={"ttt": {"session": session, "gate": "off"}},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        scores = (logprobs.token_logprobs or [])[1:]
        return -sum(scores) / len(scores)

    taught, untaught = live.new_session(), live.new_session()
    before = loss(taught)
    report = live.adapt(taught, source_text()[:12000], gate="fixed", chunk_size=64)
    assert report["version_after"] > 40
    assert report["loss_after"] < report["loss_before"]
    assert loss(taught) < before - 0.1
    assert loss(untaught) == pytest.approx(before, abs=1e-6)


def test_weights_of_one_request_leave_no_trace(live: Live) -> None:
    before = complete(live, gate="off")
    learned = complete(live, gate="fixed", chunk_size=64)
    after = complete(live, gate="off")
    assert learned["session"] is None
    assert learned["version_after"] > 0
    assert after["digest"] == before["digest"]


def test_budget_of_one_never_learns(live: Live) -> None:
    report = complete(live, session=live.new_session(), gate="fixed", budget=1.0, chunk_size=64)
    assert {chunk["action"] for chunk in report["chunks"]} == {"SKIP"}
    assert report["version_after"] == 0
    assert report["cost"]["nominal"] == 1.0
    assert {chunk["reason"] for chunk in report["chunks"]} <= {"budget", "short"}


def test_naming_an_action_asks_for_gate_fixed(live: Live) -> None:
    report = complete(live, action="UPDATE_2", chunk_size=64)
    assert report["gate"] == "fixed"
    assert report["chunks"][0]["action"] == "UPDATE_2"
    assert report["chunks"][0]["nominal"] == 5


def test_background_answers_first_and_learns_afterwards(live: Live) -> None:
    name = live.new_session()
    report = complete(live, session=name, gate="fixed", chunk_size=64, when="background")
    assert report["when"] == "background"
    assert report["pending"] > 3
    assert report["chunks"] == []
    # The gauge of background work may still say 0 from before.
    until = time.monotonic() + 10
    while (state := live.session(name))["chunks"] != report["pending"]:
        assert time.monotonic() < until, state
        time.sleep(0.02)
    assert state["version"] > 0
    live.wait_for("num_background", 0)


def test_defaults_of_a_session_hold_where_its_requests_are_silent(live: Live) -> None:
    name = live.new_session(gate="fixed", action="UPDATE_2", chunk_size=32, budget=4.0)
    silent = complete(live, session=name)
    assert (silent["gate"], silent["chunk_size"], silent["budget"]) == ("fixed", 32, 4.0)
    assert silent["cost"]["nominal"] <= 4.0
    spoken = complete(live, session=name, gate="off")
    assert spoken["gate"] == "off"


def test_unknown_session_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody") as caught:
        complete(live, session="nobody")
    assert caught.value.param == "ttt.session"


@pytest.mark.parametrize("read", ["session", "auto"])
def test_eight_sessions_at_once_say_what_each_says_alone(live: Live, read: str) -> None:
    text = source_text()
    lessons = [text[4000 * i : 4000 * i + 1500] for i in range(8)]

    def taught(lesson: str) -> tuple[str, str]:
        name = live.new_session()
        live.adapt(name, lesson, gate="fixed", chunk_size=64)
        answer = live.openai.completions.create(
            model=live.model,
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            extra_body={"ttt": {"session": name, "gate": "off", "read": read}, "ignore_eos": True},
        )
        return answer.choices[0].text, live.session(name)["version"]

    alone = [taught(lesson) for lesson in lessons]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(taught, lessons))
    assert together == alone
    if read == "session":
        # The lessons made a difference, or this would show nothing.
        assert len({said for said, _ in alone}) > 4


def test_answer_tells_whose_weights_gave_it_and_a_session_may_settle_that(live: Live) -> None:
    name = live.new_session(read="session")
    assert live.session(name)["read"] == "session"
    live.adapt(name, source_text()[2000:6000], gate="fixed", chunk_size=64)
    assert complete(live, session=name, gate="off")["choice"] is None
    choice = complete(live, session=name, gate="off", read="auto")["choice"]
    assert set(choice) == {"read", "session", "base", "error", "tokens"}
    surely = choice["session"] + 1.645 * choice["error"] < choice["base"]
    assert choice["read"] == ("session" if surely else "base")


def test_weights_that_are_nobodys_are_refused(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match=r"read.*auto.*session"):
        complete(live, read="mine")
