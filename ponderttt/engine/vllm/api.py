"""vLLM's HTTP endpoints, as far as we need them, with its failures in our words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ponderttt.engine.generator import Continuation
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.vllm.config import VllmConfig
from ponderttt.engine.vllm.errors import (
    AdapterGoneError,
    VllmError,
    VllmRefusedError,
    VllmTimeoutError,
    VllmUnreachableError,
)

_CONNECT_SECONDS = 5.0
_MESSAGE_CHARS = 300
_TOKEN_NAME = "token_id:"


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens as they come; `end` is vLLM's finish reason, with the last ones."""

    tokens: tuple[SampledToken, ...]
    end: str | None


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base model that vLLM serves: its name there, its path or hub name, its context."""

    name: str
    root: str
    max_model_len: int


class VllmApi:
    """One vLLM server. To be used in one event loop.

    Args:
        config: where it is.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._url = config.base_url
        key = config.api_key
        self._http = httpx.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key is not None else {},
            timeout=httpx.Timeout(config.timeout, connect=min(_CONNECT_SECONDS, config.timeout)),
            # As many as run at once; our own queue is the limit.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # A server in the neighbourhood: no proxy of the environment leads there.
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # --- what it is ------------------------------------------------------------------------

    async def version(self) -> str:
        """vLLM's version."""
        return str((await self._get("/version")).get("version", ""))

    async def base_model(self) -> BaseModel:
        """The model that it serves without adapters."""
        cards = (await self._get("/v1/models")).get("data", [])
        for card in cards:
            if card.get("parent") is None:
                length = int(card.get("max_model_len") or 0)
                return BaseModel(str(card["id"]), str(card.get("root") or ""), length)
        raise VllmRefusedError(f"vLLM at {self._url} lists no base model at /v1/models", 404)

    async def adapters_under(self, directory: Path) -> list[str]:
        """Names of loaded adapters whose files are in a directory."""
        cards = (await self._get("/v1/models")).get("data", [])
        return [
            str(card["id"])
            for card in cards
            if card.get("parent") is not None
            and Path(str(card.get("root"))).is_relative_to(directory)
        ]

    async def max_loras(self) -> int | None:
        """`--max-loras`, as its metrics tell once a request has run; None: they don't."""
        with self._translated():
            answer = await self._http.get("/metrics")
        found = re.search(r'vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', answer.text)
        return int(found[1]) if found else None

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without an opening token."""
        body = {"prompt": text, "add_special_tokens": False}
        return [int(token) for token in (await self._post("/tokenize", body))["tokens"]]

    async def score(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens but the first, in nats."""
        body = {
            "model": model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        answer = await self._post("/v1/completions", body)
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        return [float(row[str(t)]["logprob"]) for row, t in zip(rows, tokens[1:], strict=True)]

    # --- adapters ----------------------------------------------------------------------------

    async def load(self, name: str, directory: Path) -> None:
        """Load an adapter; one of this name that is there already is taken for it."""
        body = {"lora_name": name, "lora_path": str(directory)}
        try:
            await self._post("/v1/load_lora_adapter", body)
        except VllmRefusedError as error:
            if "already been loaded" not in str(error):
                raise

    async def unload(self, name: str) -> None:
        """Unload an adapter; one that is not there is as good as unloaded."""
        try:
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        except VllmRefusedError as error:
            if error.status != 404:
                raise

    # --- generation ----------------------------------------------------------------------------

    async def stream(self, model: str, text: Continuation) -> AsyncGenerator[Piece, None]:
        """Continue a text; leaving the iteration early aborts the request in vLLM.

        Raises:
            AdapterGoneError: `model` is not there.
            VllmError: anything else, before the first piece or after any.
        """
        body = completion_body(model, text)
        with self._translated():
            async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    if answer.status_code == 404:
                        raise AdapterGoneError(f"vLLM at {self._url}: {_message(answer)}")
                    self._raise_for(answer)
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: ") and (piece := self._piece(line[6:], text)):
                        yield piece
        raise VllmUnreachableError(f"vLLM at {self._url} broke off in the middle of an answer")

    def _piece(self, data: str, text: Continuation) -> Piece | None:
        event = json.loads(data)
        if "error" in event:
            raise VllmUnreachableError(f"vLLM at {self._url}: {_error_text(event)}")
        if not event.get("choices"):
            return None
        choice = event["choices"][0]
        return Piece(_tokens(choice, text.sampling.logprobs), choice.get("finish_reason"))

    # --- HTTP ----------------------------------------------------------------------------------

    async def _get(self, path: str) -> dict[str, Any]:
        with self._translated():
            answer = await self._http.get(path)
            self._raise_for(answer)
            value: dict[str, Any] = answer.json()
            return value

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._translated():
            answer = await self._http.post(path, json=body)
            self._raise_for(answer)
            is_json = "json" in answer.headers.get("content-type", "")
            value: dict[str, Any] = answer.json() if is_json else {}
            return value

    def _raise_for(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status < 400:
            return
        message = f"vLLM at {self._url} answers {status}: {_message(answer)}"
        if status >= 500:
            raise VllmUnreachableError(message)
        if status == 401:
            message = f"{message}; give its key with --vllm-api-key-file"
        raise VllmRefusedError(message, status)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The one place where the HTTP library's exceptions become ours."""
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise VllmUnreachableError(f"vLLM at {self._url} can't be reached") from error
        except httpx.TimeoutException as error:
            raise VllmTimeoutError(
                f"vLLM at {self._url} sent nothing for too long; see whether it is overloaded, or "
                "raise --vllm-timeout"
            ) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise VllmUnreachableError(
                f"vLLM at {self._url} can't be reached ({reason}); see whether it runs"
            ) from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            # Something else listens there, or its answers have changed.
            raise VllmError(
                f"vLLM at {self._url} gave an answer that can't be understood: {error!r}"
            ) from error


def completion_body(model: str, text: Continuation) -> dict[str, Any]:
    """The request. Every sampling parameter is given: vLLM fills gaps from the model's own file."""
    sampling = text.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(text.tokens),
        "max_tokens": text.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        # Our detokenizer has the last word on stop strings; this spares vLLM tokens beyond them.
        "stop": list(sampling.stop),
        "stop_token_ids": list(text.stop_ids),
        # Those that end a text are among `stop_ids`, so that both sides mean the same ones.
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        body["logprobs"] = sampling.logprobs
    if text.seed is not None:
        body["seed"] = text.seed
    return body


def _tokens(choice: dict[str, Any], wanted: int | None) -> tuple[SampledToken, ...]:
    ids = choice.get("token_ids") or []
    if wanted is None:
        return tuple(SampledToken(int(token), math.nan) for token in ids)
    if not ids:
        return ()
    given = choice["logprobs"]
    rows = zip(ids, given["token_logprobs"], given["top_logprobs"], strict=True)
    return tuple(SampledToken(int(t), float(lp), _best(top, wanted)) for t, lp, top in rows)


def _best(top: dict[str, float] | None, wanted: int) -> tuple[tuple[int, float], ...]:
    """vLLM adds the drawn token where it is not among the best."""
    pairs = [(int(name.removeprefix(_TOKEN_NAME)), float(lp)) for name, lp in (top or {}).items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:wanted])


def _message(answer: httpx.Response) -> str:
    try:
        return _error_text(answer.json())
    except ValueError:
        return answer.text[:_MESSAGE_CHARS]


def _error_text(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text)[:_MESSAGE_CHARS]
