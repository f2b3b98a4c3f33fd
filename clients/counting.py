"""How many tokens texts have, also on servers that don't tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clients.wire import ServerError, lacks_route

if TYPE_CHECKING:
    from clients.api import Client

#: Of source code, where the server has no tokenizer to ask.
CHARS_PER_TOKEN = 3.5
#: Dense code has more tokens to the character than the average: so much of a room that must not
#: overflow is filled by it.
DENSE = 0.7


def count_tokens(client: Client, text: str) -> int | None:
    """By the server's own tokenizer; None where it has none to ask, as others than vLLM, llama.cpp
    and ours.

    Raises:
        ServerError: it is unreachable, busy or failing.
    """
    try:
        return len(client.tokenize(text))
    except ServerError as error:
        if lacks_route(error):
            return None
        raise
