"""HumanEval inside the sessions of the repository benchmark: what does learning one cost?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.bench.compare import compared
from clients.bench.compare_report import comparison_text
from clients.bench.functional.forgetting import humaneval_in_session
from clients.calls import RETRIES
from clients.results import read_results
from clients.sandbox import Sandbox


@dataclass(slots=True)
class Exam:
    """Asks so many problems of HumanEval in a session, and once without one.

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
    _taken: list[Path] = field(default_factory=list)

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
        if not path.exists() or not self._is_of(path, digest):
            return True
        if len(read_results(path)[1]) < self.problems:
            return True
        self._note(path)
        return False

    def _is_of(self, path: Path, digest: str | None) -> bool:
        """Whether a file holds an exam of the same weights."""
        header, _ = read_results(path)
        same_model = self.model in (None, header.model)
        return same_model and header.settings.get("session_digest") == digest

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
        # What another session, or another model, once answered under this title is of no use.
        if path.exists() and not self._is_of(path, digest):
            path.unlink()
        humaneval_in_session(
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
        self._note(path)

    def _note(self, path: Path) -> None:
        if path not in self._taken:
            self._taken.append(path)

    def compared(self) -> dict[str, Any] | None:
        """Each session's pass@1 with its paired difference to the base model; None: none taken."""
        if len(self._taken) < 2:
            return None
        results = [read_results(path) for path in self._taken]
        return compared(self._taken, results, ["passed"], None, self.seed)

    def table(self) -> str:
        """The same as Markdown."""
        found = self.compared()
        return comparison_text(found) if found is not None else ""
