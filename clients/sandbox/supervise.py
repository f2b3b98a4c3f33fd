"""Drives one run from outside: talks to the runner, collects output, enforces what a limit of the
kernel can't, and says what became of the program.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.sandbox.base import SandboxError
from clients.sandbox.checks import Check, prepare
from clients.sandbox.outcome import Limits, Outcome, Verdict
from clients.sandbox.usage import tree_bytes, tree_cpu_seconds

RUNNER = Path(__file__).with_name("runner.py")
#: A PASSED of the runner's costs nothing to wait for; after a failure it prints a traceback.
GRACE_SECONDS = 0.5
#: How often memory is looked at, and the wall clock.
POLL_SECONDS = 0.05
DETAIL_CHARACTERS = 500
_SECRET_BYTES = 16
_PIECE = 1 << 16
#: Of one message of the runner, with room to spare.
_MESSAGE_BYTES = 4096
#: Output and results come through different pipes, read in any order.
_OVERRULED_BY = {Verdict.PASSED: {Verdict.OUTPUT_LIMIT}}
_VERDICTS = {b"F": Verdict.FAILED, b"M": Verdict.OUT_OF_MEMORY, b"T": Verdict.TAMPERED}


@dataclass(slots=True)
class Channel:
    """The pipes to and from one runner, both ends of each."""

    source: int
    to_runner: int
    from_runner: int
    result: int

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Channel]:
        """Opens the pipes; closes whatever is still open at the end."""
        channel = cls(*os.pipe(), *os.pipe())
        os.set_blocking(channel.to_runner, False)
        try:
            yield channel
        finally:
            for name in cls.__slots__:
                channel.close(name)

    def close(self, name: str) -> None:
        """Close one end by its field's name; nothing happens where it is closed."""
        descriptor = getattr(self, name)
        if descriptor >= 0:
            setattr(self, name, -1)
            os.close(descriptor)


def runner_command(
    runner: str, channel: Channel, uid: int, limits: Limits, processes: int, check: Check
) -> list[str]:
    """What to start: the interpreter that runs us, isolated from environment and site packages.

    Args:
        runner: where `runner.py` is, as the sandbox sees it.
        uid: user to become in the sandbox; 0 to stay who it is.
        processes: limit of the kernel on the user's processes; 0 for none.
    """
    numbers = (
        channel.source, channel.result, uid, math.ceil(limits.cpu_seconds), limits.memory_bytes,
        processes, limits.file_bytes,
    )  # fmt: skip
    options = ["-I", "-S", "-B", "-X", "utf8"]
    return [python(), *options, runner, *map(str, numbers), ",".join(check.modules)]


Start = Callable[[Channel, Check], "subprocess.Popen[bytes]"]


def supervise(
    start: Start,
    kill: Callable[[subprocess.Popen[bytes]], None],
    program: str,
    limits: Limits,
    check: str | None,
) -> Outcome:
    """Run one program.

    Args:
        start: starts the runner with the channel's `source` and `result` passed on.
        kill: ends the process and everything that it has started.
    Raises:
        SandboxError: it ended before the program could begin.
    """
    prepared = prepare(check or "")
    began = time.monotonic()
    with Channel.open() as channel:
        process = start(channel, prepared)
        run = _Run(process, channel, limits, program, prepared, began)
        try:
            channel.close("source")
            channel.close("result")
            run.follow()
        finally:
            kill(process)
            process.wait()
            run.drain()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
    return run.outcome()


@dataclass(slots=True)
class _Run:
    process: subprocess.Popen[bytes]
    channel: Channel
    limits: Limits
    program: str
    check: Check
    began: float
    verdict: Verdict | None = None
    detail: str = ""
    seconds: float = 0.0
    cpu_seconds: float | None = None
    written: dict[str, bytearray] = field(
        default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()}
    )
    received: bytearray = field(default_factory=bytearray)
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    ready: bytes = field(default_factory=lambda: secrets.token_bytes(_SECRET_BYTES))
    proof: bytes = field(default_factory=lambda: secrets.token_bytes(_SECRET_BYTES))
    #: All was ready for the program; a sandbox that breaks before is not the program's failure.
    started: bool = False
    told_ready: bool = False
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)

    def follow(self) -> None:
        """Until there is a verdict or all has ended."""
        deadline = self.began + self.limits.wall_seconds
        stdout, stderr = self.process.stdout, self.process.stderr
        assert stdout is not None
        assert stderr is not None
        with self.selector:
            for stream, what in ((stdout, "stdout"), (stderr, "stderr")):
                os.set_blocking(stream.fileno(), False)
                self.selector.register(stream, selectors.EVENT_READ, what)
            self.selector.register(self.channel.from_runner, selectors.EVENT_READ, "result")
            self.selector.register(self.channel.to_runner, selectors.EVENT_WRITE, "source")
            source = self.program.encode("utf-8", "surrogatepass")
            self._send(self.ready + self.proof + len(source).to_bytes(8, "big") + source)
            looked = self.began
            while self.verdict is None:
                for key, _ in self.selector.select(POLL_SECONDS):
                    self._serve(key)
                now = time.monotonic()
                if self.verdict is None and now >= deadline:
                    self.cpu_seconds = tree_cpu_seconds(self.process.pid)
                    self._decide(
                        Verdict.TIMED_OUT, f"wall time limit of {self.limits.wall_seconds:g} s"
                    )
                if self.verdict is None and now >= looked + POLL_SECONDS:
                    looked = now
                    self._look_at_memory()
            self._linger(min(deadline, time.monotonic() + GRACE_SECONDS))
        self.seconds = time.monotonic() - self.began

    def _linger(self, deadline: float) -> None:
        """A program that failed prints its traceback; one that passed has flushed its output."""
        while (
            self.verdict in (Verdict.FAILED, Verdict.PASSED)
            and time.monotonic() < deadline
            and {"stdout", "stderr"} & {key.data for key in self.selector.get_map().values()}
        ):
            for key, _ in self.selector.select(POLL_SECONDS):
                self._serve(key)
            if self.process.poll() is not None:
                break

    def drain(self) -> None:
        """What is left in the pipes once everything has ended."""
        for what in self.written:
            stream = getattr(self.process, what)
            with contextlib.suppress(BlockingIOError, ValueError):
                while (piece := os.read(stream.fileno(), _PIECE)) and self._keep(what, piece):
                    pass

    def outcome(self) -> Outcome:
        """The verdict with all that was seen."""
        assert self.verdict is not None
        stdout, stderr = (
            bytes(self.written[what]).decode("utf-8", "replace") for what in ("stdout", "stderr")
        )
        detail = self.detail[:DETAIL_CHARACTERS]
        if not self.started and self.verdict is not Verdict.TIMED_OUT:
            words = stderr.strip()[-DETAIL_CHARACTERS:]
            raise SandboxError(
                f"the sandbox ended before the program began ({words or detail}); nothing was "
                "judged: see that namespaces, processes and memory are not used up, and run again"
            )
        return Outcome(self.verdict, detail, stdout, stderr, self.seconds, self.cpu_seconds)

    def _decide(self, verdict: Verdict, detail: str) -> None:
        """Take the first verdict, unless what is read later overrules it."""
        if self.verdict is None or verdict in _OVERRULED_BY.get(self.verdict, ()):
            self.verdict, self.detail = verdict, detail

    def _send(self, data: bytes) -> None:
        self.unsent = memoryview(data)

    def _serve(self, key: selectors.SelectorKey) -> None:
        if key.data == "source":
            self._write()
        elif key.data == "result":
            self._read_result()
        else:
            piece = os.read(key.fd, _PIECE)
            if not piece:
                self.selector.unregister(key.fileobj)
            else:
                self._keep(key.data, piece)

    def _keep(self, what: str, piece: bytes) -> bool:
        """Keep output as far as the limit allows; whether that was all of it."""
        room = self.limits.output_bytes - sum(map(len, self.written.values()))
        self.written[what] += piece[: max(room, 0)]
        if len(piece) > room:
            self._decide(Verdict.OUTPUT_LIMIT, f"wrote more than {self.limits.output_bytes} bytes")
        return len(piece) <= room

    def _write(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.channel.to_runner, self.unsent) :]
        except BrokenPipeError:
            self.unsent = memoryview(b"")
        if not self.unsent:
            self.selector.unregister(self.channel.to_runner)

    def _read_result(self) -> None:
        piece = os.read(self.channel.from_runner, _PIECE)
        if not piece:
            self.selector.unregister(self.channel.from_runner)
            self._explain_end()
            return
        self.received += piece
        while self.verdict is None and len(self.received) >= 3:
            end = 3 + int.from_bytes(self.received[1:3], "big")
            if end > _MESSAGE_BYTES:
                self._hear(b"?", b"")
            elif len(self.received) < end:
                return
            else:
                self._hear(bytes(self.received[:1]), bytes(self.received[3:end]))
                del self.received[:end]

    def _hear(self, kind: bytes, text: bytes) -> None:
        if kind in _VERDICTS:
            self._decide(_VERDICTS[kind], text.decode("utf-8", "replace"))
        elif kind == b"S" and not self.started:
            self.started = True
        elif kind == b"R" and not self.told_ready and secrets.compare_digest(text, self.ready):
            self.told_ready = True
            self._send(len(self.check.code).to_bytes(8, "big") + self.check.code)
            self.selector.register(self.channel.to_runner, selectors.EVENT_WRITE, "source")
        elif kind == b"P" and self.told_ready and secrets.compare_digest(text, self.proof):
            self._decide(Verdict.PASSED, "")
        else:
            self._decide(Verdict.TAMPERED, "wrote to the channel of the results")

    def _explain_end(self) -> None:
        """The runner's end of the channel was closed without a word."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        status = self.process.returncode
        if status is None:
            self._decide(Verdict.TAMPERED, "closed the channel of the results")
            return
        # bwrap reports a signal as shells do.
        number = -status if status < 0 else status - 128
        if number == signal.SIGXCPU or (
            number == signal.SIGKILL and time.monotonic() - self.began >= self.limits.cpu_seconds
        ):
            self._decide(Verdict.TIMED_OUT, f"CPU time limit of {self.limits.cpu_seconds:g} s")
        elif number in set(signal.Signals):
            self._decide(Verdict.KILLED, f"by {signal.Signals(number).name}")
        else:
            self._decide(Verdict.EXITED, f"with code {status} before the program's end")

    def _look_at_memory(self) -> None:
        used = tree_bytes(self.process.pid, self.limits.memory_bytes)
        if used > self.limits.memory_bytes:
            self._decide(
                Verdict.OUT_OF_MEMORY,
                f"its processes used {used >> 20} MB of {self.limits.memory_bytes >> 20} MB",
            )


def python() -> str:
    """The interpreter outside any virtual environment, which a sandbox need not see."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def popen(command: list[str], descriptors: tuple[int, ...], **options: Any
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a command whose output is read and whose input is empty.

    Raises:
        SandboxError: it can't be started.
    """
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=descriptors, bufsize=0, start_new_session=True, **options,
        )  # fmt: skip
    except OSError as error:
        raise SandboxError(
            f"cannot start {command[0]}: {error}; free processes or memory, or repair the file"
        ) from error
