"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError
from server.caller import CallerDep
from server.context import ContextDep
from server.prompts import check_room, check_token_ids, encode_prompts
from server.replies import CompletionReply, Head
from server.routes.common import ERRORS, StrictRoute, answer, session_in_ttt, streamed
from server.schemas.completion import CompletionRequest, CompletionResponse

router = APIRouter(tags=["completions"], route_class=StrictRoute, responses=ERRORS)

# OpenAI's default.
_MAX_TOKENS = 16


@router.post("/v1/completions", responses=streamed(CompletionResponse))
async def create_completion(
    body: CompletionRequest, request: Request, context: ContextDep, caller: CallerDep
) -> Response:
    """Continue prompts, or fill in between prompt and suffix, while learning from them."""
    context.check_model(body.model)
    sampling = _sampling(body)
    with session_in_ttt():
        ttt = caller.params(body.ttt)
    core = context.engine.core
    check_token_ids("stop_token_ids", sampling.stop_token_ids, core.tokenizer.vocab_size)
    prompts = await asyncio.to_thread(
        encode_prompts, core.tokenizer, body, caller.max_waiting, core.max_model_len
    )
    for prompt in prompts:
        check_room(prompt, sampling.max_tokens, core.max_model_len, "max_tokens")
    with session_in_ttt():
        tenant = caller.tenant(ttt.session if ttt is not None else None)
        asked = [GenerateRequest(p.ids, sampling, ttt, tenant=tenant) for p in prompts]
        events = await context.submit(asked, caller.record)
    reply = CompletionReply(
        Head.new("cmpl", core.model_name),
        core.tokenizer,
        prompts,
        echo=bool(body.echo),
        logprobs=body.logprobs is not None,
    )
    return await answer(
        request,
        reply,
        context,
        events,
        len(prompts),
        sampling.n,
        stream=bool(body.stream),
        usage=body.usage_wanted,
    )


def _sampling(body: CompletionRequest) -> SamplingParams:
    n = 1 if body.n is None else body.n
    if body.best_of not in (None, n):
        raise InvalidRequestError(
            "best_of", f"{body.best_of} differs from n = {n}; only as many as asked for are made"
        )
    return body.sampling(
        _MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        body.logprobs,
        body.logprobs if body.echo else None,
    )
