"""A server without a model, for benchmarks: what it answers depends on what its session learned.

A token is a word or another character. The loss of a token falls with every time that the session
has learned it; a completion is what most often followed the prompt's last words in what was
learned.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

CONTEXT = 700
_CHUNK = 40


class Cut(BaseException):
    """Somebody pulled the plug; no client catches it."""


@dataclass(slots=True)
class FakeSession:
    """What was learned, in order, by a machine that calculates in its own way."""

    learned: list[str] = field(default_factory=list)
    chunks: int = 0
    machine: str = ""

    @property
    def digest(self) -> str:
        """Of what was learned."""
        return hashlib.sha256("\0".join([self.machine, *self.learned]).encode()).hexdigest()

    def state(self, name: str) -> dict[str, Any]:
        """As the server describes it."""
        version = len(self.learned)
        return {"id": name, "version": version, "digest": self.digest, "chunks": self.chunks}


@dataclass(slots=True)
class FakeServer:
    """Answers requests; use `transport`.

    Args:
        has_sessions: whether it is one of ours.
        has_tokenizer: whether it has a route for it.
        echoes: whether it knows `echo`.
        context: tokens of prompt and answer together.
        choice: what it tells of whose weights answered in a session.
        machine: sessions that learned the same on another one differ.
        cut_at: the request (from 0) at which the plug is pulled.
    """

    has_sessions: bool = True
    has_tokenizer: bool = True
    echoes: bool = True
    context: int = CONTEXT
    choice: dict[str, Any] | None = None
    machine: str = ""
    cut_at: int | None = None
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    @property
    def transport(self) -> httpx.MockTransport:
        """For a client."""
        return httpx.MockTransport(self.answer)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was sent to a path."""
        return [body for _, sent_to, body in self.requests if sent_to == path]

    def answer(self, request: httpx.Request) -> httpx.Response:
        """One request."""
        body: dict[str, Any] = json.loads(request.content or b"{}")
        path = request.url.path
        cut = len(self.requests) == self.cut_at
        self.requests.append((request.method, path, body))
        if cut and not path.endswith("/adapt"):
            raise Cut
        match path.strip("/").split("/"):
            case ["v1", "models"]:
                entry = {"id": "fake", "object": "model", "max_model_len": self.context}
                return httpx.Response(200, json={"object": "list", "data": [entry]})
            case ["tokenize"] if self.has_tokenizer:
                return httpx.Response(200, json={"tokens": list(range(len(split(body["prompt"]))))})
            case ["v1", "completions"]:
                return self._complete(body)
            case ["v1", "sessions", *rest] if self.has_sessions:
                return self._session(request.method, rest, body, cut)
        return error(404, f"no route {path}")

    def _session(
        self, method: str, rest: list[str], body: dict[str, Any], cut: bool
    ) -> httpx.Response:
        if not rest and method == "GET":
            states = [session.state(name) for name, session in self.sessions.items()]
            return httpx.Response(200, json={"object": "list", "data": states})
        if not rest:
            self.sessions[body["id"]] = FakeSession(machine=self.machine)
            return httpx.Response(201, json=self.sessions[body["id"]].state(body["id"]))
        name = rest[0]
        if name not in self.sessions:
            return error(404, f"no session {name}")
        if rest[1:] == ["adapt"]:
            events = list(adapt(self.sessions[name], body, cut))
            if cut:
                raise Cut
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            return httpx.Response(
                200,
                text=lines + "data: [DONE]\n\n",
                headers={"Content-Type": "text/event-stream"},
            )
        if method == "DELETE":
            del self.sessions[name]
            return httpx.Response(200, json={"id": name, "deleted": True})
        return httpx.Response(200, json=self.sessions[name].state(name))

    def _complete(self, body: dict[str, Any]) -> httpx.Response:
        prompt, ttt = body["prompt"], body.get("ttt") or {}
        if ttt and not self.has_sessions:
            return error(400, "unknown field ttt")
        tokens = split(prompt)
        if len(tokens) + body["max_tokens"] > self.context:
            return error(400, "too long")
        name = ttt.get("session")
        learned = "".join(self.sessions[name].learned) if name is not None else ""
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if not self.echoes and "logprobs" in body:
            choice |= {"text": "x y", "logprobs": scores(["x", " ", "y"], learned)}
        elif body.get("echo"):
            choice |= {"text": prompt, "logprobs": scores(tokens, learned)}
        else:
            choice["text"] = continuation(prompt, learned)
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 0 if body.get("echo") else 3}
        told = {}
        if name is not None and self.choice is not None:
            cost = {"nominal": 1.0, "measured": 1.0, "seconds": 0.5, "chunks": 1}
            told["ttt"] = {"session": name, "gate": "off", "chunk_size": 256, "version_before": 0,
                           "version_after": 0, "choice": self.choice,
                           "cost": cost, "chunks": []}  # fmt: skip
        answer = {"id": "c", "object": "text_completion", "created": 0, "model": "fake",
                  "choices": [choice], "usage": usage, **told}  # fmt: skip
        # Not `json=`, which refuses the numbers that JSON can't hold.
        return httpx.Response(200, text=json.dumps(answer))


def adapt(session: FakeSession, body: dict[str, Any], cut: bool) -> Iterator[dict[str, Any]]:
    """Learn chunk by chunk under the gates' simplest rules; half of it if it is cut."""
    before, tokens = len(session.learned), 0
    whole = sum(len(split(document["text"])) for document in body["documents"])
    events: list[dict[str, Any]] = []
    for document in body["documents"]:
        pieces = split(document["text"])
        for start in range(0, len(pieces), _CHUNK):
            if cut and tokens * 2 >= whole:
                return
            tokens += len(pieces[start : start + _CHUNK])
            text = "".join(pieces[start : start + _CHUNK])
            updates = wants(session, body)
            session.chunks += 1
            if updates:
                session.learned.append(text)
            events.append({
                "object": "session.adaptation.chunk", "action": "UPDATE_1" if updates else "SKIP",
                "reason": body.get("gate", "policy"), "tokens": [start, start + len(text)],
                "nominal": 3.0 if updates else 1.0, "measured": 2.0 if updates else 1.0,
                "loss_before": 1.0, "loss_after": None, "progress": [1, 1],
            })  # fmt: skip
    yield from events
    count = max(len(events), 1)
    yield {
        "object": "session.adaptation", "gate": body.get("gate", "policy"), "tokens": tokens,
        "cost": {"nominal": sum(e["nominal"] for e in events) / count,
                 "measured": sum(e["measured"] for e in events) / count,
                 "seconds": 0.5, "chunks": len(events)},
        "version_before": before, "version_after": len(session.learned),
        "documents": [{"path": d["path"], "tokens": 1} for d in body["documents"]],
    }  # fmt: skip


def wants(session: FakeSession, body: dict[str, Any]) -> bool:
    """Whether the gate updates on this chunk."""
    rate = min((body.get("budget", 3.0) - 1) / 2, 1.0)
    if body.get("gate") == "random":
        drawn = hashlib.sha256(f"{body['seed']}/{session.chunks}".encode()).digest()[0]
        return drawn / 256 < rate
    return len(session.learned) < rate * (session.chunks + 1)


def split(text: str) -> list[str]:
    """Tokens."""
    return re.findall(r"\w+|[^\w]", text)


def scores(tokens: list[str], learned: str) -> dict[str, Any]:
    """Log-probabilities of a prompt."""
    values = [-(len(token) + 1.0) / (1 + learned.count(token)) for token in tokens]
    offsets, place = [], 0
    for token in tokens:
        offsets.append(place)
        place += len(token)
    return {
        "tokens": tokens, "token_logprobs": [None, *values[1:]], "top_logprobs": None,
        "text_offset": offsets,
    }  # fmt: skip


def continuation(prompt: str, learned: str) -> str:
    """What followed the prompt's end where it was learned, or nothing clever."""
    for length in (12, 6, 3):
        at = learned.find(prompt[-length:])
        if at >= 0:
            return learned[at + length : at + length + 80]
    return "        return value\n"


def error(status: int, message: str) -> httpx.Response:
    """In OpenAI's shape."""
    return httpx.Response(status, json={"error": {"message": message, "type": "e", "code": None}})
