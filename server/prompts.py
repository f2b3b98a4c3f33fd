"""From what a request calls its prompt to token ids, checked against the context window.

Runs outside the event loop: encoding megabytes of text takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ponderttt.errors import InvalidRequestError, PromptTooLongError
from ponderttt.models.tokenizer import Tokenizer
from server.schemas.completion import CompletionRequest

# More bytes than a token of prose or code has on average, by far: the longest tokens of the usual
# vocabularies are runs of some 128 spaces. It is no exact bound on purpose: some tokenizers merge
# characters before they look for tokens.
_TOKEN_BYTES = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens and its text (None where only the tokens were given)."""

    ids: tuple[int, ...]
    text: str | None


def encode_prompts(
    tokenizer: Tokenizer, body: CompletionRequest, max_prompts: int, max_model_len: int
) -> list[Prompt]:
    """The prompts of a completion request.

    Raises:
        PromptTooLongError: a text of more bytes than the context window can hold.
        InvalidRequestError: an empty prompt, too many, ids outside the vocabulary, a suffix with
            ids, with echo, or for a model that can't fill in.
    """
    many = _as_list(body)
    if len(many) > max_prompts:
        raise InvalidRequestError("prompt", f"{len(many)} prompts; at most {max_prompts} at a time")
    if body.suffix and body.echo:
        raise InvalidRequestError("echo", "can't be combined with suffix")
    for text in (body.suffix, *many):
        if isinstance(text, str):
            check_bytes("prompt", [text], max_model_len)
    names = ["prompt"] if len(many) == 1 else [f"prompt[{i}]" for i in range(len(many))]
    return [
        _encode(tokenizer, name, prompt, body.suffix)
        for name, prompt in zip(names, many, strict=True)
    ]


def check_room(prompt: Prompt, max_tokens: int, max_model_len: int, limit_field: str) -> None:
    """Raise unless prompt and new tokens fit the context window.

    Raises:
        PromptTooLongError: the prompt alone does not fit.
        InvalidRequestError: more new tokens are asked for than there is room.
    """
    length = len(prompt.ids)
    check_length("prompt", length, max_model_len)
    if max_tokens > max_model_len - length:
        raise InvalidRequestError(
            limit_field,
            f"{max_tokens} new tokens after a prompt of {length} exceed the context window of "
            f"{max_model_len} tokens; ask for at most {max_model_len - length}",
        )


def check_length(param: str, length: int, max_model_len: int) -> None:
    """Raise PromptTooLongError unless so many tokens fit the context window."""
    if length > max_model_len:
        raise PromptTooLongError(
            param,
            f"{length} tokens exceed the context window of {max_model_len}; shorten it, or teach "
            "it to a session with POST /v1/sessions/{id}/adapt, which takes any length",
        )


def check_bytes(param: str, texts: Sequence[str], max_model_len: int) -> None:
    """Raise PromptTooLongError where a look at the length spares encoding the texts."""
    length, limit = sum(len(text.encode()) for text in texts), max_model_len * _TOKEN_BYTES
    if length > limit:
        raise PromptTooLongError(
            param,
            f"{length} bytes exceed {limit}, the most that is read for the context window of "
            f"{max_model_len} tokens; shorten it, or teach it to a session with POST "
            "/v1/sessions/{id}/adapt, which takes any length",
        )


def check_token_ids(param: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequestError unless all ids lie in the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                param, f"token id {token_id} lies outside the vocabulary, [0, {vocab_size - 1}]"
            )


def _as_list(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt", "is empty; give at least one")
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _encode(tokenizer: Tokenizer, name: str, prompt: str | list[int], suffix: str | None) -> Prompt:
    if not prompt and not (suffix and isinstance(prompt, str)):
        raise InvalidRequestError(name, "is empty; give at least one token")
    if isinstance(prompt, str):
        if suffix:
            return Prompt(tuple(tokenizer.encode_fim(prompt, suffix)), prompt)
        return Prompt(tuple(tokenizer.encode(prompt)), prompt)
    if suffix:
        raise InvalidRequestError("suffix", "needs a prompt of text, not of token ids")
    check_token_ids(name, prompt, tokenizer.vocab_size)
    return Prompt(tuple(prompt), None)
