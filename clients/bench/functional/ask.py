"""Asking an endpoint for a completion, inside a session or not."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from clients.answers import Completion
from clients.async_api import AsyncClient
from clients.bench.functional.answers import chat_completion
from clients.bench.functional.problems import Problem, Suite
from clients.wire import ServerError
from ponderttt.errors import InvalidRequestError

Prompting = Literal["base", "chat"]
#: Tokens per chunk where a gate is given and no size: most prompts here are shorter than the
#: server's 256, so nothing would be learned in time to matter.
CHUNK_SIZE = 64
_BUSY_SECONDS = 30
#: Statuses that speak of the account, the address, the moment or the load, not of this request.
_NOT_OF_THE_REQUEST = frozenset({401, 402, 403, 404, 405, 407, 408, 409, 425, 429})
_log = logging.getLogger(__name__)


class RefusedError(ServerError):
    """The server refuses to answer this very problem, say because its prompt is too long."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How every problem is asked for.

    Args:
        model: as the server names it.
        prompting: `chat` speaks to a chat model, `base` lets a model go on with a text.
        max_tokens: of an answer.
        temperature, top_p: 0 is greedy.
        ttt: test-time training; None: nothing is sent, so that any endpoint understands.
        session: whose fast weights; None for none.
        fork: ask each problem in a copy of the session, which is deleted afterwards.
        seed: of all draws.
        timeout: seconds for one answer.
        run: of the result file's header; no other run's copies of a session have the same names.
    """

    model: str
    prompting: Prompting
    max_tokens: int
    temperature: float
    top_p: float
    ttt: Mapping[str, Any] | None
    session: str | None
    fork: bool
    seed: int
    timeout: float
    run: str = ""


def learning(
    *,
    gate: str | None = None,
    action: str | None = None,
    budget: float | None = None,
    cost_model: str | None = None,
    adapt_on: str | None = None,
    when: str | None = None,
    chunk_size: int | None = None,
    session: str | None = None,
    read: str | None = None,
) -> dict[str, Any] | None:
    """The `ttt` of every request, but for the session; None where nothing is to be sent.

    A session without a gate is only read, so that it stays what it is.

    Raises:
        InvalidRequestError: a setting is given that has no meaning without a gate.
    """
    options = {
        "action": action,
        "budget": budget,
        "cost_model": cost_model,
        "adapt_on": adapt_on,
        "when": when,
        "chunk_size": chunk_size,
    }
    given = {name: value for name, value in options.items() if value is not None}
    reading = {} if read is None else {"read": read}
    if reading and session is None:
        raise InvalidRequestError("--read", f"{read!r} is for a session; name one with --session")
    if gate is None:
        if given:
            name, value = next(iter(given.items()))
            raise InvalidRequestError(
                f"--{name.replace('_', '-')}",
                f"{value!r} is for learning; say with --gate who decides what is learned",
            )
        return None if session is None else {"gate": "off", **reading}
    if gate == "off":
        return {"gate": gate, **given, **reading}
    return {"gate": gate, "chunk_size": CHUNK_SIZE, **given, **reading}


def draw_seed(seed: int, task_id: str, sample: int) -> int:
    """The seed of one answer, in [0, 2³¹): its own, whatever else is asked, and in which order."""
    drawn = hashlib.sha256(f"{seed}/{task_id}/{sample}".encode()).digest()
    return int.from_bytes(drawn[:4]) >> 1


async def ask(
    client: AsyncClient, asking: Asking, suite: Suite, problem: Problem, sample: int
) -> Completion:
    """The whole answer.

    Raises:
        RefusedError: the server refuses this problem.
        ServerError: the server fails.
    """
    seed = draw_seed(asking.seed, problem.task_id, sample)
    async with _session(client, asking, f"{problem.task_id}/{sample}") as session:
        ttt = dict(asking.ttt) if asking.ttt is not None else None
        if ttt is not None:
            ttt |= {"session": session} if session is not None else {}
            ttt |= {"seed": seed} if ttt["gate"] == "random" else {}
        common: dict[str, Any] = {
            "model": asking.model,
            "max_tokens": asking.max_tokens,
            "temperature": asking.temperature,
            "top_p": asking.top_p,
            "seed": seed if asking.temperature > 0 else None,
            "ttt": ttt,
            "timeout": asking.timeout,
        }
        try:
            if asking.prompting == "chat":
                message = {"role": "user", "content": problem.chat_prompt}
                return await client.chat([message], **common)
            return await client.complete(problem.base_prompt, stop=suite.stops, **common)
        except ServerError as error:
            if 400 <= error.status < 500 and error.status not in _NOT_OF_THE_REQUEST:
                raise RefusedError(error.status, str(error)) from error
            raise


def completion_in(suite: Suite, asking: Asking, problem: Problem, answer: str) -> str:
    """What is run of an answer; see `clients.bench.functional.answers`."""
    if asking.prompting == "chat":
        return chat_completion(answer)
    return suite.cut(problem.shown + answer)


@asynccontextmanager
async def _session(client: AsyncClient, asking: Asking, unit: str) -> AsyncIterator[str | None]:
    """The session to ask in: none, the given one, or a copy of it for this unit alone."""
    if asking.session is None or not asking.fork:
        yield asking.session
        return
    key = hashlib.sha256(f"{asking.run}/{asking.session}/{unit}".encode()).hexdigest()
    name = f"bench-fork-{key[:24]}"
    # This run may have left it when it was interrupted.
    await _forget(client, name)
    await client.fork(asking.session, name)
    try:
        yield name
    finally:
        try:
            await _forget(client, name)
        except ServerError as error:
            # No reason to lose the answer, or the error that there was before.
            _log.warning("session %s is left on the server: %s", name, error)


async def _forget(client: AsyncClient, name: str) -> None:
    """Delete a session; a request that was cut off may hold it for a moment."""
    for attempt in range(_BUSY_SECONDS + 1):
        try:
            await client.delete_session(name)
        except ServerError as error:
            if error.status == 404:
                return
            if error.status != 409 or attempt == _BUSY_SECONDS:
                raise
            await asyncio.sleep(1.0)
        else:
            return
