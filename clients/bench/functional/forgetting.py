"""HumanEval inside a session that has learned something else: has it forgotten how to code?"""

from __future__ import annotations

import os
from pathlib import Path

from clients.bench.functional.ask import Asking, Prompting, learning
from clients.bench.functional.humaneval import load_humaneval
from clients.bench.functional.run import FunctionalRun
from clients.results import Header, Record
from clients.sandbox import Limits, Sandbox


def humaneval_in_session(
    base_url: str,
    session: str | None,
    output: Path,
    sandbox: Sandbox,
    *,
    model: str | None = None,
    api_key: str | None = None,
    limit: int | None = None,
    max_tokens: int = 400,
    prompting: Prompting = "chat",
    concurrency: int = 8,
    seed: int = 0,
    timeout: float = 600.0,
    read: str | None = None,
    retries: int | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> tuple[Header, list[Record]]:
    """Ask HumanEval greedily; the session is only read, and stays what it is.

    Its result file and that of another session, or of none, are compared by
    `clients.bench.compare`: pass@1 with the interval of the paired difference.

    Args:
        base_url: of a server with sessions.
        session: that exists; None for the base model, with learning off.
        output: result file; a run that it belongs to goes on, as long as the session is the same.
        sandbox: where programs run.
        model: default: the first that is served.
        api_key: of the server.
        limit: only the first so many problems.
        max_tokens: of an answer.
        prompting: as of `ponderttt bench humaneval`.
        concurrency: requests at once.
        seed: for the result file; nothing is drawn.
        timeout: seconds for one answer.
        read: whose weights answer in the session; None is the server's default.
        retries: as of `FunctionalRun`.
        fresh: overwrite the result file.
        quiet: show no progress.
    Returns:
        Header and records of the result file.
    Raises:
        PonderError: see `FunctionalRun.run`.
    """
    suite = load_humaneval(None).only(None, limit)
    asking = Asking(
        model=model or "",
        prompting=prompting,
        max_tokens=max_tokens,
        temperature=0.0,
        top_p=1.0,
        ttt=learning(gate="off", session=session, read=read if session is not None else None),
        session=session,
        fork=False,
        seed=seed,
        timeout=timeout,
    )
    run = FunctionalRun(
        base_url=base_url,
        api_key=api_key,
        suite=suite,
        part=f"the first {limit}" if limit is not None else None,
        asking=asking,
        samples=1,
        sandbox=sandbox,
        limits=Limits(),
        workers=os.cpu_count() or 1,
        concurrency=concurrency,
        retries=retries,
    )
    return run.run(output, fresh=fresh, quiet=quiet)
