"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from ponderttt.errors import InvalidRequestError
from ponderttt.models.tokenizer import Tokenizer
from server.context import ContextDep
from server.logprobs import token_text
from server.prompts import check_token_ids
from server.routes.common import ERRORS, StrictRoute
from server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

router = APIRouter(tags=["tokens"], route_class=StrictRoute, responses=ERRORS)


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(body: TokenizeRequest, context: ContextDep) -> TokenizeResponse:
    """Token ids of a text or a chat."""
    context.check_model(body.model)
    core = context.engine.core
    tokens, texts = await asyncio.to_thread(_encode, core.tokenizer, body)
    return TokenizeResponse(
        count=len(tokens), max_model_len=core.max_model_len, tokens=tokens, token_strs=texts
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextDep) -> DetokenizeResponse:
    """The text of token ids."""
    context.check_model(body.model)
    tokenizer = context.engine.core.tokenizer
    return DetokenizeResponse(prompt=await asyncio.to_thread(_decode, tokenizer, body.tokens))


def _encode(tokenizer: Tokenizer, body: TokenizeRequest) -> tuple[list[int], list[str] | None]:
    ids = _ids(tokenizer, body)
    wanted = body.return_token_strs
    return ids, [token_text(tokenizer, token_id) for token_id in ids] if wanted else None


def _decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    check_token_ids("tokens", tokens, tokenizer.vocab_size)
    return tokenizer.decode(tokens)


def _ids(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", "give either prompt or messages")
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        return tokenizer.apply_chat_template(messages, body.add_generation_prompt)
    return tokenizer.encode(body.prompt or "", body.add_special_tokens)
