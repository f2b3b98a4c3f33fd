"""A long mixed load beyond what a server can take: does it leak, lose requests, or keep its word?

First some users who wait for their answers find out how many requests per second the server can
take; then twice as many arrive on their own. Completions, streams, chats, documents for sessions,
sessions that come and go, and clients that leave in the middle.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

#: What a request is, and how often.
MIX = {
    "completion": 40, "stream": 20, "chat": 8, "adapt": 12, "adapt_stream": 4, "session": 6,
    "score": 6, "leave": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one request: `ok`, `rejected` (429), `left` (by ourselves), else what is wrong.

    Args:
        kind: of the request.
        outcome: see above.
        seconds: from its arrival to its end.
        at: seconds since the load began, when it ended.
    """

    kind: str
    outcome: str
    seconds: float
    at: float


@dataclass
class Soak:
    """One run against one server.

    Args:
        client: without a time limit that the server's own would not reach first.
        text: that prompts and documents are cut from.
        sessions: that users share.
        rss: bytes of memory that the server has now; None: not known.
        seed: of all draws.
        prompt_chars, new_tokens: of a request at most.
    """

    client: httpx.AsyncClient
    text: str
    sessions: Sequence[str]
    rss: Callable[[], int] | None = None
    seed: int = 0
    prompt_chars: int = 900
    new_tokens: int = 24
    seen: list[Seen] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    learned: Counter[str] = field(default_factory=Counter)
    versions: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _begun: float = 0.0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def prepare(self) -> None:
        """Make the sessions."""
        for name in self.sessions:
            (await self.client.post("/v1/sessions", json={"id": name})).raise_for_status()

    async def capacity(self, users: int, seconds: float) -> float:
        """Requests per second that are answered when so many users wait for their answers."""
        until = time.perf_counter() + seconds
        self._begun = time.perf_counter()

        async def user() -> None:
            while time.perf_counter() < until:
                await self._ask(time.perf_counter())

        await asyncio.gather(*(user() for _ in range(users)))
        answered = sum(seen.outcome == "ok" for seen in self.seen)
        return answered / (time.perf_counter() - self._begun)

    async def load(self, rate: float, seconds: float) -> None:
        """Requests that arrive on their own, so many per second."""
        self.seen.clear()
        self._begun = due = time.perf_counter()
        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                while due - self._begun < seconds:
                    await asyncio.sleep(due - time.perf_counter())
                    group.create_task(self._ask(due))
                    due += self._random.expovariate(rate)
        finally:
            watching.cancel()

    async def broken_promises(self) -> list[str]:
        """What the server has lost or does not tell the truth about, now that nobody asks."""
        found = [f"{s.kind}: {s.outcome}" for s in self.seen if s.outcome not in FINE]
        for name in self.sessions:
            state = (await self.client.get(f"/v1/sessions/{name}")).json()
            # Clients that left in the middle may have taught it more than was reported.
            if state["version"] < self.versions[name] or state["chunks"] < self.learned[name]:
                found.append(
                    f"session {name}: version {state['version']}, {state['chunks']} chunks; "
                    f"reported were {self.versions[name]}, {self.learned[name]}"
                )
        return found

    # --- requests -------------------------------------------------------------------------------

    async def _ask(self, due: float) -> None:
        (kind,) = self._random.choices(list(MIX), list(MIX.values()))
        try:
            outcome = await getattr(self, f"_{kind}")()
        except Exception as error:  # whatever it is, it is the finding
            outcome = f"lost: {type(error).__name__} {error}"
        now = time.perf_counter()
        self.seen.append(Seen(kind, outcome, now - due, now - self._begun))

    def _cut(self) -> str:
        start = self._random.randrange(max(len(self.text) - self.prompt_chars, 1))
        return self.text[start : start + self._random.randint(20, self.prompt_chars)]

    def _body(self, **more: Any) -> dict[str, Any]:
        name = self._random.choice([*self.sessions, None])
        ttt = {"session": name, "gate": self._random.choice(["threshold", "off"])}
        if name is not None:
            ttt["when"] = self._random.choice(["inline", "background"])
        tokens = self._random.randint(1, self.new_tokens)
        return {"max_tokens": tokens, "ignore_eos": True, "ttt": ttt, **more}

    async def _completion(self) -> str:
        n = self._random.choice([1, 1, 1, 2])
        return await self._post("/v1/completions", self._body(prompt=self._cut(), n=n))

    async def _score(self) -> str:
        body = self._body(prompt=self._cut(), echo=True, logprobs=1) | {"max_tokens": 0}
        return await self._post("/v1/completions", body)

    async def _chat(self) -> str:
        messages = [{"role": "user", "content": self._cut()}]
        return await self._post("/v1/chat/completions", self._body(messages=messages))

    async def _stream(self) -> str:
        return await self._post_stream("/v1/completions", self._body(prompt=self._cut()))

    async def _leave(self) -> str:
        body = self._body(prompt=self._cut())
        return await self._post_stream("/v1/completions", body, leave=True)

    async def _adapt(self) -> str:
        return await self._post(f"/v1/sessions/{self._any()}/adapt", self._documents())

    async def _adapt_stream(self) -> str:
        return await self._post_stream(f"/v1/sessions/{self._any()}/adapt", self._documents())

    async def _session(self) -> str:
        made = await self.client.post("/v1/sessions")
        if made.status_code != 201:
            return _outcome(made.status_code, made.text)
        path = f"/v1/sessions/{made.json()['id']}"
        for answer in (
            await self.client.post(f"{path}/adapt", json=self._documents()),
            await self.client.get(f"{path}/adapter"),
            await self.client.delete(path),
        ):
            if answer.status_code not in (200, 429):
                return _outcome(answer.status_code, answer.text)
        return "ok"

    def _any(self) -> str:
        return self._random.choice(self.sessions)

    def _documents(self) -> dict[str, Any]:
        count = self._random.randint(1, 3)
        return {"documents": [{"text": self._cut()} for _ in range(count)], "budget": 3.0}

    async def _post(self, path: str, body: dict[str, Any]) -> str:
        answer = await self.client.post(path, json=body)
        if answer.status_code == 200:
            self._note(answer.json())
        return _outcome(answer.status_code, answer.text)

    async def _post_stream(self, path: str, body: dict[str, Any], *, leave: bool = False) -> str:
        last = ""
        async with self.client.stream("POST", path, json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                return _outcome(answer.status_code, (await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if leave:
                    return "left"
                if line.startswith("data: {"):
                    last = line.removeprefix("data: ")
                elif line == "data: [DONE]":
                    self._note(json.loads(last))
                    return "ok"
        return f"lost: the stream ended after {last[:200]}"

    def _note(self, report: dict[str, Any]) -> None:
        """Enter what a session is said to have learned."""
        ttt = report.get("ttt", report)
        name = ttt.get("session") if isinstance(ttt, dict) else None
        if name is not None and name in self.sessions:
            self.learned[name] += len(ttt["chunks"])
            self.versions[name] = max(self.versions[name], ttt["version_after"])

    async def _watch(self) -> None:
        while self.rss is not None:
            self.memory.append((time.perf_counter() - self._begun, self.rss()))
            await asyncio.sleep(1.0)


FINE = ("ok", "rejected", "left")


def _outcome(status: int, text: str) -> str:
    if status in (200, 201):
        return "ok"
    return "rejected" if status == 429 else f"{status}: {text[:300]}"


def _quantile(seconds: list[float], share: float = 0.99) -> float | None:
    ordered = sorted(seconds)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else None


def process_rss(pid: int) -> int:
    """Bytes of memory that a process holds (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no memory any more")


def summary(soak: Soak, rate: float) -> dict[str, Any]:
    """Figures of a run: counts, quantiles of what was answered, memory early and late.

    Args:
        soak: after its load.
        rate: of arrivals, per second.
    """
    outcomes = Counter(seen.outcome if seen.outcome in FINE else "lost" for seen in soak.seen)
    answered = [seen.seconds for seen in soak.seen if seen.outcome == "ok"]
    figures: dict[str, Any] = {
        "rate": rate,
        "requests": len(soak.seen),
        "outcomes": dict(outcomes),
        "p99_seconds_by_kind": {
            kind: _quantile([s.seconds for s in soak.seen if (s.kind, s.outcome) == (kind, "ok")])
            for kind in MIX
        },
        "by_kind": dict(Counter(f"{s.kind}:{s.outcome[:40]}" for s in soak.seen)),
        **{f"p{q}_seconds": _quantile(answered, q / 100) for q in (50, 90, 99)},
        "most_seconds": max(answered, default=None),
    }
    if soak.memory:
        third = len(soak.memory) // 3
        warm, late = soak.memory[third : third + 10], soak.memory[-10:]
        figures["rss_warm_bytes"] = max(value for _, value in warm)
        figures["rss_end_bytes"] = max(value for _, value in late)
        figures["rss_most_bytes"] = max(value for _, value in soak.memory)
    return figures
