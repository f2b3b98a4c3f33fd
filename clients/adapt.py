"""`ponderttt adapt`: teach a session a file or a directory, with a progress bar.

A session remembers what it has learned: an interrupted run is resumed by running it again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ponderttt.errors import InvalidRequestError, PonderError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from clients.api import Client
    from clients.files import TextFile

# Files of one request; the fewer, the less an interruption costs.
_BATCH_FILES, _BATCH_BYTES = 64, 1 << 19
_ACTIONS = ("SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4")
# Of the session as the server has it, since it was made.
_LEDGER = ("chunks", "learned_tokens", "chunks_by_action", "cost")


@dataclass(slots=True)
class Tally:
    """What has been learned so far; losses are sums over tokens, in nats."""

    chunks: int = 0
    tokens: int = 0
    before: float = 0.0
    after: float = 0.0
    nominal: float = 0.0
    measured: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    documents: list[dict[str, Any]] = field(default_factory=list)
    version_before: int | None = None
    version_after: int | None = None

    def add_chunk(self, chunk: dict[str, Any]) -> None:
        """Enter one chunk."""
        self.chunks += 1
        self.actions[chunk["action"]] += 1
        self.reasons[chunk["reason"]] += 1
        self.nominal += chunk["nominal"]
        self.measured += chunk["measured"]
        loss = chunk["loss_before"]
        if loss is None:
            return
        start, end = chunk["tokens"]
        kept = chunk["loss_after"] if "rollback" not in chunk else None
        self.tokens += end - start
        self.before += (end - start) * loss
        self.after += (end - start) * (loss if kept is None else kept)

    def add_report(self, report: dict[str, Any]) -> None:
        """Enter the end of one request."""
        self.documents += report["documents"]
        self.version_after = report["version_after"]
        if self.version_before is None:
            self.version_before = report["version_before"]

    @property
    def loss_before(self) -> float | None:
        """Mean over all tokens, as they were read."""
        return self.before / self.tokens if self.tokens else None

    @property
    def loss_after(self) -> float | None:
        """The same, with the loss after the update where there was one."""
        return self.after / self.tokens if self.tokens else None

    def as_dict(self, session: str, seconds: float, skipped: int) -> dict[str, Any]:
        """For --json."""
        count = max(self.chunks, 1)
        return {
            "session": session,
            "version_before": self.version_before,
            "version_after": self.version_after,
            "files": len(self.documents),
            "skipped": skipped,
            "tokens": sum(document["tokens"] for document in self.documents),
            "chunks": self.chunks,
            "actions": {action: self.actions[action] for action in _ACTIONS},
            "reasons": dict(self.reasons),
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "cost": {"nominal": self.nominal / count, "measured": self.measured / count},
            "seconds": seconds,
            "documents": self.documents,
        }


def adapt(
    path: Annotated[Path, typer.Argument(help="File or directory to learn.", exists=True)],
    session: Annotated[
        str, typer.Option(help="Session to teach; made if missing.", envvar="PONDERTTT_SESSION")
    ],
    base_url: Annotated[
        str, typer.Option(help="Where the server is.", envvar="PONDERTTT_BASE_URL")
    ] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the server's key.", envvar="PONDERTTT_API_KEY_FILE", dir_okay=False
        ),
    ] = None,
    gate: Annotated[
        Literal["policy", "threshold", "random", "fixed", "off"] | None,
        typer.Option(
            help="Who decides per chunk; by default the session's gate.",
            envvar="PONDERTTT_ADAPT_GATE",
        ),
    ] = None,
    action: Annotated[
        Literal["SKIP", "UPDATE_1", "UPDATE_2", "UPDATE_4"] | None,
        typer.Option(help="Action of gate fixed.", envvar="PONDERTTT_ADAPT_ACTION"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Highest mean cost per chunk, × forward.", envvar="PONDERTTT_ADAPT_BUDGET"
        ),
    ] = None,
    cost_model: Annotated[
        Literal["nominal", "measured"] | None,
        typer.Option(
            help="Costs in which the budget is counted.", envvar="PONDERTTT_ADAPT_COST_MODEL"
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens per chunk.", envvar="PONDERTTT_ADAPT_CHUNK_SIZE")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of gate random.", envvar="PONDERTTT_ADAPT_SEED")
    ] = None,
    max_file_bytes: Annotated[
        int,
        typer.Option(
            help="Larger files are skipped.", envvar="PONDERTTT_ADAPT_MAX_FILE_BYTES", min=1
        ),
    ] = 1 << 20,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without progress after which to give up.",
            envvar="PONDERTTT_ADAPT_TIMEOUT",
            min=1.0,
        ),
    ] = 600.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here.", dir_okay=False)
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show no progress.", envvar="PONDERTTT_QUIET")
    ] = False,
) -> None:
    """Teach a session the text files of a directory. Safe to interrupt and repeat."""
    from rich.console import Console

    from clients.api import Client
    from clients.keys import read_key
    from clients.options import check_writable

    options = {
        "gate": gate, "action": action, "budget": budget,
        "cost_model": cost_model, "chunk_size": chunk_size, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    console = Console(stderr=True, quiet=quiet)
    # Before the work whose result it would lose.
    check_writable("--json", json_file)
    api_key = read_key(api_key_file)
    files, skipped = _find(path, max_file_bytes, console)
    tally, begun = Tally(), time.monotonic()

    def busy(line: str) -> None:
        console.print(line, style="dim", markup=False)

    with Client(base_url, learning_timeout=timeout, api_key=api_key, busy=busy) as client:
        if client.session(session) is None:
            client.create_session(session)
            console.print(f"made session {session}")
        try:
            _teach(client, session, files, given, tally, console)
        except KeyboardInterrupt:
            raise PonderError(
                f"interrupted after {len(tally.documents)} of {len(files)} files; run the same "
                "command again to go on (what was learned is remembered)"
            ) from None
        in_all = _ledger(client, session)
    result = tally.as_dict(session, time.monotonic() - begun, skipped)
    # What an interrupted run has learned and spent is in the session's own ledger only.
    result["session_in_all"] = in_all
    Console().print(_table(result))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PonderError(f"{json_file} can't be written: {error.strerror}") from error


def _find(path: Path, max_file_bytes: int, console: Console) -> tuple[list[TextFile], int]:
    from clients.files import Skipped, text_files

    files: list[TextFile] = []
    skipped = 0
    for found in text_files(path, max_file_bytes):
        if isinstance(found, Skipped):
            skipped += 1
            console.print(f"skipped {found.path}: {found.reason}", style="dim", markup=False)
        else:
            files.append(found)
    if not files:
        raise InvalidRequestError("path", f"{path} holds no text file to learn")
    return files, skipped


def _teach(
    client: Client,
    session: str,
    files: Sequence[TextFile],
    options: dict[str, Any],
    tally: Tally,
    console: Console,
) -> None:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from clients.answers import LESSON_CHUNK, LESSON_REPORT
    from clients.events import progress_of

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("learning", total=sum(file.size for file in files), status="")
        behind = 0
        for batch in _batches(files):
            size = sum(file.size for file in batch)
            documents = [{"path": file.path, "text": file.text} for file in batch]
            for event in client.adapt(session, documents, options):
                if event["object"] == LESSON_REPORT:
                    tally.add_report(event)
                if event["object"] != LESSON_CHUNK:
                    continue
                tally.add_chunk(event)
                told = progress_of(event)
                at = behind + size * told[0] / max(told[1], 1) if told is not None else None
                progress.update(task, completed=at, status=_status(tally))
            behind += size
            progress.update(task, completed=behind)


def _ledger(client: Client, session: str) -> dict[str, Any]:
    from clients.api import ServerError

    try:
        state = client.session(session) or {}
    except ServerError:
        # The result of a long work is not to be lost for it.
        state = {}
    return {name: state.get(name) for name in _LEDGER}


def _batches(files: Sequence[TextFile]) -> Iterator[list[TextFile]]:
    batch: list[TextFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) == _BATCH_FILES or size + file.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch


def _status(tally: Tally) -> str:
    loss = tally.loss_before
    counts = " ".join(f"{action} {tally.actions[action]}" for action in _ACTIONS)
    return f"loss {loss:.3f} · {counts}" if loss is not None else counts


def _table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"session {result['session']}", show_header=False)
    cost = result["cost"]
    rows = {
        "files": f"{result['files']} ({result['skipped']} skipped)",
        "tokens": f"{result['tokens']:,}",
        "loss before": _nats(result["loss_before"]),
        "loss after": _nats(result["loss_after"]),
        "chunks": str(result["chunks"]),
        **{f"  {action}": str(result["actions"][action]) for action in _ACTIONS},
        "cost per chunk": f"{cost['nominal']:.2f} nominal, {cost['measured']:.2f} measured",
        "version": f"{result['version_before']} to {result['version_after']}",
        "seconds": f"{result['seconds']:.1f}",
        "session in all": _in_all(result["session_in_all"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _in_all(state: dict[str, Any]) -> str:
    cost = state["cost"]
    if cost is None or state["chunks"] is None or state["learned_tokens"] is None:
        return "unknown"
    return (
        f"{state['chunks']} chunks, {state['learned_tokens']:,} tokens learned, cost per chunk "
        f"{cost['nominal']:.2f} nominal, {cost['measured']:.2f} measured"
    )


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f} nats per token"
