"""The engine for programs: synchronous, in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.config import EngineConfig
from ponderttt.engine.core import EngineCore
from ponderttt.engine.loading import load_core
from ponderttt.engine.outputs import (
    ChunkReport,
    DoneEvent,
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    PromptEvent,
    TokenEvent,
    TTTReport,
)
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Request
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.sessions.config import StoreConfig
from ponderttt.sessions.session import Session


@dataclass(slots=True)
class Completion:
    """One continuation of a prompt.

    Args:
        text, token_ids: generated.
        logprobs: per token, where they were asked for.
        finish_reason: why it ended.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class GenerateResult:
    """What came of one prompt.

    Args:
        completions: n of them.
        prompt_logprobs: where they were asked for; the first token has none.
        ttt: what was learned.
    """

    completions: list[Completion]
    prompt_logprobs: tuple[SampledToken | None, ...] = ()
    ttt: TTTReport | None = None


class SessionHandle:
    """A session of an `Engine`.

    Args:
        engine: whose session it is.
        name: its id.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self.name = name

    @property
    def info(self) -> Session:
        """The session's state, to look at."""
        return self._engine.core.sessions.get(self.name)

    def adapt(self, *texts: str, ttt: TTTParams | None = None) -> list[ChunkReport]:
        """Teach the session some texts, in order, and return what happened to each chunk.

        Args:
            texts: documents; what exceeds the context window is learned window by window.
            ttt: settings for this call; its `session` is ignored.
        """
        report = self._engine.adapt(self.name, texts, ttt)
        return list(report.chunks)

    def snapshot(self) -> int:
        """Keep the current version beyond the last few, and return its number."""
        sessions = self._engine.core.sessions
        saving = sessions.snapshot(self.name)
        version = sessions.get(self.name).version
        saving.result()
        sessions.flush()
        return version

    def rollback(self, version: int) -> int:
        """Go back to a kept version, under a new number, which is returned."""
        session = self._engine.core.sessions.rollback(self.name, version)
        self._engine.core.sessions.flush()
        return session.version

    def export(self, directory: str | Path) -> None:
        """Write the fast weights as a PEFT adapter directory."""
        self._engine.core.export_adapter(self.name, Path(directory))


class Engine:
    """An engine for one program; not thread-safe.

    With a store, sessions are saved before each call returns. Close the engine (or use it in a
    `with` block) to let other programs have its sessions.

    Args:
        core: what runs.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core

    @classmethod
    def from_pretrained(
        cls, model: str, *, sessions: str | Path | None = None, **options: Any
    ) -> Engine:
        """Load a model.

        Args:
            model: embedded name, hub name or directory.
            sessions: directory or URL where sessions are kept; None: in memory, or as
                `config.store` says.
            options: as for `load_core`.
        """
        if sessions is not None:
            config = options.get("config") or EngineConfig()
            options["config"] = replace(config, store=StoreConfig(str(sessions)))
        return cls(load_core(model, **options))

    def close(self) -> None:
        """Save all sessions and let go of them."""
        self.core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def session(self, name: str, defaults: TTTParams | None = None) -> SessionHandle:
        """The session of this name, made if it does not exist."""
        sessions = self.core.sessions
        if name not in sessions.names() and name not in sessions.unreadable():
            sessions.create(name, defaults or TTTParams())
            sessions.flush()
        sessions.get(name)
        return SessionHandle(self, name)

    def generate(
        self,
        prompts: str | Seq[str | Seq[int]],
        sampling: SamplingParams | None = None,
        ttt: TTTParams | None = None,
    ) -> list[GenerateResult]:
        """Continue prompts, all at once.

        Args:
            prompts: texts or token ids.
            sampling: how to draw.
            ttt: test-time training.
        Raises:
            PonderError: a bad value, or whatever went wrong with one of the prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        sampling = sampling or SamplingParams()
        requests = [GenerateRequest(self._ids(prompt), sampling, ttt) for prompt in prompts]
        return [_result(events, sampling.n) for events in self.run(requests)]

    def adapt(self, session: str, texts: Seq[str], ttt: TTTParams | None = None) -> TTTReport:
        """Teach a session some texts, in order."""
        params = replace(ttt or TTTParams(), session=session)
        documents = tuple(self._ids(text) for text in texts)
        (events,) = self.run([AdaptRequest(documents, params)])
        done = events[-1]
        if not isinstance(done, DoneEvent) or done.ttt is None:
            raise RuntimeError("an adapt request ended without a report")
        return done.ttt

    def run(self, requests: Seq[Request]) -> list[list[Event]]:
        """Run requests to their ends (background learning included) and return their events."""
        events: list[list[Event]] = [[] for _ in requests]
        groups = [
            self.core.prepare(request, sink.append)
            for request, sink in zip(requests, events, strict=True)
        ]
        for group in groups:
            # The queue is limited for the sake of servers; a program's own requests wait here.
            while self.core.waiting >= self.core.config.max_waiting:
                self.core.step()
            self.core.enqueue(group)
        while self.core.has_work:
            if not self.core.step():
                time.sleep(0.001)  # what is left is drawn elsewhere
        self.core.sessions.flush()
        for stream in events:
            if isinstance(stream[-1], ErrorEvent):
                raise stream[-1].error
        return events

    def _ids(self, prompt: str | Seq[int]) -> tuple[int, ...]:
        return tuple(self.core.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)


def _result(events: list[Event], n: int) -> GenerateResult:
    result = GenerateResult([Completion() for _ in range(n)])
    for event in events:
        match event:
            case TokenEvent():
                completion = result.completions[event.index]
                completion.text += event.text
                completion.token_ids += event.token_ids
                completion.logprobs += event.logprobs
            case FinishEvent():
                result.completions[event.index].finish_reason = event.reason
            case PromptEvent():
                result.prompt_logprobs = event.logprobs
            case DoneEvent():
                result.ttt = event.ttt
            case _:
                pass
    return result
