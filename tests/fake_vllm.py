"""A vLLM server for tests: its endpoints over a tiny model, and faults on demand.

It speaks what `ponderttt.engine.vllm` uses, in the form of vLLM 0.32, and really generates: with
the adapter's weights, from the directory that it is told.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from torch import Tensor

from ponderttt.engine.sampler import SampledToken, prompt_logprobs, sample
from ponderttt.engine.sampler_state import SamplerState
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.fast_weights.adapter import BatchedAdapter
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig
from ponderttt.fast_weights.peft_format import import_adapter
from ponderttt.models.decoder import Decoder
from ponderttt.models.tokenizer import Tokenizer
from server.runner import bind

BASE = "tiny"


@dataclass
class Fault:
    """What goes wrong with the next request to a path.

    Args:
        status: answer with it at once; None: as the other fields say.
        message: of the answer.
        after: break off after so many tokens of a stream.
        seconds: wait so long first.
    """

    status: int | None = None
    message: str = "made to fail"
    after: int | None = None
    seconds: float = 0.0


@dataclass
class FakeVllm:
    """The server's state.

    Args:
        model, tokenizer: served under the name BASE.
        max_model_len, max_loras, max_lora_rank, enable_lora, runtime_updating, version, key: as
            started.
        faults: by path, taken one by one.
        pace: seconds between two tokens.
    """

    model: Decoder
    tokenizer: Tokenizer
    max_model_len: int = 512
    max_loras: int = 2
    max_lora_rank: int = 8
    enable_lora: bool = True
    runtime_updating: bool = True
    version: str = "0.32.0"
    key: str | None = None
    faults: dict[str, deque[Fault]] = field(default_factory=dict)
    pace: float = 0.0
    url: str = ""
    adapters: dict[str, tuple[Path, Tensor, AdapterLayout]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_loaded: int = 0
    aborted: int = 0

    def fail(self, path: str, *faults: Fault) -> None:
        """Let the next requests to a path fail."""
        self.faults.setdefault(path, deque()).extend(faults)

    def restart(self) -> None:
        """Forget what a process forgets when it ends."""
        self.adapters.clear()

    def app(self) -> FastAPI:
        """The endpoints."""
        app = FastAPI()

        @app.middleware("http")
        async def trip(request: Request, call_next: Any) -> Response:
            path = request.url.path
            self.calls[path] += 1
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, "Unauthorized")
            faults = self.faults.get(path)
            if faults and faults[0].after is None:
                fault = faults.popleft()
                await asyncio.sleep(fault.seconds)
                if fault.status is not None:
                    return _error(fault.status, fault.message)
            answer: Response = await call_next(request)
            return answer

        app.get("/version")(lambda: {"version": self.version})
        app.get("/v1/models")(self._models)
        app.get("/metrics")(self._metrics)
        app.post("/tokenize")(self._tokenize)
        app.post("/v1/completions", response_model=None)(self._complete)
        if self.runtime_updating:
            app.post("/v1/load_lora_adapter")(self._load)
            app.post("/v1/unload_lora_adapter")(self._unload)
        return app

    def _models(self) -> dict[str, Any]:
        base = {"id": BASE, "root": "/models/tiny", "parent": None}
        cards = [base | {"max_model_len": self.max_model_len}]
        cards += [
            {"id": name, "root": str(path), "parent": BASE}
            for name, (path, _, _) in self.adapters.items()
        ]
        return {"object": "list", "data": cards}

    def _metrics(self) -> Response:
        labels = f'max_lora="{self.max_loras}",running_lora_adapters="",waiting_lora_adapters=""'
        return PlainTextResponse(f"vllm:lora_requests_info{{{labels}}} 1.0\n")

    async def _tokenize(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        ids = self.tokenizer.encode(body["prompt"], body["add_special_tokens"])
        return {"count": len(ids), "tokens": ids}

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want")
        if not self.enable_lora:
            return _error(500, "Worker failed with error 'LoRA is not enabled. Use --enable-lora")
        if not (path / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for <path>")
        config = json.loads((path / "adapter_config.json").read_text())
        if config["r"] > self.max_lora_rank:
            limit = self.max_lora_rank
            return _error(500, f"LoRA rank {config['r']} is greater than max_lora_rank {limit}.")
        lora = LoRAConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            layers=len(config["layers_to_transform"]),
            targets=tuple(module.rsplit(".", 1)[-1] for module in config["target_modules"]),
        )
        layout = AdapterLayout(self.model, lora)
        fresh = layout.fresh(torch.device("cpu"), torch.float32)
        self.adapters[name] = path, import_adapter(layout, path, fresh), layout
        self.most_loaded = max(self.most_loaded, len(self.adapters))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        name = body["model"]
        if name != BASE and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        if max(body["prompt"]) >= self.model.config.vocab_size:
            return _error(400, "Token id is out of vocabulary")
        text = _Text(self.model, self.adapters.get(name), body)
        if not body.get("stream"):
            return JSONResponse({"choices": [{"prompt_logprobs": text.scored()}]})
        faults = self.faults.get("/v1/completions")
        cut = faults.popleft().after if faults else None
        return StreamingResponse(self._stream(text, body, cut), media_type="text/event-stream")

    async def _stream(
        self, text: _Text, body: dict[str, Any], cut: int | None
    ) -> AsyncIterator[str]:
        self.running += 1
        try:
            for count in range(1, body["max_tokens"] + 1):
                if cut is not None and count > cut:
                    # What uvicorn makes of it: the connection breaks in the middle.
                    raise ConnectionResetError("made to break")
                token = await asyncio.to_thread(text.next)
                await asyncio.sleep(self.pace)
                end = "length" if count == body["max_tokens"] else None
                end = "stop" if token.token_id in body["stop_token_ids"] else end
                yield f"data: {json.dumps({'choices': [_choice(token, end, body)]})}\n\n"
                if end is not None:
                    break
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1


class _Text:
    """A text that grows token by token."""

    def __init__(
        self,
        model: Decoder,
        adapter: tuple[Path, Tensor, AdapterLayout] | None,
        body: dict[str, Any],
    ) -> None:
        self._model, self._adapter = model, adapter
        self._new = list(body["prompt"])
        self._prompt = tuple(body["prompt"])
        self._cache = model.new_cache(len(self._new) + body["max_tokens"])
        names = (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "logprobs", "seed",
        )  # fmt: skip
        given = {name: body[name] for name in names if name in body}
        self._state = SamplerState(SamplingParams(**given), self._prompt)

    def scored(self) -> list[dict[str, Any] | None]:
        """Log-probabilities of the prompt, as vLLM spells them."""
        with torch.inference_mode():
            rows = prompt_logprobs(self._read()[:-1], torch.tensor(self._prompt[1:]), 0)
        return [None, *({str(row.token_id): {"logprob": row.logprob}} for row in rows)]

    def next(self) -> SampledToken:
        """Draw a token."""
        with torch.inference_mode():
            (token,) = sample(self._read()[-1:], [self._state])
        self._state.observe(token.token_id)
        self._new = [token.token_id]
        return token

    def _read(self) -> Tensor:
        """Logits of the tokens that are new, [N, V]."""
        model, count = self._model, len(self._new)
        adapter = None
        if self._adapter is not None:
            _, weights, layout = self._adapter
            views = layout.views(weights.unsqueeze(0))
            adapter = BatchedAdapter(views, [0], [count], layout.config.scale)
        start = self._cache.length
        batch = model.batch([(self._cache, start, count)], decodes=start > 0)
        x = model.embed(torch.tensor(self._new), batch)
        x = model.run(x, 0, model.config.num_layers, batch, adapter)
        self._cache.length = start + count
        return model.logits(model.normed(x))


def _choice(token: SampledToken, end: str | None, body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "text": "?",
        "token_ids": [token.token_id],
        "finish_reason": end,
    }
    if "logprobs" in body:
        # The drawn token stands first, also where it is not among the best.
        top = {token.token_id: token.logprob} | dict(token.top_logprobs)
        choice["logprobs"] = {
            "token_logprobs": [token.logprob],
            "top_logprobs": [{f"token_id:{key}": value for key, value in top.items()}],
        }
    return choice


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)


@contextmanager
def fake_vllm(model: Decoder, tokenizer: Tokenizer, **options: Any) -> Iterator[FakeVllm]:
    """A fake vLLM server on a loopback port while the block runs."""
    fake = FakeVllm(model, tokenizer, **options)
    sock = bind("127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    config = uvicorn.Config(
        fake.app(), log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],), name="fake-vllm")
    thread.start()
    try:
        until = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < until, "the fake vLLM did not start"
            time.sleep(0.005)
        yield fake
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def names(fake: FakeVllm) -> list[tuple[str, int]]:
    """Owner and version of the adapters that are loaded."""
    found = [re.fullmatch(r"(.+)\.v(\d+)\.[0-9a-f]{12}\.[0-9a-f]{6}", n) for n in fake.adapters]
    return [(match[1], int(match[2])) for match in found if match]
