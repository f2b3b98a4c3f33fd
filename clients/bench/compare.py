"""`ponderttt bench compare`: result files of one benchmark side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ponderttt.errors import InvalidRequestError, PonderError

if TYPE_CHECKING:
    from clients.bench.pairing import Column
    from clients.results import Header, Record


# Metrics that have a better-known name: the mean over samples, then over problems.
_TITLES = {(kind, "passed"): "passed = pass@1" for kind in ("humaneval", "mbpp", "classeval")}


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Two or more result files of one benchmark.", show_default=False),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Column to which the others are compared; default: the first.",
            envvar="PONDERTTT_COMPARE_BASE",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to show; may be repeated. Default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", envvar="PONDERTTT_SEED")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the comparison here.", dir_okay=False)
    ] = None,
) -> None:
    """Compare result files in one table, with paired intervals over what they share."""
    from clients.results import read_results

    if len(files) < 2:
        raise InvalidRequestError("files", "one file has nothing to be compared with; name two")
    if len({path.resolve() for path in files}) < len(files):
        raise InvalidRequestError("files", "a file is named twice")
    results = [read_results(path) for path in files]
    check_kinds(files, [header for header, _ in results])
    found = compared(files, results, metric, base, seed)
    typer.echo(comparison_text(found))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PonderError(f"{json_file} can't be written: {error.strerror}") from error


def check_kinds(files: Sequence[Path], headers: Sequence[Header]) -> None:
    """Raise InvalidRequestError where the files are of different benchmarks."""
    if len({header.kind for header in headers}) > 1:
        kinds = ", ".join(
            f"{path.name} is of {header.kind}" for path, header in zip(files, headers, strict=True)
        )
        raise InvalidRequestError(
            "files",
            f"different benchmarks measure different things: {kinds}; compare like with like",
        )
    if len({tuple(header.key_fields) for header in headers}) > 1:
        raise InvalidRequestError(
            "files", "they name their units by different fields; run the benchmarks again"
        )


def compared(
    files: Sequence[Path],
    results: Sequence[tuple[Header, Sequence[Record]]],
    wanted: Sequence[str] | None,
    base: str | None,
    seed: int,
) -> dict[str, Any]:
    """Means by column and metric, differences to the base column, and settings that differ.

    Args:
        files: their names head the columns.
        results: of the files, of one kind.
        wanted: metrics; None: all that any file names.
        base: title of a column; None: the first.
        seed: of the bootstrap.
    Raises:
        InvalidRequestError: there is no such metric or column, or no file has a record.
    """
    from clients.bench.pairing import columns
    from clients.bench.statistics import CONFIDENCE

    names = _short_names(files)
    kind = results[0][0].kind
    load: dict[str, dict[str, Any]] = {}
    if kind == "load":
        from clients.load.summary import Bounds, current, summarise

        results = [(header, current(records)) for header, records in results]
        load = {
            name: summarise(records, Bounds())
            for name, (_, records) in zip(names, results, strict=True)
        }
    sides = [
        column
        for name, (header, records) in zip(names, results, strict=True)
        for column in columns(header, records, name)
    ]
    if not sides:
        raise InvalidRequestError("files", "none of them has a result yet; run the benchmark on")
    known = {metric: better for header, _ in results for metric, better in header.metrics.items()}
    for name in wanted or ():
        if name not in known:
            raise InvalidRequestError("--metric", f"no {name!r}; give {', '.join(known)}")
    first = next((column for column in sides if column.title == base), None)
    if base is not None and first is None:
        titles = ", ".join(column.title for column in sides)
        raise InvalidRequestError("--base", f"no column {base!r}; give one of {titles}")
    first = first or sides[0]
    return {
        "kind": kind,
        "base": first.title,
        "confidence": CONFIDENCE,
        "better": {metric: known[metric] for metric in wanted or known},
        "differing": differing(names, [header for header, _ in results]),
        "columns": {
            column.title: {metric: _cell(column, first, metric, seed) for metric in wanted or known}
            for column in sides
        },
    } | ({"load": load} if load else {})


def differing(names: Sequence[str], headers: Sequence[Header]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all files: value by file."""
    flat = []
    for header in headers:
        line = header.as_dict()
        settings = {f"settings.{name}": value for name, value in line.pop("settings").items()}
        for name in ("format", "kind", "key_fields", "metrics", "started", "run"):
            line.pop(name)
        flat.append(line | settings)
    fields = dict.fromkeys(name for line in flat for name in line)
    return {
        field: {name: line.get(field) for name, line in zip(names, flat, strict=True)}
        for field in fields
        if any(line.get(field) != flat[0].get(field) for line in flat)
    }


def _cell(column: Column, base: Column, metric: str, seed: int) -> dict[str, Any]:
    from clients.bench.pairing import difference

    against = difference(base, column, metric, seed) if column is not base else None
    return {
        "mean": column.mean(metric),
        "units": len(column.units(metric)),
        "difference": against.as_dict() if against else None,
    }


def _short_names(files: Sequence[Path]) -> list[str]:
    """File names, or as much of the paths as tells them apart."""
    for parts in range(1, max(len(path.resolve().parts) for path in files) + 1):
        names = ["/".join(path.resolve().with_suffix("").parts[-parts:]) for path in files]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in files]


def comparison_text(found: dict[str, Any]) -> str:
    """What `compared` found, as Markdown."""
    from clients.bench.pairing import INTERVALS, markdown, show, show_difference
    from clients.bench.statistics import Difference

    titles = list(found["columns"])
    rows = []
    for metric, better in found["better"].items():
        name = _TITLES.get((found["kind"], metric), metric)
        row = [f"{name} ({'↑' if better == 'higher' else '↓'})"]
        for title in titles:
            cell = found["columns"][title][metric]
            text = show(cell["mean"], metric)
            if cell["difference"] is not None:
                against = Difference(**cell["difference"])
                text += f"; {show_difference(against)}, n = {against.units}"
            elif title == found["base"] and cell["mean"] is not None:
                text += f" (n = {cell['units']})"
            elif cell["mean"] is not None:
                text += "; no unit in common"
            row.append(text)
        rows.append(row)
    parts = [
        markdown([found["kind"], *titles], rows),
        f"After the mean: paired difference to `{found['base']}` with its "
        f"{found['confidence']:.0%} interval ({INTERVALS}), over the n units that both have.",
    ]
    if "load" in found:
        parts.append(
            "All requests of each file, also those that the others have not, but for the warm-up; "
            "times of answers alone:\n\n" + _load_table(found["load"])
        )
    if found["differing"]:
        heads = ["setting", *next(iter(found["differing"].values()))]
        lines = [
            [name, *map(_short, values.values())] for name, values in found["differing"].items()
        ]
        parts.append("Settings that differ:\n\n" + markdown(heads, lines))
    else:
        parts.append("All settings are the same.")
    return "\n\n".join(parts)


def _load_table(load: Mapping[str, Mapping[str, Any]]) -> str:
    """What each load came to as a whole: a server that rejects much may be quick with the rest."""
    from clients.bench.pairing import markdown, show

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
        "goodput per second, under no bound (of requests)": goodput,
    }
    return markdown(
        ["load", *load],
        [[name, *(cell(figures) for figures in load.values())] for name, cell in rows.items()],
    )


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
