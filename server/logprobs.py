"""Log-probabilities as the two completion APIs write them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ponderttt.engine.sampler import SampledToken
from ponderttt.models.tokenizer import Tokenizer
from server.schemas.chat import ChatLogprobs, TokenLogprob, TopLogprob
from server.schemas.completion import CompletionLogprobs


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; a part of a character is spelt `bytes:\\xe2\\x82`, as OpenAI does."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    """JSON has no infinity; vLLM's stand-in for it."""
    return max(logprob, -9999.0)


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[SampledToken | None],
    offsets: Sequence[int],
) -> CompletionLogprobs:
    """The `logprobs` of a completion choice.

    Args:
        tokenizer: spells the tokens.
        token_ids, logprobs, offsets: one of each per token; the first token of a prompt has no
            log-probability.
    """
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, token_id) for token_id in token_ids],
        token_logprobs=[_finite(each.logprob) if each is not None else None for each in logprobs],
        top_logprobs=[_top(tokenizer, each) if each is not None else None for each in logprobs],
        text_offset=list(offsets),
    )


def _top(tokenizer: Tokenizer, token: SampledToken) -> dict[str, float]:
    """The likeliest tokens, and the token itself whether it is among them or not."""
    top = {
        token_text(tokenizer, token_id): _finite(value) for token_id, value in token.top_logprobs
    }
    top.setdefault(token_text(tokenizer, token.token_id), _finite(token.logprob))
    return top


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[SampledToken]) -> ChatLogprobs:
    """The `logprobs` of a chat choice."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token_text(tokenizer, token.token_id),
                logprob=_finite(token.logprob),
                bytes=list(tokenizer.token_bytes(token.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=token_text(tokenizer, token_id),
                        logprob=_finite(value),
                        bytes=list(tokenizer.token_bytes(token_id)),
                    )
                    for token_id, value in token.top_logprobs
                ],
            )
            for token in tokens
        ]
    )


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where in `text` each of its tokens begins: the first character that has a byte of it.

    Tokens that stand before the text (an opening token, the space that sentencepiece puts first)
    begin at 0.
    """
    sizes = [len(tokenizer.token_bytes(token_id)) for token_id in ids]
    starts = list(accumulate((len(character.encode()) for character in text), initial=0))
    surplus = max(sum(sizes) - starts[-1], 0)
    places = accumulate(sizes, initial=-surplus)
    return [
        min(bisect_right(starts, max(place, 0)) - 1, len(text))
        for place, _ in zip(places, sizes, strict=False)
    ]
