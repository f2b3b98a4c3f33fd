"""What HumanEval, MBPP and ClassEval say in the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from clients.bench.functional.drive import REFUSED
from clients.bench.functional.passk import estimate
from clients.bench.statistics import CONFIDENCE
from clients.bench.tables import markdown
from clients.results import Header, Record


def summary(header: Header, records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """Everything that is worth knowing, for --json.

    Args:
        header, records: of the result file.
        ks: of pass@k; those that no problem has enough samples for are left out.
    """
    counts: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        counts[record["task_id"]].append(record["passed"])
    pairs = [(len(each), sum(each)) for each in counts.values()]
    found = [estimate(pairs, k, header.seed) for k in ks] if pairs else []
    return {
        **header.as_dict(),
        "answered_problems": len(counts),
        "answers": len(records),
        "passed": sum(record["passed"] for record in records),
        "confidence": CONFIDENCE,
        "pass_at_k": {str(each.k): asdict(each) for each in found if each is not None},
        "verdicts": dict(Counter(record["verdict"] for record in records).most_common()),
        "checks": _checks(records),
        "cut_off": sum(record["finish_reason"] == "length" for record in records),
        "refused": {
            f"{record['task_id']}/{record['sample']}": record["result"]
            for record in records
            if record["verdict"] == REFUSED
        },
        # None where the server refused.
        "prompt_tokens": sum(record["prompt_tokens"] or 0 for record in records),
        "completion_tokens": sum(record["completion_tokens"] or 0 for record in records),
        "answer_seconds": sum(record["seconds"] or 0.0 for record in records),
        "run_seconds": sum(record["run_seconds"] for record in records),
        # Files of earlier versions have none.
        "ran_again": sum(record.get("ran_again", 0) for record in records),
        "answered_by": _answered_by(records),
        "learning": _learning(records),
    }


def _checks(records: Sequence[Record]) -> dict[str, int] | None:
    """Checks of problems that have several, over all answers: ClassEval's methods."""
    verdicts = [verdict for record in records for verdict in (record["checks"] or {}).values()]
    if not verdicts:
        return None
    return {"passed": sum(verdict == "passed" for verdict in verdicts), "of": len(verdicts)}


def _answered_by(records: Sequence[Record]) -> dict[str, int]:
    """Answers by whose weights gave them, where the prompts were to tell."""
    reports = [record["ttt"] for record in records if record["ttt"] is not None]
    # Other servers' reports, and those of earlier versions, have none.
    choices = [report["choice"] for report in reports if report.get("choice")]
    return dict(Counter(choice["read"] for choice in choices))


def _learning(records: Sequence[Record]) -> dict[str, Any] | None:
    """What was learned and spent; None of servers that don't learn. Means are over chunks."""
    reports = [record["ttt"] for record in records if record["ttt"] is not None]
    costs = [report["cost"] for report in reports]
    chunks = sum(cost["chunks"] or 0 for cost in costs)
    if not chunks:
        return None
    every = [chunk for report in reports for chunk in report["chunks"]]
    return {
        "gates": sorted({report["gate"] for report in reports}),
        "chunk_sizes": sorted({report["chunk_size"] for report in reports}),
        "chunks": chunks,
        "actions": dict(Counter(chunk["action"] for chunk in every).most_common()),
        "reasons": dict(Counter(chunk["reason"] for chunk in every).most_common()),
        "answers_with_updates": sum(
            any(chunk["action"] != "SKIP" for chunk in report["chunks"]) for report in reports
        ),
        "nominal": _per_chunk(costs, "nominal"),
        "measured": _per_chunk(costs, "measured"),
        "seconds": sum(cost["seconds"] or 0.0 for cost in costs),
    }


def _per_chunk(costs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean over chunks; a server's cost that was no number is None, and doesn't count."""
    known = [cost for cost in costs if cost[name] is not None and cost["chunks"]]
    chunks = sum(cost["chunks"] for cost in known)
    return sum(cost[name] * cost["chunks"] for cost in known) / chunks if chunks else None


def table(found: dict[str, Any], checks_are: str | None) -> str:
    """The Markdown that a user sees.

    Args:
        found: by `summary`.
        checks_are: what checks stand for, where problems have several.
    """
    rows = [
        [f"pass@{k}", _share(each["value"]), _interval(each)]
        for k, each in found["pass_at_k"].items()
    ]
    if checks_are is not None and found["checks"] is not None:
        passed, of = found["checks"]["passed"], found["checks"]["of"]
        rows.append([f"{checks_are} passed", _share(passed / of), f"{passed} of {of}"])
    lines = [_asked(found), markdown([found["kind"], "mean", "95% interval"], rows)]
    lines.append(_spent(found))
    if found["refused"]:
        name, reason = next(iter(found["refused"].items()))
        lines.append(
            f"Refused by the server, and not passed: {len(found['refused'])} answers; the first, "
            f"{name}: {reason}."
        )
    if found["answered_by"]:
        answered = [f"{count} by the {name}'s" for name, count in found["answered_by"].items()]
        lines.append(
            "Whose weights answered was left to the prompts: "
            f"{', '.join(answered).replace('base', 'base model')}."
        )
    learning = found["learning"]
    if learning is not None:
        lines.append(_learned(learning, found["answers"]))
    return "\n\n".join(lines)


def _asked(found: dict[str, Any]) -> str:
    settings = found["settings"]
    part = f", {settings['part']}" if settings["part"] else ""
    how = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    inside = f", session {settings['session']}" if settings["session"] else ""
    inside += f", gate {settings['ttt.gate']}" if "ttt.gate" in settings else ""
    done = found["answers"], settings["problems"] * settings["samples"]
    unfinished = "" if done[0] == done[1] else f" (unfinished: {done[0]} of {done[1]} answers)"
    return (
        f"{found['model']} on {found['server_version'] or 'an unknown server'}: "
        f"{found['passed']} of {found['answers']} answers to {found['answered_problems']} problems "
        f"passed{unfinished}; {settings['source']}{part}, {settings['prompting']} prompts, {how}"
        f"{inside}."
    )


def _spent(found: dict[str, Any]) -> str:
    others = [f"{count} {name}" for name, count in found["verdicts"].items() if name != "passed"]
    return (
        f"Not passed: {', '.join(others) or 'none'}. {found['cut_off']} answers were cut off at "
        f"{found['settings']['max_tokens']} tokens. {found['prompt_tokens']:,} tokens read, "
        f"{found['completion_tokens']:,} generated; {found['answer_seconds']:.0f} s of waiting for "
        f"answers (added up), {found['run_seconds']:.0f} s of running programs. "
        f"{found['ran_again']} programs used up their wall time but little processor time, and "
        "were run a second time, alone."
    )


def _learned(learning: dict[str, Any], answers: int) -> str:
    actions = ", ".join(f"{count} {action}" for action, count in learning["actions"].items())
    reasons = ", ".join(f"{count} {reason}" for reason, count in learning["reasons"].items())
    return (
        f"Learning: gate {', '.join(learning['gates'])}, chunks of "
        f"{', '.join(map(str, learning['chunk_sizes']))} tokens. {learning['chunks']} chunks "
        f"({actions}; {reasons}); {learning['answers_with_updates']} of {answers} answers after or "
        f"with an update. Cost per chunk, × forward: nominal {_times(learning['nominal'])}, "
        f"measured {_times(learning['measured'])}; {learning['seconds']:.1f} s."
    )


def _times(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _interval(each: dict[str, Any]) -> str:
    if each["low"] is None:
        return "–"
    return f"{each['low']:.1%} to {each['high']:.1%} ({each['method']})"
