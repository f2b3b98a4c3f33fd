"""A load run from the first look at the server to the last record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.api import Client
from clients.async_api import AsyncClient
from clients.calls import LOOKUP_RETRIES, LOOKUP_WAIT
from clients.counting import CHARS_PER_TOKEN, count_tokens
from clients.load.ask import Asking
from clients.load.distributions import Distribution
from clients.load.drive import Drive, Limits
from clients.load.recorder import Recorder
from clients.load.workload import Corpus, Workload
from clients.options import choose_model
from clients.results import Header, ResultFile
from clients.wire import RETRYABLE, ServerError
from ponderttt.errors import InvalidRequestError, PonderError

KEY_FIELDS = ("request",)
# Of the texts, to learn how many characters a token has.
_SAMPLE_CHARS = 20_000


@dataclass(slots=True)
class LoadRun:
    """Everything that a run was asked for; the names are those of the options.

    Attributes:
        measured: the result file is this run's.
        finished: it holds the whole load.
    """

    base_url: str
    api_key: str | None
    model: str | None
    rate: float | None
    users: int
    sessions: int
    think: Distribution
    prompt_tokens: Distribution
    output_tokens: Distribution
    texts: Sequence[Path]
    chars_per_token: float | None
    reuse: float
    ttt: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None
    temperature: float
    requests: int | None
    duration: float | None
    warmup: int
    seed: int
    timeout: float
    retries: int = LOOKUP_RETRIES
    measured: bool = False
    finished: bool = False

    def run(self, output: Path, fresh: bool, quiet: bool) -> None:
        """Put the load on, and write a record per request.

        Args:
            output: result file.
            fresh: overwrite it.
            quiet: show no progress.
        Raises:
            InvalidRequestError: the result file is there already, or the server has no such model.
            PonderError: the server is gone or answers nothing; interrupted.
        """
        if output.exists() and output.stat().st_size > 0 and not fresh:
            raise InvalidRequestError(
                "--output",
                f"{output} exists, and a load can't be resumed; name another file, give --fresh to "
                "overwrite it, or --report to see it again",
            )
        corpus = Corpus.read(self.texts)
        say = _speaker(quiet)
        with Client(
            self.base_url,
            min(self.timeout, 30.0),
            api_key=self.api_key,
            retries=self.retries,
            first_wait=LOOKUP_WAIT,
            busy=say,
        ) as client:
            asking = self._asking(client)
            workload = self._workload(client, corpus, asking, say)
            header = self._header(client, workload, asking)
            with (
                self._server_sessions(client, asking),
                ResultFile.open(output, header, fresh=fresh) as results,
                Recorder(results) as recorder,
                self._progress(recorder, quiet) as tick,
            ):
                self.measured = True
                try:
                    asyncio.run(self._drive(asking, workload, recorder, tick))
                except KeyboardInterrupt:
                    raise PonderError(
                        f"interrupted; {output} and the table hold what ended before"
                    ) from None
                self.finished = True
                if not recorder.tally.outcomes.get("ok"):
                    raise PonderError(_nothing_measured(recorder.tally.outcomes))

    async def _drive(
        self, asking: Asking, workload: Workload, recorder: Recorder, tick: Any
    ) -> None:
        limits = Limits(self.requests, self.duration, self.warmup)
        # A rejection is a result here, so nothing is asked again.
        async with AsyncClient(
            self.base_url, self.timeout, api_key=self.api_key, retries=0
        ) as client:
            drive = Drive(client, asking, workload, limits, recorder, tick)
            if self.rate is not None:
                await drive.open(self.rate)
            else:
                await drive.closed(self.users)

    def _asking(self, client: Client) -> Asking:
        return Asking(
            choose_model(client, self.model),
            self.temperature,
            self.ttt,
            self.extra,
            self.timeout,
            self.sessions,
        )

    def _workload(
        self, client: Client, corpus: Corpus, asking: Asking, say: Callable[[str], None]
    ) -> Workload:
        context = client.context_length(asking.model)
        if context is not None and self.output_tokens.most >= context:
            raise InvalidRequestError(
                "--output-tokens", f"the model's context has {context} tokens; ask for fewer"
            )
        return Workload(
            corpus,
            self.prompt_tokens,
            self.output_tokens,
            self.think,
            self.reuse,
            self.chars_per_token or self._measure_tokens(corpus, say),
            context,
            self.seed,
        )

    def _measure_tokens(self, corpus: Corpus, say: Callable[[str], None]) -> float:
        """Characters per token, by the server's own tokenizer where it has one to ask."""
        sample = corpus.text[:_SAMPLE_CHARS]
        # An estimate does, so a busy server is not waited for.
        with Client(
            self.base_url, min(self.timeout, 30.0), api_key=self.api_key, retries=0
        ) as client:
            try:
                tokens = count_tokens(client, sample)
            except ServerError as error:
                if error.status not in RETRYABLE:
                    raise
                tokens = None
                say(
                    f"the server is too busy to count tokens ({error}); prompts are cut by "
                    f"{CHARS_PER_TOKEN} characters per token, or give --chars-per-token"
                )
        return CHARS_PER_TOKEN if tokens is None else len(sample) / max(tokens, 1)

    def _header(self, client: Client, workload: Workload, asking: Asking) -> Header:
        load = (
            f"open loop, {self.rate:g} requests/s"
            if self.rate is not None
            else f"closed loop, {self.users} users, think time {self.think} s"
        )
        settings = {
            "load": load,
            "rate": self.rate,
            "concurrency": self.users if self.rate is None else None,
            "sessions": self.sessions,
            "think": str(self.think),
            "prompt_tokens": str(self.prompt_tokens),
            "output_tokens": str(self.output_tokens),
            "texts": workload.corpus.fingerprint(),
            "chars_per_token": round(workload.chars_per_token, 4),
            "context": workload.context,
            "reuse": self.reuse,
            "ttt": dict(self.ttt) if self.ttt is not None else None,
            "body": dict(self.extra) if self.extra is not None else None,
            "temperature": self.temperature,
            "requests": self.requests,
            "duration": self.duration,
            "warmup": self.warmup,
            "timeout": self.timeout,
            **client.server_settings(asking.model),
        }
        return Header(
            kind="load",
            seed=self.seed,
            model=asking.model,
            base_url=client.base_url,
            server_version=client.version(),
            settings=settings,
            key_fields=KEY_FIELDS,
            metrics={"ok": "higher", "ttft": "lower", "tpot": "lower", "seconds": "lower"},
        )

    @contextmanager
    def _server_sessions(self, client: Client, asking: Asking) -> Iterator[None]:
        """The server's sessions that requests name; those made here are deleted afterwards."""
        named: set[str] = set()
        for user in range(self.sessions):
            named |= {(asking.ttt_of(user) or {}).get("session", "")} - {""}
        made: list[str] = []
        try:
            for name in sorted(named):
                if client.session(name) is None:
                    client.create_session(name)
                    made.append(name)
            yield
        finally:
            for name in made:
                _delete(client, name)

    @contextmanager
    def _progress(self, recorder: Recorder, quiet: bool) -> Iterator[Any]:
        """A bar of requests or of seconds, with the running figures."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        console = Console(stderr=True, quiet=quiet)
        with Progress(*columns, console=console) as progress:
            total = self.requests if self.requests is not None else self.duration
            task = progress.add_task("load", total=total, figures="")

            def tick(seconds: float) -> None:
                ended = sum(recorder.tally.outcomes.values())
                at = ended if self.requests is not None else min(seconds, self.duration or 0.0)
                progress.update(task, completed=at, figures=recorder.tally.line(seconds))

            yield tick


def _speaker(quiet: bool) -> Callable[[str], None]:
    """Says on stderr what a user should know."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    return lambda line: console.print(line, markup=False, soft_wrap=True)


def _nothing_measured(outcomes: Mapping[str, int]) -> str:
    if not outcomes:
        return "nothing was measured: all requests were to warm up; give --warmup 0, or ask longer"
    said = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    return f"no request was answered ({said}); the table says why"


def _delete(client: Client, name: str) -> None:
    from rich.console import Console

    try:
        client.delete_session(name)
    except ServerError as error:
        # The run itself is done; its result counts for more than this.
        Console(stderr=True).print(f"session {name} is still there: {error}", markup=False)
