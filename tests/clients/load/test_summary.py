"""What a load comes to, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clients.load.plot import draw
from clients.load.summary import Bounds, current, summarise
from clients.results import Header

HEADER = Header(
    kind="load",
    seed=0,
    model="m",
    base_url="http://here",
    server_version=None,
    settings={"load": "by hand"},
    key_fields=("request",),
    metrics={},
)


def answer(due: float, ttft: float | None, seconds: float, **fields: Any) -> dict[str, Any]:
    """A request that was answered."""
    return {
        "outcome": "ok", "ok": True, "error": None, "warmup": False, "due": due, "lag": 0.0,
        "ttft": ttft, "tpot": 0.1, "gap": 0.2, "seconds": seconds, "elapsed": seconds,
        "prompt_tokens": 10, "completion_tokens": 5, "cut": False, **fields,
    }  # fmt: skip


def failure(outcome: str, due: float, elapsed: float, **fields: Any) -> dict[str, Any]:
    """One that wasn't."""
    nothing: dict[str, Any] = dict.fromkeys(("ttft", "tpot", "gap", "seconds", "prompt_tokens"))
    return answer(due, None, 0.0) | {
        "outcome": outcome, "ok": False, "error": f"{outcome}!", "elapsed": elapsed,
        "completion_tokens": 0, **nothing, **fields,
    }  # fmt: skip


RECORDS = [
    answer(0.0, 9.0, 9.0, warmup=True, cut=True),
    answer(2.0, 1.0, 4.0, cut=True),
    answer(3.0, 2.0, 9.0),
    answer(4.0, 3.0, 5.0, tpot=None),
    failure("rejected", 5.0, 0.5),
    failure("failed", 6.0, 1.0, completion_tokens=3),
    failure("timeout", 7.0, 120.0),
]


def test_figures_of_a_load_with_failures() -> None:
    found = summarise(RECORDS, Bounds(ttft=2.0, seconds=8.0))
    outcomes = {name: found[name] for name in ("ok", "rejected", "timeout", "failed")}
    assert outcomes == {"ok": 3, "rejected": 1, "timeout": 1, "failed": 1}
    assert (found["requests"], found["warmup"], found["cut"]) == (6, 1, 1)
    # From 2 s to the end of the last answer at 12 s; the time-out would have made it 125 s.
    assert found["span"] == pytest.approx(10.0)
    assert found["answers_per_second"] == pytest.approx(0.3)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (30, 15)
    assert found["prompt_tokens_per_second"] == pytest.approx(3.0)
    assert found["completion_tokens_per_second"] == pytest.approx(1.5)
    # The time-out runs for the last 5 s of them.
    assert found["running"] == pytest.approx((4 + 9 + 5 + 0.5 + 1 + 5) / 10)
    assert found["ttft"] == pytest.approx(
        {"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0}
    )
    assert found["seconds"]["p50"] == 5.0
    assert found["tpot"]["max"] == pytest.approx(0.1)
    # The first only: the second took too long, the third too long to its first token.
    assert found["goodput"] == {
        "bounds": {"ttft": 2.0, "tpot": None, "seconds": 8.0},
        "good": 1,
        "share": pytest.approx(1 / 6),
        "per_second": pytest.approx(0.1),
    }
    assert found["errors"] == {"rejected!": 1, "failed!": 1, "timeout!": 1}


def test_span_holds_all_the_time_in_which_requests_came() -> None:
    # An answer at the beginning, and a server that hangs from then on, are no quick server.
    records = [answer(0.0, 0.5, 1.0), *(failure("timeout", due, 60.0) for due in (1.0, 5.0, 10.0))]
    found = summarise(records, Bounds())
    assert found["span"] == pytest.approx(10.0)
    assert found["goodput"]["per_second"] == pytest.approx(0.1)


def test_nothing_but_failures_has_no_times() -> None:
    found = summarise([failure("failed", 0.0, 1.0), failure("failed", 4.0, 1.0)], Bounds())
    assert (found["ok"], found["seconds"], found["answers_per_second"]) == (0, None, 0.0)
    assert summarise([], Bounds())["goodput"]["per_second"] is None


def test_answer_without_text_is_as_late_as_its_end() -> None:
    empty = answer(0.0, None, 7.0, tpot=None)
    assert Bounds().good(empty)
    assert Bounds(ttft=7.0, tpot=0.001).good(empty)
    assert not Bounds(ttft=6.9).good(empty)


def test_files_of_earlier_versions_are_read_as_those_of_today(tmp_path: Path) -> None:
    earlier = [
        {name: value for name, value in record.items() if name not in ("elapsed", "cut")}
        | {"seconds": record["elapsed"]}
        for record in RECORDS
    ]
    expected = [record | {"cut": False} for record in RECORDS]
    assert current(earlier) == expected
    assert current(RECORDS) == RECORDS
    assert summarise(earlier, Bounds()) == summarise(expected, Bounds())
    draw(HEADER, earlier, Bounds(), tmp_path / "load.png")
    draw(HEADER, RECORDS, Bounds(), tmp_path / "now.png")
    assert (tmp_path / "now.png").stat().st_size > 1000
