"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from ponderttt.engine.request import GenerateRequest
from server.caller import CallerDep
from server.context import ContextDep
from server.prompts import Prompt, check_bytes, check_length, check_room, check_token_ids
from server.replies import ChatReply, Head
from server.routes.common import ERRORS, StrictRoute, answer, session_in_ttt, streamed
from server.schemas.chat import ChatRequest, ChatResponse

router = APIRouter(tags=["completions"], route_class=StrictRoute, responses=ERRORS)


@router.post("/v1/chat/completions", responses=streamed(ChatResponse))
async def create_chat_completion(
    body: ChatRequest, request: Request, context: ContextDep, caller: CallerDep
) -> Response:
    """Answer a chat, written out by the model's own chat template."""
    context.check_model(body.model)
    body.check_supported()
    with session_in_ttt():
        ttt = caller.params(body.ttt)
    core = context.engine.core
    messages = [message.for_template() for message in body.messages]
    texts = [message["content"] for message in messages]
    check_bytes("messages", texts, core.max_model_len)
    ids = await asyncio.to_thread(core.tokenizer.apply_chat_template, messages)
    prompt = Prompt(tuple(ids), None)
    check_length("messages", len(ids), core.max_model_len)
    new_tokens = body.new_tokens
    if new_tokens is None:
        new_tokens = min(core.max_model_len - len(ids), context.settings.chat_max_tokens)
    check_room(prompt, new_tokens, core.max_model_len, _limit_field(body))
    # Asked for, but without a number: the token's own.
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.sampling(new_tokens, logprobs)
    check_token_ids("stop_token_ids", sampling.stop_token_ids, core.tokenizer.vocab_size)
    with session_in_ttt():
        tenant = caller.tenant(ttt.session if ttt is not None else None)
        asked = GenerateRequest(prompt.ids, sampling, ttt, tenant=tenant)
        events = await context.submit([asked], caller.record)
    reply = ChatReply(
        Head.new("chatcmpl", core.model_name), core.tokenizer, logprobs=bool(body.logprobs)
    )
    return await answer(
        request,
        reply,
        context,
        events,
        1,
        sampling.n,
        stream=bool(body.stream),
        usage=body.usage_wanted,
    )


def _limit_field(body: ChatRequest) -> str:
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
