"""A real vLLM server as a process of its own, to be started, killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from ponderttt.bench import vllm_env
from server.runner import bind

# Half a minute by itself; 170 s were seen on a machine that others kept busy.
_START_SECONDS = 600.0


class RealVllm:
    """vLLM in the environment that `ponderttt.bench.vllm_env` makes.

    Args:
        model: directory of the checkpoint.
        log: file that its output goes to.
    """

    def __init__(self, model: Path, log: Path) -> None:
        with bind("127.0.0.1", 0) as sock:
            self._port = sock.getsockname()[1]
        self._model, self._log = model, log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self, *flags: str) -> None:
        """Start it with these further flags and wait until it serves."""
        assert self._process is None, "it runs already"
        command: Sequence[str] = (
            str(vllm_env.python()), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self._model), "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "1024", "--host", "127.0.0.1", "--port", str(self._port), *flags,
        )  # fmt: skip
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # Its packages are not ours.
        environment.pop("PYTHONPATH", None)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._log.parent,
                # It has children; all of them are to be ended.
                start_new_session=True,
            )
        self._wait()

    def generated(self) -> int:
        """Tokens that it has generated since it started."""
        text = httpx.get(f"{self.url}/metrics", timeout=5).text
        samples = re.findall(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)", text, re.M)
        assert samples, "vLLM exports no count of tokens"
        return round(sum(map(float, samples)))

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _wait(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            assert self._process is not None
            assert self._process.poll() is None, f"vLLM has ended; {self._end_of_log()}"
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"vLLM does not start; {self._end_of_log()}")

    def _end_of_log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(["the end of its log:", *lines[-30:]])
