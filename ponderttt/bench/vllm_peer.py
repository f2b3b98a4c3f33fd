"""Our end of the line to vLLM, which runs as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ponderttt.bench import vllm_env
from ponderttt.errors import UnavailableError

_WORKER = Path(__file__).with_name("vllm_worker.py")
_CLOSE_SECONDS = 30.0


class VllmPeer:
    """Starts with the first request (about a minute) and lives until it is closed.

    Args:
        path: the model's directory.
        threads: OpenMP threads.
        max_model_len: tokens of prompt and completion.
        command: starts the worker; None: by the Python of vLLM's environment.
        eager: without torch.compile, which takes two minutes at start-up.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        max_model_len: int,
        command: Sequence[str] | None = None,
        *,
        eager: bool = True,
    ) -> None:
        self._path, self._threads, self._max_model_len = path, threads, max_model_len
        self._command = command
        self._mode = "eager" if eager else "compiled"
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self.facts: dict[str, Any] = {}

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> tuple[float, list[list[int]]]:
        """Continue all prompts at once, greedily.

        Args:
            prompts: token ids.
            tokens: new tokens for each.
        Returns:
            Seconds inside vLLM, and the new token ids.
        Raises:
            UnavailableError: vLLM's environment is not there, or vLLM failed; the end of its log is
                in the message.
        """
        if self._process is None:
            self._start()
        request = {"prompts": [list(prompt) for prompt in prompts], "tokens": tokens}
        answer = self._ask(json.dumps(request))
        return float(answer["seconds"]), answer["tokens"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> None:
        # -P: the modules beside the worker are none of its business.
        command = self._command or [str(vllm_env.python()), "-P", str(_WORKER)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._threads),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            # One process: its threads are the ones we count.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # The worker must not find our packages where it looks for its own.
        environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, str(self._path), str(self._max_model_len), self._mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=self._path,
        )
        self.facts = self._answer()

    def _ask(self, line: str) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise UnavailableError("vLLM is not running")
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = ""
        if self._process is not None and self._process.stdout is not None:
            line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> UnavailableError:
        """What to raise where the process has ended; it may be started anew."""
        end = ""
        if self._log is not None:
            self._log.seek(0)
            end = "\n".join(self._log.read().splitlines()[-15:])
        self.close()
        return UnavailableError(f"vLLM has ended; the end of its log:\n{end}")
