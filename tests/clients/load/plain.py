"""An endpoint that has models and completions, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from typer.testing import Result

Answer = Callable[[dict[str, Any]], httpx.Response]
#: Runs the command against an endpoint.
Run = Callable[..., Result]


def stream(text: str = "a b c", usage: int | None = 3) -> httpx.Response:
    """A streamed completion, a word per event."""
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "text": word, "finish_reason": None}]} for word in text.split()
    ]
    events.append({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    if usage is not None:
        counts = {"prompt_tokens": 7, "completion_tokens": usage}
        events.append({"choices": [], "usage": counts})
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return httpx.Response(200, text=lines + "data: [DONE]\n\n")


class Plain:
    """An endpoint that has models and completions, and nothing else."""

    def __init__(self, answer: Answer, seconds: float = 0.0, context: int | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.context = context
        self.running = self.most = 0
        self._answer, self._seconds = answer, seconds

    def sync(self, request: httpx.Request) -> httpx.Response:
        """Short answers."""
        if request.url.path == "/v1/models":
            entry = {"id": "plain", "max_model_len": self.context}
            return httpx.Response(200, json={"data": [entry]})
        return httpx.Response(404, text="<html>nothing here</html>")

    async def completion(self, request: httpx.Request) -> httpx.Response:
        """Completions."""
        body = json.loads(request.content)
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self._seconds)
        self.running -= 1
        return self._answer(body)
