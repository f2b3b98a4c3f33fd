"""`ponderttt bench engine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ponderttt.bench.lab import Lab
    from ponderttt.bench.results import Results
    from ponderttt.bench.workload import Workload


def engine(
    model: Annotated[str, typer.Option(help="Embedded name, hub name or path.")] = "smollm2-135m",
    only: Annotated[
        list[str] | None, typer.Option(help="A row's name; may be repeated. Default: all.")
    ] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="Name the rows and exit.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after the one to warm up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every side.")] = 2,
    scaling: Annotated[bool, typer.Option(help="Also measure how costs grow.")] = False,
    rows: Annotated[bool, typer.Option(help="Measure the table's rows.")] = True,
    quick: Annotated[bool, typer.Option(help="Small sizes: shows only that all works.")] = False,
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Our side as served with --compile.")
    ] = False,
    vllm_compiled: Annotated[
        bool,
        typer.Option("--vllm-compile", help="vLLM with torch.compile instead of eager."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Directory of table, JSON and plots.")] = Path(
        "bench-engine"
    ),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write everything, with the ratios by name, to a file."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep the rows that an earlier run has.")] = False,
) -> None:
    """Measure the engine against Hugging Face, PEFT and vLLM on the same work, in one run."""
    from ponderttt.bench.lab import open_lab
    from ponderttt.bench.plots import draw
    from ponderttt.bench.ratios import write_ratios
    from ponderttt.bench.report import markdown
    from ponderttt.bench.results import Results, settings
    from ponderttt.bench.workloads import ALL
    from ponderttt.engine.config import served_name
    from ponderttt.errors import UnavailableError

    if list_rows:
        typer.echo("\n".join(workload.name for workload in ALL))
        return
    chosen = _chosen(ALL, only) if rows else []
    what = settings(served_name(model), threads, repeats, quick, seed, compiled=compiled)
    results = Results.resume(output, what) if resume else Results(output, what)
    with open_lab(
        model,
        threads=threads,
        quick=quick,
        seed=seed,
        progress=True,
        compiled=compiled,
        vllm_compiled=vllm_compiled,
    ) as lab:
        _measure_rows(chosen, lab, results, repeats)
        if scaling:
            _measure_scaling(lab, results, repeats)
    results.save()
    if json_file is not None:
        write_ratios(results, json_file)
    table = markdown(results)
    (output / "bench.md").write_text(table, encoding="utf-8")
    try:
        draw(results)
    except UnavailableError as error:
        typer.echo(f"no plots: {error}", err=True)
    typer.echo(table)


def _chosen(workloads: tuple[Workload, ...], only: list[str] | None) -> list[Workload]:
    from ponderttt.errors import InvalidRequestError

    known = {workload.name: workload for workload in workloads}
    for name in only or ():
        if name not in known:
            raise InvalidRequestError("only", f"{name!r} is no row; give {', '.join(known)}")
    return [workload for name, workload in known.items() if not only or name in only]


def _measure_rows(workloads: list[Workload], lab: Lab, results: Results, repeats: int) -> None:
    from ponderttt.bench.runner import measure

    for workload in workloads:
        if not results.is_done(workload.name):
            results.rows[workload.name] = measure(workload, lab, repeats, _say)
            if lab.vllm.facts:
                results.settings["vllm"] = lab.vllm.facts
            results.save()


def _measure_scaling(lab: Lab, results: Results, repeats: int) -> None:
    from ponderttt.bench.scaling import curves, measure_curve

    for name in curves(lab, repeats):
        if name not in results.scaling:
            results.scaling[name] = measure_curve(lab, name, repeats, _say)
            results.save()


def _say(line: str) -> None:
    typer.echo(line, err=True)
