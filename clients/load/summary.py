"""What a load run comes to, from its records, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients import shapes
from clients.results import Header, Record

_times = dict.fromkeys(("ttft", "tpot", "gap"), shapes.or_null(shapes.number))
_costs = dict.fromkeys(("nominal", "measured"), shapes.or_null(shapes.number))
_RECORD = shapes.fields(
    {
        "outcome": shapes.text,
        "error": shapes.or_null(shapes.text),
        "warmup": shapes.boolean,
        "due": shapes.number,
        "lag": shapes.number,
        "prompt_tokens": shapes.or_null(shapes.number),
        "completion_tokens": shapes.number,
        **_times,
    },
    {"elapsed": shapes.number, "cut": shapes.boolean, "counted": shapes.boolean},
)
_LEARNED = shapes.fields({"chunks": shapes.count, "updates": shapes.count, **_costs})
# Below, the 99th percentile is little more than the maximum.
_FEW = 100
_LATE = 0.05
# Of the time of a load, in which its last request has ended.
_MOST_OF = 0.9
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A request is good if it is answered within them; seconds, None for no bound.

    Args:
        ttft: to the first token.
        tpot: per token after it.
        seconds: to the end.
    """

    ttft: float | None = None
    tpot: float | None = None
    seconds: float | None = None

    def good(self, record: Mapping[str, Any]) -> bool:
        """Whether a request was answered in time; one token alone passes any bound of TPOT."""
        if record["outcome"] != "ok":
            return False
        # Who gets an answer without text knows no sooner than at its end.
        ttft = record["seconds"] if record["ttft"] is None else record["ttft"]
        times = (
            (ttft, self.ttft), (record["tpot"], self.tpot), (record["seconds"], self.seconds)
        )  # fmt: skip
        return all(limit is None or time is None or time <= limit for time, limit in times)

    def __str__(self) -> str:
        names = (("TTFT", self.ttft), ("TPOT", self.tpot), ("end to end", self.seconds))
        given = [f"{name} ≤ {limit * 1e3:g} ms" for name, limit in names if limit is not None]
        return ", ".join(given) or "answered at all"


def current(records: Sequence[Record]) -> list[Record]:
    """Records as they are written now, also those of earlier versions.

    There, `seconds` was the time until any end, and nothing said whether a prompt was cut.
    """
    return [
        {"elapsed": r["seconds"], "cut": False}
        | r
        | {"seconds": r["seconds"] if r["outcome"] == "ok" else None}
        for r in records
    ]


def check_record(record: Record) -> shapes.Fault | None:
    """Whether a record holds what is read of it; for `clients.results.check_records`."""
    wrong = _RECORD(record)
    if wrong is None and (record["outcome"] == "ok" or "elapsed" not in record):
        wrong = shapes.fields({"seconds": shapes.number})(record)
    return _LEARNED(record) if wrong is None and record.get("chunks") is not None else wrong


def summarise(records: Sequence[Record], bounds: Bounds) -> dict[str, Any]:
    """Figures of all requests but those to warm up; times in seconds.

    Percentiles are of answered requests alone; rejected and failed ones are counted, and none of
    them is good. Rates are over the span from when the first request was due to the end of the last
    answer, or to when the last request was due, if that is later. What is waited for in vain
    afterwards isn't in it: a request that times out at the end of a load says nothing of its speed.

    Args:
        records: of one run.
        bounds: of the goodput.
    """
    counted = [record for record in current(records) if not record["warmup"]]
    answered = [record for record in counted if record["outcome"] == "ok"]
    outcomes = Counter(record["outcome"] for record in counted)
    begin = min((r["due"] for r in counted), default=0.0)
    end = max(
        [r["due"] for r in counted] + [r["due"] + r["seconds"] for r in answered], default=0.0
    )
    span = end - begin
    good = sum(bounds.good(record) for record in counted)
    known = [r["prompt_tokens"] for r in answered if r["prompt_tokens"] is not None]
    read = sum(known) if known or not answered else None
    written = sum(record["completion_tokens"] for record in answered)
    errors = Counter(r["error"] for r in counted if r["error"] is not None)

    def per_second(count: float | None) -> float | None:
        return count / span if span > 0 and count is not None else None

    return {
        "requests": len(counted),
        "warmup": len(records) - len(counted),
        **{name: outcomes[name] for name in ("ok", "rejected", "timeout", "failed")},
        "span": span,
        "answers_per_second": per_second(len(answered)),
        "prompt_tokens": read,
        "completion_tokens": written,
        "uncounted": sum(not record.get("counted", True) for record in answered),
        "prompt_tokens_per_second": per_second(read),
        "completion_tokens_per_second": per_second(written),
        # Little's law: the mean number in the system.
        "running": per_second(sum(min(r["elapsed"], end - r["due"]) for r in counted)),
        **{name: spread(answered, name) for name in ("ttft", "tpot", "seconds", "gap")},
        "lag": spread(counted, "lag"),
        "cut": sum(record["cut"] for record in counted),
        "goodput": {
            "bounds": {"ttft": bounds.ttft, "tpot": bounds.tpot, "seconds": bounds.seconds},
            "good": good,
            "share": good / len(counted) if counted else None,
            "per_second": per_second(good),
        },
        "learning": _learning(answered),
        "errors": dict(errors.most_common(5)),
    }


def unfinished(header: Header, records: Sequence[Record]) -> str | None:
    """What to say of a file whose load ended too early; None where nothing shows that it did.

    Loads by number lack requests. Of those by time, only the last request tells how far they got.
    """
    settings = header.settings
    wanted, seconds = settings["requests"], settings["duration"]
    if wanted is not None and len(records) >= wanted + settings["warmup"]:
        return None
    ends = max((r["due"] + r["elapsed"] for r in current(records)), default=0.0)
    if seconds is not None and ends >= _MOST_OF * seconds:
        return None
    if seconds is not None:
        return f"May be unfinished: the last request ended after {ends:.3g} of {seconds:g} s."
    return (
        f"Unfinished: {len(records)} of {wanted + settings['warmup']} requests, with those to warm "
        "up."
    )


def spread(records: Sequence[Record], name: str) -> dict[str, float] | None:
    """Mean, percentiles (linear between ranks) and maximum of a field; None without values."""
    import numpy as np

    values = [record[name] for record in records if record[name] is not None]
    if not values:
        return None
    points = np.percentile(values, PERCENTILES)
    found = {f"p{p}": float(value) for p, value in zip(PERCENTILES, points, strict=True)}
    return {"mean": sum(values) / len(values), **found, "max": max(values)}


def _learning(answered: Sequence[Record]) -> dict[str, Any] | None:
    """What our server says of test-time training; None of others."""
    told = [record for record in answered if record.get("chunks")]
    if not told:
        return None
    chunks = sum(record["chunks"] for record in told)
    return {
        "chunks": chunks,
        "updates": sum(record["updates"] for record in told),
        **{
            name: sum((r[name] or 0.0) * r["chunks"] for r in told) / chunks
            for name in ("nominal", "measured")
        },
    }


def markdown(header: Header, summary: Mapping[str, Any], bounds: Bounds) -> str:
    """The summary as a table, with what it was measured on."""
    settings = header.settings
    unfinished = summary.get("unfinished")
    lines = [
        f"### Load on {header.model} ({header.server_version or 'server of unknown version'})",
        "",
        f"{settings['load']}, prompts of {settings['prompt_tokens']} and answers of "
        f"{settings['output_tokens']} tokens, ttt {settings['ttt'] or 'not sent'}, seed "
        f"{header.seed}.",
        *(["", f"**{unfinished}**"] if unfinished else []),
        "",
        f"| ms | mean | {' | '.join(f'p{p}' for p in PERCENTILES)} | max |",
        "| --- |" + " ---: |" * (len(PERCENTILES) + 2),
    ]
    names = {
        "ttft": "time to first token",
        "tpot": "time per output token",
        "gap": "longest pause in an answer",
        "seconds": "end to end",
    }
    for name, what in names.items():
        cells = [_ms(value) for value in (summary[name] or {}).values()]
        lines.append(f"| {what} | {' | '.join(cells or ['-'] * (len(PERCENTILES) + 2))} |")
    goodput = summary["goodput"]
    rows = {
        "requests (to warm up, not counted)": f"{summary['requests']} ({summary['warmup']})",
        "ok / rejected / timed out / failed": " / ".join(
            str(summary[name]) for name in ("ok", "rejected", "timeout", "failed")
        ),
        "answers per second": _number(summary["answers_per_second"]),
        "prompt tokens per second": _number(summary["prompt_tokens_per_second"]),
        "output tokens per second": _number(summary["completion_tokens_per_second"]),
        "requests at once, on average": _number(summary["running"]),
        f"goodput per second ({bounds})": f"{_number(goodput['per_second'])}"
        + (f" ({goodput['share']:.1%} of requests)" if goodput["share"] is not None else ""),
    }
    learning = summary["learning"]
    if learning is not None:
        rows["chunks updated"] = f"{learning['updates']} of {learning['chunks']}"
        rows["cost per chunk, nominal / measured"] = (
            f"{learning['nominal']:.2f} / {learning['measured']:.2f} × forward"
        )
    lines += ["", "| over all | |", "| --- | ---: |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([*lines, *_notes(header, summary)]) + "\n"


def _notes(header: Header, summary: Mapping[str, Any]) -> list[str]:
    notes = [f"{count} × {error}" for error, count in summary["errors"].items()]
    if summary["uncounted"]:
        notes.append(
            f"the server didn't count the tokens of {summary['uncounted']} answers (`usage`): the "
            "pieces that they came in are taken for tokens, and their prompts are not in the rate"
        )
    if summary["cut"]:
        notes.append(
            f"{summary['cut']} prompts were cut to fit the model's context of "
            f"{header.settings['context']} tokens; they are shorter than asked for"
        )
    if 0 < summary["ok"] < _FEW:
        notes.append(f"the 99th percentile of {summary['ok']} answers says little more than max")
    if summary["lag"] is not None and summary["lag"]["p99"] > _LATE:
        notes.append(
            f"this client was late (99th percentile {_ms(summary['lag']['p99'])} ms); its own "
            "machine may be too busy to measure"
        )
    return ["", *(f"- {' '.join(note.split())}" for note in notes)] if notes else []


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
