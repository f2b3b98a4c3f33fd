"""What `ponderttt bench compare` says."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from clients.bench.statistics import Difference
from clients.bench.tables import (
    INTERVALS,
    marked,
    sectioned,
    show,
    show_difference,
    side_by_side,
    wrapped,
)

# Parts that are left out; there may be hundreds of problems.
_MOST_NAMED = 8
# Metrics that have a better-known name: the mean over samples, then over problems.
_TITLES = {(kind, "passed"): "passed = pass@1" for kind in ("humaneval", "mbpp", "classeval")}


def comparison_text(found: dict[str, Any]) -> str:
    """What `compared` found, as Markdown; what makes it no fair comparison comes first."""
    parts = [
        *_warning(found),
        *_left_out(found),
        *(f"`{name}`: {told}." for name, told in found["unfinished"].items()),
        _table(found),
        wrapped(_legend(found)),
    ]
    if "load" in found:
        about = (
            "All requests of each file, also those that the others have not, but for the warm-up; "
            "times of answers alone, goodput under no bound:"
        )
        parts += [wrapped(about), _load_table(found["load"])]
    return "\n\n".join([*parts, _settings(found["differing"])])


def _warning(found: Mapping[str, Any]) -> list[str]:
    """Of files of which nothing can be paired."""
    others = {name: each for name, each in found["unlike"].items() if each["left_out"] is None}
    if not others:
        return []
    names = dict.fromkeys(name for each in others.values() for name in each["settings"])
    values = {
        name: ", ".join(f"`{file}` {each.get(name)}" for file, each in found["asked"].items())
        for name in names
    }
    told = "; ".join(f"{name}: {each}" for name, each in values.items())
    return [
        wrapped(
            "**WARNING: these files were asked other things**, as their settings say "
            f"({told}). Units of one name are not the same there. So nothing of "
            f"{', '.join(f'`{name}`' for name in others)} is paired with `{found['base']}`, and "
            "means beside each other say little."
        )
    ]


def _left_out(found: Mapping[str, Any]) -> list[str]:
    """What can't be paired of files of which the rest can."""
    told = []
    for name, each in found["unlike"].items():
        parts = each["left_out"]
        if parts is None:
            continue
        named = ", ".join(parts[:_MOST_NAMED])
        more = f" and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
        told.append(
            wrapped(
                f"`{name}` and `{found['base']}` were not asked all the same. Left out of what is "
                f"paired, since only one has it or theirs differ: {named}{more}."
            )
        )
    return told


def _table(found: Mapping[str, Any]) -> str:
    heads = [found["kind"], "mean", "n", "base, own", "difference", "common n"]
    sections = {}
    if found["answered_by"]:
        sections["answered by the session"] = [
            [title, *_share(answered), "", "", ""]
            for title, answered in found["answered_by"].items()
        ]
    for metric, better in found["better"].items():
        cells = {title: column[metric] for title, column in found["columns"].items()}
        if any(cell["units"] for cell in cells.values()):
            name = _TITLES.get((found["kind"], metric), metric)
            sections[marked(name, better)] = [
                [title, *_row(cell, metric, title == found["base"])]
                for title, cell in cells.items()
            ]
    return sectioned(heads, sections)


def _share(answered: Mapping[str, int]) -> tuple[str, str]:
    of = sum(answered.values())
    return f"{answered.get('session', 0) / of:.1%}", str(of)


def _row(cell: Mapping[str, Any], metric: str, is_base: bool) -> list[str]:
    row = [show(cell["mean"], metric), str(cell["units"])]
    if is_base:
        return [*row, "", "(base)", ""]
    if cell["difference"] is None:
        return [*row, "", "no unit in common" if cell["units"] else "", ""]
    against = Difference(**cell["difference"])
    means = ", ".join(show(cell[name], metric) for name in ("base_mean", "own_mean"))
    return [*row, means, show_difference(against), str(against.units)]


def _legend(found: Mapping[str, Any]) -> str:
    text = (
        "`mean`: over a file's own n units. `base, own`: the means of "
        f"`{found['base']}` and of the row, both over the units that both have (`common n`). "
        "`difference`: own - base over these, paired, with its "
        f"{found['confidence']:.0%} interval ({INTERVALS})."
    )
    if found["answered_by"]:
        text += (
            " `answered by the session`: of the n answers that say whose weights gave them; the "
            "others are the base model's, and say nothing of what the session has learned."
        )
    empty = [
        metric
        for metric in found["better"]
        if not any(column[metric]["units"] for column in found["columns"].values())
    ]
    return text + (f" No file has {', '.join(empty)}." if empty else "")


def _settings(differing: Mapping[str, Mapping[str, Any]]) -> str:
    if not differing:
        return "All settings are the same."
    lines = []
    for setting, values in differing.items():
        files: dict[str, list[str]] = defaultdict(list)
        for name, value in values.items():
            files[json.dumps(value, ensure_ascii=False)].append(f"`{name}`")
        told = "; ".join(f"{value} in {', '.join(names)}" for value, names in files.items())
        lines.append(wrapped(f"- {setting}: {told}", "  "))
    return "Settings that differ:\n\n" + "\n".join(lines)


def _load_table(load: Mapping[str, Mapping[str, Any]]) -> str:
    """What each load came to as a whole: a server that rejects much may be quick with the rest."""

    def spread(figures: Mapping[str, Any], name: str) -> str:
        values = figures[name] or {}
        return " / ".join(show(values.get(p), name) for p in ("p50", "p90", "p99"))

    def goodput(figures: Mapping[str, Any]) -> str:
        found = figures["goodput"]
        share = f" ({found['share']:.1%})" if found["share"] is not None else ""
        return show(found["per_second"], "per_second") + share

    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "requests": lambda figures: str(figures["requests"]),
        "ok / rejected / timed out / failed": lambda figures: " / ".join(
            str(figures[name]) for name in ("ok", "rejected", "timeout", "failed")
        ),
        "answers per second": lambda figures: show(figures["answers_per_second"], "per_second"),
        "output tokens per second": lambda figures: show(
            figures["completion_tokens_per_second"], "per_second"
        ),
        "ttft, p50 / p90 / p99": lambda figures: spread(figures, "ttft"),
        "seconds, p50 / p90 / p99": lambda figures: spread(figures, "seconds"),
        "goodput per second (of requests)": goodput,
    }
    return side_by_side(
        ["load", *load],
        [[name, *(cell(figures) for figures in load.values())] for name, cell in rows.items()],
    )
