"""`ponderttt bench compare`: result files of one benchmark side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ponderttt.errors import InvalidRequestError, PonderError

if TYPE_CHECKING:
    from clients.bench.asked import Asked
    from clients.bench.pairing import Column
    from clients.results import Better, Header, Record

# Of pass@k, where the files have the samples.
_KS = (10, 100)
# Settings that follow from others.
_FOLLOWING = ("settings.steps", "settings.repository_texts", "settings.unrelated_texts")


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Two or more result files of one benchmark.", show_default=False),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Column to which the others are compared; default: the first with a result.",
            envvar="PONDERTTT_COMPARE_BASE",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric to show, also pass@k for any k up to the samples per problem; may be "
            "repeated. Default: all, with pass@10, pass@100 and the largest k that two files have."
        ),
    ] = None,
    unpaired: Annotated[
        bool,
        typer.Option(
            "--unpaired",
            help="Show files that were asked other things, too; they get no differences.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", envvar="PONDERTTT_SEED")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the comparison here.", dir_okay=False)
    ] = None,
) -> None:
    """Compare result files in one table, with paired intervals over what they share."""
    from clients.bench.checks import check_kinds
    from clients.bench.compare_report import comparison_text
    from clients.options import check_writable
    from clients.results import read_results

    if len(files) < 2:
        raise InvalidRequestError("files", "one file has nothing to be compared with; name two")
    if len({path.resolve() for path in files}) < len(files):
        raise InvalidRequestError("files", "a file is named twice")
    check_writable("--json", json_file)
    results = [read_results(path) for path in files]
    check_kinds(files, [header for header, _ in results])
    found = compared(files, results, metric, base, seed, unpaired=unpaired)
    typer.echo(comparison_text(found))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PonderError(f"{json_file} can't be written: {error.strerror}") from error


def compared(
    files: Sequence[Path],
    results: Sequence[tuple[Header, Sequence[Record]]],
    wanted: Sequence[str] | None,
    base: str | None,
    seed: int,
    *,
    unpaired: bool = False,
) -> dict[str, Any]:
    """Means by column and metric, differences to the base column, and settings that differ.

    Differences are over what was asked alike.

    Args:
        files: their names head the columns.
        results: of the files, of one kind.
        wanted: metrics; None: all that any file names, and pass@k.
        base: title of a column; None: the first with a record.
        seed: of the bootstrap.
        unpaired: also of files in which nothing was asked as in the base's.
    Raises:
        InvalidRequestError: there is no such metric or column, no file has a record, or one was
            asked other things.
        PonderError: a record holds what can't be compared.
    """
    from clients.bench.asked import asked_of
    from clients.bench.checks import check_data, check_records, unfinished
    from clients.bench.pairing import columns
    from clients.bench.statistics import CONFIDENCE

    for path, (header, records) in zip(files, results, strict=True):
        check_records(path, header, records)
    names = _short_names(files)
    headers = dict(zip(names, (header for header, _ in results), strict=True))
    missing = {
        name: unfinished(header, records)
        for name, (header, records) in zip(names, results, strict=True)
    }
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
    first = _base(sides, base)
    asked = {name: asked_of(*result) for name, result in zip(names, results, strict=True)}
    if not unpaired:
        paths = dict(zip(names, files, strict=True))
        by_path = {paths[name]: each for name, each in asked.items()}
        check_data(kind, by_path, paths[first.file])
    better = _metrics(kind, headers.values(), sides, wanted)
    return {
        "kind": kind,
        "base": first.title,
        "confidence": CONFIDENCE,
        "better": better,
        "asked": {name: dict(each.settings) for name, each in asked.items()},
        "unlike": _unlike(asked, first.file),
        "unfinished": {name: told for name, told in missing.items() if told is not None},
        "differing": differing(headers),
        "answered_by": {column.title: told for column in sides if (told := column.answered_by())},
        "columns": {
            column.title: {metric: _cell(column, first, metric, seed) for metric in better}
            for column in sides
        },
    } | ({"load": load} if load else {})


def _unlike(asked: Mapping[str, Asked], base: str) -> dict[str, Any]:
    """Of files that were asked other things than the base's: which settings, and parts, differ.

    `left_out` is None where nothing is the same.
    """
    from clients.bench.asked import left_out, unlike

    return {
        name: {"settings": settings, "left_out": left_out(asked[base], each)}
        for name, each in asked.items()
        if (settings := unlike(asked[base], each))
    }


def _base(sides: Sequence[Column], wanted: str | None) -> Column:
    first = next((column for column in sides if column.records), None)
    if first is None:
        raise InvalidRequestError("files", "none of them has a result yet; run the benchmark on")
    if wanted is None:
        return first
    for column in sides:
        if column.title == wanted:
            return column
    titles = ", ".join(column.title for column in sides)
    raise InvalidRequestError("--base", f"no column {wanted!r}; give one of {titles}")


def _metrics(
    kind: str, headers: Iterable[Header], sides: Sequence[Column], wanted: Sequence[str] | None
) -> dict[str, Better]:
    """Which are shown, and which way is better; pass@k follows `passed`."""
    from clients.bench.checks import FUNCTIONAL
    from clients.bench.pairing import k_of

    known = {metric: better for header in headers for metric, better in header.metrics.items()}
    samples = sorted(column.samples() for column in sides) if kind in FUNCTIONAL else [0]
    if wanted is None:
        # A k that one file alone has is no comparison.
        most = samples[-2] if len(samples) > 1 else 0
        ks = sorted({k for k in (*_KS, most) if 1 < k <= most})
        passes: dict[str, Better] = {f"pass@{k}": "higher" for k in ks}
        first = {metric: known[metric] for metric in known if metric == "passed"}
        return first | passes | known
    for name in wanted:
        k = k_of(name)
        if name in known or (k is not None and 1 <= k <= samples[-1]):
            continue
        also = f", pass@k with k up to {samples[-1]}" if samples[-1] > 0 else ""
        raise InvalidRequestError("--metric", f"no {name!r}; give {', '.join(known)}{also}")
    return {metric: known.get(metric, "higher") for metric in wanted}


def differing(headers: Mapping[str, Header]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all files: value by file."""
    flat = {}
    for name, header in headers.items():
        line = header.as_dict()
        settings = {f"settings.{key}": value for key, value in line.pop("settings").items()}
        for field in ("format", "kind", "key_fields", "metrics", "started", "run"):
            line.pop(field)
        flat[name] = line | settings
    fields = dict.fromkeys(
        field for line in flat.values() for field in line if field not in _FOLLOWING
    )
    values = {field: {name: line.get(field) for name, line in flat.items()} for field in fields}
    return {
        field: each
        for field, each in values.items()
        if any(value != next(iter(each.values())) for value in each.values())
    }


def _cell(column: Column, base: Column, metric: str, seed: int) -> dict[str, Any]:
    from clients.bench.pairing import common, difference, mean_over

    units = common(base, column, metric) if column is not base else []
    against = difference(base, column, metric, seed) if units else None
    return {
        "mean": column.mean(metric),
        "units": len(column.units(metric)),
        "difference": against.as_dict() if against else None,
        # Over the units of the difference.
        "base_mean": mean_over(base, metric, units),
        "own_mean": mean_over(column, metric, units),
    }


def _short_names(files: Sequence[Path]) -> list[str]:
    """File names, or as much of the paths as tells them apart."""
    for parts in range(1, max(len(path.resolve().parts) for path in files) + 1):
        names = ["/".join(path.resolve().with_suffix("").parts[-parts:]) for path in files]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in files]
