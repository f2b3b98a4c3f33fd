"""From options to a run of the repository benchmark: what the server can do, and the header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.bench.functional.humaneval import load_humaneval
from clients.bench.repo_arms import ArmKind
from clients.bench.repo_ask import Asking
from clients.bench.repo_exam import Exam
from clients.bench.repo_plan import Plan, Sizes
from clients.bench.repo_report import KEY_FIELDS, METRICS
from clients.bench.repo_run import Schedule
from clients.options import choose_model
from clients.results import Header
from clients.sandbox import open_sandbox
from clients.wire import ServerError, lacks_route
from ponderttt.errors import InvalidRequestError

if TYPE_CHECKING:
    from clients.api import Client


def how_to_ask(
    client: Client,
    model: str | None,
    left_chars: int,
    max_tokens: int,
    loss: bool,
    read: str | None,
) -> Asking:
    """What the server has, and how it is asked; see `Asking`.

    Args:
        client: of the server.
        model: None: the first that is served.
        left_chars, max_tokens, loss, read: as `Asking` has them.
    Raises:
        InvalidRequestError: the server lacks what was asked for.
        PonderError: it serves nothing, or fails.
    """
    model = choose_model(client, model)
    has_sessions = _has_sessions(client)
    if read is not None and not has_sessions:
        raise InvalidRequestError("--read", f"{read!r}, but this server has no sessions; leave it")
    return Asking(model, left_chars, max_tokens, loss, has_sessions, read)


def _has_sessions(client: Client) -> bool:
    try:
        client.sessions()
    except ServerError as error:
        # Others than ours have none.
        if lacks_route(error):
            return False
        raise
    return True


def kinds_of_arms(wanted: Sequence[str] | None, asking: Asking) -> list[ArmKind]:
    """The arms that this server can run; those that were asked for, it must.

    Raises:
        InvalidRequestError: there is no such arm, or not on this server.
    """
    every: tuple[ArmKind, ...] = ("off", "stuffed", "adapt", "random", "fixed")
    for name in wanted or ():
        if name not in every:
            raise InvalidRequestError("--arm", f"no {name!r}; give {', '.join(every)}")
    if asking.has_sessions:
        return [kind for kind in every if kind in (wanted or every)]
    without: tuple[ArmKind, ...] = ("off", "stuffed")
    learning = [kind for kind in wanted or () if kind not in without]
    if learning:
        raise InvalidRequestError(
            "--arm",
            f"this server has no sessions, so no {', '.join(learning)}; give --arm stuffed, or off",
        )
    return [kind for kind in without if kind in (wanted or without)]


def context_limit(client: Client, asking: Asking, wanted: int | None) -> int:
    """Tokens of a stuffed prompt and its answer.

    Raises:
        InvalidRequestError: neither the user nor the server says.
    """
    limit = client.context_length(asking.model)
    if limit is None and wanted is None:
        raise InvalidRequestError(
            "--stuff-tokens", "the server doesn't say how long its context is; give a number"
        )
    return min(each for each in (limit, wanted) if each is not None)


def settings_of(
    sizes: Sizes, schedule: Schedule, asking: Asking, limit: int | None
) -> dict[str, Any]:
    """Everything that may change a result."""
    plan: Plan = schedule.plan
    dropped = {each.name: list(each.dropped) for each in plan.repositories if each.dropped}
    return {
        "repositories": [repository.name for repository in plan.repositories],
        "texts": plan.fingerprint(),
        "repository_texts": {each.name: each.fingerprint() for each in plan.repositories},
        "unrelated_texts": plan.unrelated_fingerprint(),
        "arms": [each.name for each in schedule.arms],
        "steps": schedule.units(),
        **asdict(sizes),
        "max_tokens": asking.max_tokens,
        "loss": asking.with_loss,
        "stuff_tokens": limit,
        "chunk_size": schedule.chunk_size,
        "read": asking.read,
        "unrelated": [file.path for file in plan.unrelated],
    } | ({"dropped": dropped} if dropped else {})


def header_of(client: Client, asking: Asking, settings: dict[str, Any], seed: int) -> Header:
    """Of the result file; with the server's own settings."""
    return Header(
        kind="repo",
        seed=seed,
        model=asking.model,
        base_url=client.base_url,
        server_version=client.version(),
        settings=settings | client.server_settings(asking.model),
        key_fields=KEY_FIELDS,
        metrics=METRICS,
    )


def open_exam(
    problems: int,
    output: Path,
    base_url: str,
    api_key: str | None,
    model: str | None,
    timeout: float,
    seed: int,
    quiet: bool,
) -> Exam:
    """HumanEval for the sessions; see `Exam`.

    Raises:
        PonderError: its data or a sandbox is missing.
    """
    known = len(load_humaneval(None).problems)
    return Exam(
        base_url, api_key, model, open_sandbox(), min(problems, known),
        output, timeout, seed, quiet,
    )  # fmt: skip
