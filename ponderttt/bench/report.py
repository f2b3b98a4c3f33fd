"""The results as a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ponderttt.bench.results import Results

_HEAD = (
    "| what | against | ratio (quartiles) | target | goal | met | ours | theirs |\n"
    "|---|---|---|---|---|---|---|---|"
)


def markdown(results: Results) -> str:
    """Settings, one line per comparison, further figures, and what was skipped and why."""
    parts = [_settings(results.settings), "\n".join([_HEAD, *_lines(results)])]
    if extras := list(_extras(results)):
        parts.append("\n".join(["Further figures (medians):", "", *extras]))
    if skipped := list(dict.fromkeys(_skipped(results))):
        parts.append("\n".join(["Skipped:", "", *skipped]))
    return "\n\n".join(parts) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    line = (
        f"{settings['model']}, {settings['dtype']}, {settings['threads']} threads of "
        f"{settings['cores']} cores ({settings['machine']}); medians of {settings['repeats']}; "
        f"texts from {settings['texts']}; {versions}."
    )
    if settings["quick"]:
        line += " **Small sizes (--quick): these figures show only that all works.**"
    return line


def _lines(results: Results) -> Iterator[str]:
    for row in results.rows.values():
        for comparison in row["comparisons"]:
            yield "| " + " | ".join(_cells(row, comparison)) + " |"


def _cells(row: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[str]:
    sign = "≥" if comparison["better"] == "higher" else "≤"
    limits = [
        "–" if limit is None else f"{sign} {limit:g}×"
        for limit in (comparison["at_least"], comparison["goal"])
    ]
    figures = [
        f"{row['sides'][name]['median']:.4g} {row['unit']}" if name in row["sides"] else "–"
        for name in (comparison["ours"], comparison["theirs"])
    ]
    if "skipped" in comparison:
        ratio, met = "skipped", "–"
    else:
        spread = comparison["ratio"]
        ratio = f"{spread['median']:.3g}× ({spread['low']:.3g}–{spread['high']:.3g})"
        met = _verdict(comparison)
    return [comparison["what"], comparison["against"], ratio, *limits, met, *figures]


def _verdict(comparison: Mapping[str, Any]) -> str:
    if comparison["goal_met"]:
        return "goal"
    return {True: "yes", False: "**no**", None: "–"}[comparison["met"]]


def _extras(results: Results) -> Iterator[str]:
    for row in results.rows.values():
        for name, side in row["sides"].items():
            for extra, figure in side["extra"].items():
                yield f"- {row['name']}, {name}: {extra} {figure['median']:.4g}"


def _skipped(results: Results) -> Iterator[str]:
    for row in results.rows.values():
        for name, reason in row["skipped"].items():
            first = reason.splitlines()[0]
            yield f"- {name}: {first}"
