"""`ponderttt bench load`: how long users wait when there are many of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.calls import LOOKUP_RETRIES
from ponderttt.errors import InvalidRequestError, PonderError

if TYPE_CHECKING:
    from clients.load.summary import Bounds
    from clients.results import Header, Record


def load(
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
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Closed loop: users who wait for their answers. Default: 1.",
            min=1,
            max=10_000,
            envvar="PONDERTTT_LOAD_CONCURRENCY",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Open loop: requests per second, as a Poisson process.",
            min=0.001,
            max=10_000,
            envvar="PONDERTTT_LOAD_RATE",
        ),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(
            help="Sessions that users spread over. Default: one per user; in an open loop 8.",
            min=1,
            max=10_000,
            envvar="PONDERTTT_LOAD_SESSIONS",
        ),
    ] = None,
    think: Annotated[
        str,
        typer.Option(
            help="Closed loop: seconds between answer and next request; a distribution.",
            envvar="PONDERTTT_LOAD_THINK",
        ),
    ] = "0",
    prompt_tokens: Annotated[
        str,
        typer.Option(
            help="Length of prompts; VALUE, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MOST].",
            envvar="PONDERTTT_LOAD_PROMPT_TOKENS",
        ),
    ] = "256",
    output_tokens: Annotated[
        str,
        typer.Option(
            help="Length of answers at most; a distribution.",
            envvar="PONDERTTT_LOAD_OUTPUT_TOKENS",
        ),
    ] = "32",
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            help="File or directory that prompts are cut from; may be repeated. Default: some of "
            "Python's standard library."
        ),
    ] = None,
    chars_per_token: Annotated[
        float | None,
        typer.Option(
            help="By which prompts are cut. Default: as the server's /tokenize says, else 3.5.",
            min=0.1,
            max=100,
        ),
    ] = None,
    reuse: Annotated[
        float,
        typer.Option(
            help="Share of requests that go on from the user's last prompt, as an editor's do.",
            min=0.0,
            max=1.0,
            envvar="PONDERTTT_LOAD_REUSE",
        ),
    ] = 0.0,
    ttt: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE of test-time training, sent with every request; may be repeated. "
            "session=NAME-{n} gives every session of the load its own; missing ones are made, and "
            "deleted afterwards. Nothing is sent if not given."
        ),
    ] = None,
    body: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of further fields, say ignore_eos=true; may be repeated."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="To measure. Default: 100, or no limit with --duration."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds after which nobody asks any more.")
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests at the beginning that don't count.")
    ] = 4,
    ttft_bound: Annotated[
        float | None, typer.Option(min=0, help="Seconds to the first token, for the goodput.")
    ] = None,
    tpot_bound: Annotated[
        float | None, typer.Option(min=0, help="Seconds per token after it, for the goodput.")
    ] = None,
    e2e_bound: Annotated[
        float | None, typer.Option(min=0, help="Seconds to the end, for the goodput.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.", envvar="PONDERTTT_SEED")] = 0,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds for one request.", envvar="PONDERTTT_TIMEOUT"),
    ] = 120.0,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            help="Times that what is looked up before the load is asked again while the server is "
            "busy (429, 503). In the load, a rejection is a result.",
            envvar="PONDERTTT_RETRIES",
        ),
    ] = LOOKUP_RETRIES,
    output: Annotated[
        Path,
        typer.Option(
            help="Result file, a record per request. A load can't be resumed: what came after a "
            "pause would be another load. An interrupted run is reported as far as it got.",
            envvar="PONDERTTT_LOAD_OUTPUT",
            dir_okay=False,
        ),
    ] = Path("bench-load.jsonl"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Overwrite the result file.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="No load: report on the result file, under any bounds.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary here.", dir_okay=False)
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table here.", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture here; .png, .svg or .pdf.", dir_okay=False)
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress.", envvar="PONDERTTT_QUIET")
    ] = False,
) -> None:
    """Put load on any OpenAI-compatible server, and measure what its users wait.

    A session here is a user's stream of prompts; --ttt session=… makes it one of the server's, too.
    """  # fmt: skip
    from clients.keys import read_key
    from clients.load.distributions import parse_distribution
    from clients.load.plot import require_picture
    from clients.load.run import LoadRun
    from clients.load.summary import Bounds, check_record, unfinished
    from clients.options import check_writable
    from clients.results import check_records, read_results

    check_writable("--json", json_file)
    check_writable("--markdown", markdown_file)
    check_writable("--plot", plot)
    if plot is not None:
        require_picture(plot)
    bounds = Bounds(ttft_bound, tpot_bound, e2e_bound)
    if report:
        header, records = read_results(output)
        if header.kind != "load":
            raise InvalidRequestError("--output", f"{output} is of bench {header.kind}, not load")
        check_records(output, records, check_record)
        ended = unfinished(header, records)
        _report(header, records, bounds, ended, json_file, markdown_file, plot)
        return
    if rate is not None and concurrency is not None:
        raise InvalidRequestError("--rate", "is an open loop, --concurrency a closed one; give one")
    pauses = parse_distribution(think, "--think", 0, 3600)
    if rate is not None and pauses.most > 0:
        raise InvalidRequestError("--think", "in an open loop nobody waits for answers; leave out")
    users = concurrency or 1
    run = LoadRun(
        base_url=base_url,
        api_key=read_key(api_key_file),
        model=model,
        rate=rate,
        users=users,
        sessions=sessions or (8 if rate is not None else users),
        think=pauses,
        prompt_tokens=parse_distribution(prompt_tokens, "--prompt-tokens", 1, 1_000_000),
        output_tokens=parse_distribution(output_tokens, "--output-tokens", 1, 1_000_000),
        texts=texts or [],
        chars_per_token=chars_per_token,
        reuse=reuse,
        ttt=_pairs(ttt, "--ttt"),
        extra=_pairs(body, "--body"),
        temperature=temperature,
        requests=100 if requests is None and duration is None else requests,
        duration=duration,
        warmup=warmup,
        seed=seed,
        timeout=timeout,
        retries=retries,
    )
    try:
        run.run(output, fresh, quiet)
    finally:
        # Also of a run that was interrupted or failed.
        if run.measured:
            header, records = read_results(output)
            ended = None if run.finished else unfinished(header, records)
            _report(header, records, bounds, ended, json_file, markdown_file, plot)


def _report(
    header: Header,
    records: Sequence[Record],
    bounds: Bounds,
    unfinished: str | None,
    json_file: Path | None,
    markdown_file: Path | None,
    plot: Path | None,
) -> None:
    from clients.load.plot import draw
    from clients.load.summary import markdown, summarise

    summary = summarise(records, bounds) | {"unfinished": unfinished}
    table = markdown(header, summary, bounds)
    typer.echo(table)
    whole = {**header.as_dict(), "summary": summary}
    texts = [(json_file, json.dumps(whole, indent=2) + "\n"), (markdown_file, table)]
    failed = []
    for path, text in texts:
        try:
            if path is not None:
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            # Whatever else can be written is.
            failed.append(f"{path} can't be written: {error.strerror}")
    if plot is not None:
        draw(header, records, bounds, plot)
    if failed:
        raise PonderError("; ".join(failed))


def _pairs(given: Sequence[str] | None, param: str) -> dict[str, Any] | None:
    """`gate=policy`, `budget=2` …: values are JSON where they can be, else text."""
    if not given:
        return None
    pairs: dict[str, Any] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not equals or not name:
            raise InvalidRequestError(param, f"{each!r} is no KEY=VALUE")
        try:
            pairs[name] = json.loads(text)
        except ValueError:
            pairs[name] = text
    if param == "--ttt" and "session" in pairs:
        pairs["session"] = str(pairs["session"])
    return pairs
