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
    tokens = await asyncio.to_thread(_encode, core.tokenizer, body)
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=core.max_model_len,
        tokens=tokens,
        token_strs=[token_text(core.tokenizer, token_id) for token_id in tokens]
        if body.return_token_strs
        else None,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextDep) -> DetokenizeResponse:
    """The text of token ids."""
    context.check_model(body.model)
    tokenizer = context.engine.core.tokenizer
    check_token_ids("tokens", body.tokens, tokenizer.vocab_size)
    return DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))


def _encode(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", "give either prompt or messages")
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        return tokenizer.apply_chat_template(messages, body.add_generation_prompt)
    return tokenizer.encode(body.prompt or "", body.add_special_tokens)
