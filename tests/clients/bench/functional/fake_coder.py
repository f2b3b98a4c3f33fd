"""A server that knows the solutions, and a sandbox that runs nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from clients.bench.functional.problems import Problem, Suite
from clients.bench.functional.self_test import mutated_solution
from clients.sandbox import Limits, Outcome, Sandbox, Verdict

WRONG = "_another"
_LIMITS = Limits()


class Cut(BaseException):
    """Somebody pulled the plug; no client catches it."""


@dataclass(slots=True)
class FakeCoder:
    """Answers with the data set's solution, or with a mutated one; use `transport`.

    Args:
        suite: whose problems are known.
        wrong: task_ids that get a mutated solution.
        lucky: of those, samples that are right all the same: called with the seed.
        cut_at: the answer (from 0) at which the plug is pulled.
        refusals: statuses for the first requests for an answer.
        sessions: names, with a digest each; None of servers that have none.
        learns: report what was learned.
        refuses: task_ids whose prompts are too long for it.
        answers: by task_id, code that a chat answer has instead of a solution.
        alter: changes an answer before it is sent.
        stuck: sessions can't be deleted.
    """

    suite: Suite
    wrong: Collection[str] = ()
    lucky: Callable[[int], bool] = lambda seed: False
    cut_at: int | None = None
    refusals: list[httpx.Response] = field(default_factory=list)
    sessions: dict[str, str] | None = None
    learns: bool = True
    refuses: Collection[str] = ()
    answers: Mapping[str, str] = field(default_factory=dict)
    alter: Callable[[dict[str, Any]], None] = lambda reply: None
    stuck: bool = False
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def transport(self) -> httpx.MockTransport:
        """For both clients."""
        return _Transport(self)

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Anything but completions."""
        path = request.url.path.strip("/").split("/")
        match path:
            case ["v1", "models"]:
                data = [{"id": "coder", "object": "model", "max_model_len": 8192}]
                return httpx.Response(200, json={"object": "list", "data": data})
            case ["v1", "sessions", name, *rest] if self.sessions is not None:
                return self._session(request, name, rest)
            case ["version"]:
                return httpx.Response(200, json={"version": "9"})
        return httpx.Response(404, json={"error": {"message": "no such route"}})

    async def generate(self, request: httpx.Request) -> httpx.Response:
        """A completion; others may come meanwhile."""
        body: dict[str, Any] = json.loads(request.content)
        if self.refusals:
            return self.refusals.pop(0)
        if len(self.asked) == self.cut_at:
            raise Cut
        problem, chat = self._problem(body)
        if problem.task_id in self.refuses:
            message = "the prompt is longer than the maximum context length"
            return httpx.Response(400, json={"error": {"message": message}})
        self.asked.append((problem.task_id, body))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await asyncio.sleep(0.002)
        self.running -= 1
        ttt = body.get("ttt")
        if ttt is not None and "session" in ttt:
            assert self.sessions is not None
            assert ttt["session"] in self.sessions
        reply = self._reply(problem, chat, body)
        self.alter(reply)
        # Not by httpx, which refuses NaN, as not all servers do.
        headers = {"Content-Type": "application/json"}
        return httpx.Response(200, content=json.dumps(reply), headers=headers)

    def _problem(self, body: dict[str, Any]) -> tuple[Problem, bool]:
        if "messages" in body:
            content = body["messages"][0]["content"]
            return next(p for p in self.suite.problems if p.chat_prompt == content), True
        return next(p for p in self.suite.problems if p.base_prompt == body["prompt"]), False

    def _reply(self, problem: Problem, chat: bool, body: dict[str, Any]) -> dict[str, Any]:
        right = problem.task_id not in self.wrong or self.lucky(body.get("seed", 0))
        text = problem.solution if right else mutated_solution(problem)
        if not right and not chat:
            # Without the helper, which the stop rule cuts off.
            text = text.partition("\n\ndef _another")[0] + "\n"
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if chat:
            code = self.answers.get(problem.task_id, problem.program(text))
            choice["message"] = {"role": "assistant", "content": f"So:\n```python\n{code}```\n"}
        else:
            choice |= {"text": text.removeprefix(problem.shown), "logprobs": None}
        reply = {
            "id": "c", "object": "o", "created": 0, "model": "coder", "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": len(text) // 4},
        }  # fmt: skip
        return reply | ({"ttt": report(body.get("ttt") or {})} if self.learns else {})

    def _session(self, request: httpx.Request, name: str, rest: list[str]) -> httpx.Response:
        assert self.sessions is not None
        if name not in self.sessions:
            return httpx.Response(404, json={"error": {"message": f"no session {name}"}})
        if rest == ["fork"]:
            copy = json.loads(request.content)["id"]
            assert copy not in self.sessions
            self.sessions[copy] = self.sessions[name]
            self.log.append("fork")
            return httpx.Response(201, json={"id": copy})
        if request.method == "DELETE" and self.stuck:
            return httpx.Response(500, json={"error": {"message": "the disk is full"}})
        if request.method == "DELETE":
            del self.sessions[name]
            self.log.append("delete")
            return httpx.Response(200, json={"id": name, "deleted": True})
        return httpx.Response(200, json={"id": name, "digest": self.sessions[name]})


class _Transport(httpx.MockTransport):
    def __init__(self, server: FakeCoder) -> None:
        super().__init__(server.answer)
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if request.url.path.endswith("completions"):
            return await self._server.generate(request)
        return self._server.answer(request)


def report(ttt: dict[str, Any]) -> dict[str, Any]:
    """As our server's: two chunks, the first of them learned unless the gate is off."""
    learned = ttt.get("gate", "threshold") != "off"
    first = "UPDATE_1" if learned else "SKIP"
    nominal = 2.0 if learned else 1.0
    return {
        "session": ttt.get("session"), "version_before": 0, "version_after": int(learned),
        "digest": "d", "gate": ttt.get("gate", "threshold"), "budget": 2.0,
        "cost_model": "nominal", "chunk_size": ttt.get("chunk_size", 256), "when": "inline",
        "cost": {"nominal": nominal, "measured": nominal - 0.2, "seconds": 0.5, "chunks": 2},
        "chunks": [
            {"index": 0, "phase": "prompt", "tokens": [0, 64], "action": first, "reason": "x"},
            {"index": 1, "phase": "prompt", "tokens": [64, 90], "action": "SKIP", "reason": "x"},
        ],
    }  # fmt: skip


@dataclass(slots=True)
class FakeSandbox(Sandbox):
    """Passes what isn't mutated; runs nothing."""

    programs: list[str] = field(default_factory=list)

    def run(self, program: str, limits: Limits = _LIMITS, *, check: str | None = None) -> Outcome:
        self.programs.append(program)
        if WRONG in program:
            return Outcome(Verdict.FAILED, "AssertionError", "", "", 0.01)
        return Outcome(Verdict.PASSED, "", "", "", 0.01)
