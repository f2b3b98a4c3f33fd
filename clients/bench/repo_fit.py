"""Fitting a plan into the model's context, before a run that would be refused half-way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from clients.bench.repo_ask import Asking
from clients.bench.repo_plan import Plan, left_context, whole_lines
from clients.counting import count_tokens
from clients.files import TextFile
from ponderttt.errors import InvalidRequestError

if TYPE_CHECKING:
    from clients.api import Client

# What a server may put before a text.
_SPARE_TOKENS = 4


def fit(plan: Plan, asking: Asking, client: Client) -> Plan:
    """The plan with as much of the unrelated code as the context takes.

    As it is where the server tells neither its context nor tokens.

    Raises:
        InvalidRequestError: a prompt and its answer don't fit.
        ServerError: the server fails.
    """
    context = client.context_length(asking.model)
    if context is None:
        return plan
    room = context - _SPARE_TOKENS
    for repository in plan.repositories:
        for subject in repository.subjects:
            for target in subject.targets:
                left = left_context(subject.file.text, target.start, asking.left_chars)
                needed = _excess(client, left, room - asking.limit(target))
                if asking.with_loss:
                    needed = max(needed, _excess(client, left + target.hidden, room))
                if needed > 0:
                    raise InvalidRequestError(
                        "--left-chars",
                        f"{asking.left_chars} characters before line {target.line} of "
                        f"{subject.file.path} ({repository.name}) and the answer are {needed} "
                        f"tokens too long for the model's context of {context}; give fewer "
                        "--left-chars or --max-tokens",
                    )
    return replace(plan, unrelated=tuple(_cut(client, file, room) for file in plan.unrelated))


def _excess(client: Client, text: str, room: int) -> int:
    """Tokens that a text has more than there is room for; 0 also where the server can't count."""
    # No token is less than a byte, so most texts need not be counted.
    if len(text.encode()) <= room:
        return 0
    tokens = count_tokens(client, text)
    return max(tokens - room, 0) if tokens is not None else 0


def _cut(client: Client, file: TextFile, room: int) -> TextFile:
    """Its beginning: whole lines, or of a line that is too long a part."""
    text = file.text
    while (excess := _excess(client, text, room)) > 0:
        limit = len(text) * room // (room + excess)
        text = whole_lines(text, limit) or text[:limit]
    return TextFile(file.path, text)
