"""`ponderttt bench repo`: does learning a repository help to complete its code?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ponderttt.errors import PonderError

if TYPE_CHECKING:
    from clients.api import Client
    from clients.bench.repo_ask import Asking
    from clients.bench.repo_exam import Exam
    from clients.bench.repo_run import Schedule
    from clients.results import Record, ResultFile


def repo(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Directories of repositories, or names of installed packages.", show_default=False
        ),
    ],
    base_url: Annotated[
        str, typer.Option(help="Where the server is.", envvar="PONDERTTT_BASE_URL")
    ] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the server's key.", envvar="PONDERTTT_API_KEY_FILE", dir_okay=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Default: the first that the server names.", envvar="PONDERTTT_MODEL"),
    ] = None,
    gate: Annotated[
        Literal["policy", "threshold", "random", "fixed"] | None,
        typer.Option(
            help="Who decides what is learned; by default the server's gate.",
            envvar="PONDERTTT_REPO_GATE",
        ),
    ] = None,
    read: Annotated[
        Literal["auto", "session"] | None,
        typer.Option(
            help="Whose weights answer in a session: those that its prompt tells (auto), or always "
            "the session's; by default as the server has it.",
            envvar="PONDERTTT_REPO_READ",
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Highest mean cost per chunk, × forward; may be repeated. Default: 1.5, 2, 3.",
            min=1.0,
            max=12.0,
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare with off: stuffed, adapt, random, fixed, or nothing but off; may "
            "be repeated. Default: all."
        ),
    ] = None,
    match: Annotated[
        Literal["rate", "time", "both"],
        typer.Option(
            help="What arms random and fixed share with the one they follow: the share of chunks "
            "updated (rate), the measured cost, that is wall time (time), or one of each (both): "
            "at an equal rate they get less compute where the other takes UPDATE_2 or UPDATE_4. "
            "random stays about 3 points below the share, since the server refuses draws beyond "
            "the budget; fixed updates first and skips later, not evenly.",
            envvar="PONDERTTT_REPO_MATCH",
        ),
    ] = "both",
    files: Annotated[int, typer.Option(min=1, help="Files to hide code in, per repository.")] = 4,
    targets: Annotated[int, typer.Option(min=1, help="Pieces to hide per file.")] = 6,
    max_lines: Annotated[int, typer.Option(min=2, help="Lines of a hidden block.")] = 8,
    context_chars: Annotated[
        int, typer.Option(min=1, help="Of other files to teach, per repository.")
    ] = 60_000,
    file_chars: Annotated[
        int, typer.Option(min=1, help="Taught of one of them; the rest is left out.")
    ] = 8_000,
    left_chars: Annotated[
        int, typer.Option(min=1, help="Of the same file before the target, in the prompt.")
    ] = 2_000,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="To generate for a block; 64 at most for the others.")
    ] = 160,
    stuff_tokens: Annotated[
        int | None,
        typer.Option(min=64, help="Prompt of arm stuffed. Default: the model's whole context."),
    ] = None,
    unrelated: Annotated[
        list[Path] | None,
        typer.Option(
            help="File to measure forgetting on; may be repeated. Default: standard library.",
            dir_okay=False,
        ),
    ] = None,
    unrelated_files: Annotated[
        int, typer.Option(min=0, help="How many of the standard library, where none is named.")
    ] = 3,
    loss: Annotated[
        bool, typer.Option(help="Score the hidden text; needs a server that takes echo.")
    ] = True,
    humaneval: Annotated[
        int | None,
        typer.Option(
            help="Ask so many problems of HumanEval in each session that has learned under a "
            "budget, and once without one; runs what comes in the sandbox.",
            min=1,
            envvar="PONDERTTT_REPO_HUMANEVAL",
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens per chunk; by default the server's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.", envvar="PONDERTTT_SEED")] = 0,
    output: Annotated[
        Path,
        typer.Option(
            help="Result file; a run that it belongs to goes on.",
            envvar="PONDERTTT_REPO_OUTPUT",
            dir_okay=False,
        ),
    ] = Path("bench-repo.jsonl"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Overwrite the result file.")] = False,
    keep_sessions: Annotated[
        bool, typer.Option("--keep-sessions", help="Leave the sessions, and print their names.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary here.", dir_okay=False)
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds for one answer.", envvar="PONDERTTT_TIMEOUT")
    ] = 600.0,
    retries: Annotated[
        int | None,
        typer.Option(
            help="Times that a request is sent again to a busy server (429, 503). Default: 10; "
            "before the run, 2.",
            min=0,
            envvar="PONDERTTT_RETRIES",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress.", envvar="PONDERTTT_QUIET")
    ] = False,
) -> None:
    """Hide code in repositories and ask for it, with and without having learned the rest.

    Safe to interrupt: the same command goes on.
    """
    from tqdm import tqdm

    from clients.api import Client
    from clients.bench.repo_arms import make_arms
    from clients.bench.repo_fit import fit
    from clients.bench.repo_plan import Sizes, make_plan
    from clients.bench.repo_report import record_check
    from clients.bench.repo_run import Schedule
    from clients.bench.repo_setup import (
        context_limit,
        header_of,
        how_to_ask,
        kinds_of_arms,
        open_exam,
        settings_of,
    )
    from clients.calls import LOOKUP_RETRIES, LOOKUP_WAIT, RETRIES
    from clients.keys import read_key
    from clients.options import check_writable
    from clients.results import ResultFile

    check_writable("--json", json_file)
    sizes = Sizes(files, targets, max_lines, context_chars, file_chars, left_chars)
    plan = make_plan(paths, unrelated or [], unrelated_files if loss else 0, sizes, seed)
    api_key = read_key(api_key_file)
    lookups, retries = (LOOKUP_RETRIES, RETRIES) if retries is None else (retries, retries)
    exam = None
    if humaneval is not None:
        exam = open_exam(humaneval, output, base_url, api_key, model, timeout, seed, quiet)
    busy = None if quiet else partial(tqdm.write, file=sys.stderr)
    with Client(
        base_url, timeout, api_key=api_key, retries=lookups, first_wait=LOOKUP_WAIT, busy=busy
    ) as client:
        asking = how_to_ask(client, model, left_chars, max_tokens, loss, read)
        # So many requests that one may well meet a busy moment.
        with Client(base_url, timeout, api_key=api_key, retries=retries, busy=busy) as patient:
            plan = fit(plan, asking, patient)
        kinds = kinds_of_arms(arm, asking)
        arms = make_arms(
            kinds, gate, budget or [1.5, 2.0, 3.0], ["rate", "time"] if match == "both" else [match]
        )
        schedule = Schedule(plan, arms, chunk_size, seed, keep_sessions)
        limit = context_limit(client, asking, stuff_tokens) if "stuffed" in kinds else None
        settings = settings_of(sizes, schedule, asking, limit)
        header = header_of(client, asking, settings, seed)
    if exam is not None:
        exam.model, exam.read, exam.retries, exam.fresh = asking.model, read, retries, fresh
    with (
        ResultFile.open(output, header, fresh=fresh, check=record_check) as results,
        Client(base_url, timeout, api_key=api_key, retries=retries, busy=busy) as client,
    ):
        schedule = replace(schedule, run=results.header.run)
        _run(client, asking, schedule, results, limit, exam, quiet)
        _report(results, json_file, exam)
    if keep_sessions:
        _name_sessions(schedule)


def _run(
    client: Client,
    asking: Asking,
    schedule: Schedule,
    results: ResultFile,
    limit: int | None,
    exam: Exam | None,
    quiet: bool,
) -> None:
    from tqdm import tqdm

    from clients.api import ServerError
    from clients.bench.repo_ask import Stuffing
    from clients.bench.repo_run import Runner

    total = schedule.units()

    def warn(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def go_on(reason: str) -> PonderError:
        return PonderError(
            f"{reason}. {_steps(results)} of {total} steps are in {results.path}; "
            f"{results.how_to_go_on()}"
        )

    stuffing = Stuffing(client, asking, limit, warn) if limit is not None else None
    with tqdm(total=total, initial=_steps(results), unit="step", disable=quiet) as bar:

        def learning(arm: str, done: float, of: float) -> None:
            bar.set_description(f"{arm}: learning, {done / max(of, 1):.0%}")

        def done(record: Record) -> None:
            bar.set_postfix_str(_score(results.records, record["arm"]), refresh=False)
            bar.set_description(f"{record['repository']} {record['arm']}", refresh=False)
            bar.update()

        try:
            Runner(client, asking, schedule, results, stuffing, done, learning, warn, exam).run()
        except KeyboardInterrupt:
            raise go_on("interrupted") from None
        except ServerError as error:
            raise go_on(str(error)) from error


def _steps(results: ResultFile) -> int:
    """How many are done."""
    from clients.bench.repo_run import RETAUGHT

    return sum(record["record"] != RETAUGHT for record in results.records)


def _score(records: Sequence[Record], arm: str) -> str:
    """The arm's exact match and edit similarity so far."""
    answers = [each for each in records if each["record"] == "target" and each["arm"] == arm]
    if not answers:
        return ""
    exact = sum(each["exact"] for each in answers) / len(answers)
    similar = sum(each["edit_similarity"] for each in answers) / len(answers)
    return f"exact {exact:.2f}, similar {similar:.2f}"


def _report(results: ResultFile, json_file: Path | None, exam: Exam | None) -> None:
    from clients.bench.repo_report import summary, table

    typer.echo(table(results.header, results.records))
    if exam is not None:
        typer.echo(f"\nHumanEval in the sessions:\n\n{exam.table()}")
    if json_file is None:
        return
    try:
        found = summary(results.header, results.records)
        text = json.dumps(found | ({"humaneval": exam.compared()} if exam else {}), indent=2)
        json_file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise PonderError(f"{json_file} can't be written: {error.strerror}") from error


def _name_sessions(schedule: Schedule) -> None:
    typer.echo("\nSessions kept (for `ponderttt bench humaneval --session NAME`):")
    for repository in schedule.plan.repositories:
        for arm in schedule.arms:
            if arm.learns:
                typer.echo(f"  {schedule.session(repository, arm)}")
