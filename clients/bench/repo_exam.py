"""HumanEval inside the sessions of the repository benchmark: what does learning one cost?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from clients.bench.compare import compared
from clients.bench.compare_report import comparison_text
from clients.bench.functional.forgetting import humaneval_in_session
from clients.calls import RETRIES
from clients.results import Header, Record, read_results
from clients.sandbox import Sandbox
from ponderttt.errors import InvalidRequestError

# Settings in which an exam in a session differs from the one without.
_OF_SESSION = ("session", "session_digest", "fork", "ttt.read")


@dataclass(slots=True)
class Exam:
    """Asks so many problems of HumanEval in a session, and once without one, which comes first.

    What is there already is of use where that server, asked in this way, would answer the same.

    Args:
        base_url, api_key, model: of the server.
        sandbox: where programs run.
        problems: the first so many.
        output: the benchmark's result file; those of the exam lie beside it.
        timeout: seconds for one answer.
        seed: of the bootstrap.
        quiet: show no progress.
        read: whose weights answer in a session; None is the server's default.
        retries: times that a request is sent again to a busy server.
        fresh: take each exam anew, whatever is there.
    """

    base_url: str
    api_key: str | None
    model: str | None
    sandbox: Sandbox
    problems: int
    output: Path
    timeout: float
    seed: int
    quiet: bool
    read: str | None = None
    retries: int = RETRIES
    fresh: bool = False
    _taken: list[Path] = field(default_factory=list)
    #: Of the exam without a session.
    _base: Header | None = None

    def path(self, title: str) -> Path:
        """Result file of the exam of that title."""
        return self.output.with_name(f"{self.output.stem}-humaneval-{title}.jsonl")

    def is_due(self, title: str, digest: str | None) -> bool:
        """Whether problems are left to ask; a finished exam needs its session no more.

        Args:
            title: of the exam.
            digest: of the session's weights; None: no session.
        """
        path = self.path(title)
        if path in self._taken:
            return False
        if self.fresh or not path.exists() or not self._is_whole(*read_results(path), digest):
            return True
        self._note(path)
        return False

    def _is_whole(self, header: Header, records: Sequence[Record], digest: str | None) -> bool:
        """Whether a file holds all of an exam of these weights, taken as the one without is."""
        settings = header.settings
        return (
            self._base is not None
            and _without_session(header) == _without_session(self._base)
            and settings.get("session_digest") == digest
            and settings.get("ttt.read") == self.read
            and len(records) >= self.problems
        )

    def take(self, title: str, session: str | None, digest: str | None = None) -> None:
        """Ask what is left.

        Args:
            title: of the exam.
            session: to ask in; None: none.
            digest: of its weights.
        Raises:
            PonderError: the server or the sandbox fails; the same call goes on later.
        """
        if not self.is_due(title, digest):
            return
        path = self.path(title)
        ask = partial(
            humaneval_in_session,
            self.base_url,
            session,
            path,
            self.sandbox,
            model=self.model,
            api_key=self.api_key,
            limit=self.problems,
            seed=self.seed,
            timeout=self.timeout,
            read=self.read,
            retries=self.retries,
            quiet=self.quiet,
        )
        try:
            header, _ = ask(fresh=self.fresh)
        except InvalidRequestError as error:
            if error.param != "output":
                raise
            # What other weights, or another server, once answered under this title is of no use.
            header, _ = ask(fresh=True)
        if session is None:
            self._base = header
        self._note(path)

    def _note(self, path: Path) -> None:
        if path not in self._taken:
            self._taken.append(path)

    def compared(self) -> dict[str, Any] | None:
        """Each session's pass@1 with its paired difference to the base model; None: none taken."""
        if len(self._taken) < 2:
            return None
        results = [read_results(path) for path in self._taken]
        # Files that can't be paired are told, and the others shown: the work is done.
        return compared(self._taken, results, ["passed"], None, self.seed, unpaired=True)

    def table(self) -> str:
        """The same as Markdown."""
        found = self.compared()
        return comparison_text(found) if found is not None else ""


def _without_session(header: Header) -> dict[str, Any]:
    """What an exam in a session has in common with the one without; see `ResultFile.open`."""
    line = header.as_dict()
    kept = ("kind", "seed", "model", "server_version", "key_fields")
    settings = {k: v for k, v in line["settings"].items() if k not in _OF_SESSION}
    return {name: line[name] for name in kept} | {"settings": settings}
