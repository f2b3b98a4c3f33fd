"""A real server on a loopback port, with a tiny model, inside the test process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from ponderttt.engine.async_engine import AsyncEngine
from ponderttt.engine.core import EngineCore
from server.app import create_app
from server.build import build_core
from server.runner import DrainingServer, base_url, bind
from server.settings import Settings

PROMPT = "def parse(text, separator=','):\n    parts = text.split(separator)\n    return"


@dataclass(frozen=True, slots=True)
class Live:
    """A server that is running."""

    url: str
    engine: AsyncEngine
    server: DrainingServer
    http: httpx.Client
    openai: openai.OpenAI

    @property
    def core(self) -> EngineCore:
        """Its engine; for facts that never change, and for injecting failures."""
        return self.engine.core

    @property
    def model(self) -> str:
        """Name of the served model."""
        return self.core.model_name

    def new_session(self, **options: Any) -> str:
        """A fresh session's id."""
        answer = self.http.post("/v1/sessions", json=options)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def session(self, name: str) -> dict[str, Any]:
        """A session's state."""
        state: dict[str, Any] = self.http.get(f"/v1/sessions/{name}").json()
        return state

    def adapt(self, name: str, *texts: str, **options: Any) -> dict[str, Any]:
        """Teach a session; its report."""
        documents = [{"path": f"{i}.py", "text": text} for i, text in enumerate(texts)]
        answer = self.http.post(
            f"/v1/sessions/{name}/adapt", json={"documents": documents, **options}
        )
        assert answer.status_code == 200, answer.text
        report: dict[str, Any] = answer.json()
        return report

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """All samples by name and labels."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 where it has never been counted."""
        return self.metrics().get((f"ponderttt_{name}", tuple(sorted(labels.items()))), 0.0)

    def wait_for(self, name: str, value: float, seconds: float = 10.0, **labels: str) -> None:
        """Wait until a sample reaches a value."""
        until = time.monotonic() + seconds
        while (seen := self.value(name, **labels)) != value:
            assert time.monotonic() < until, f"{name} is {seen}, not {value}"
            time.sleep(0.02)


@contextmanager
def live_server(directory: Path, **options: Any) -> Iterator[Live]:
    """Serve a checkpoint while the block runs.

    Args:
        directory: of the checkpoint.
        options: fields of `Settings` that differ from what suits a test.
    """
    given = {
        "sessions": "memory",
        "measure_costs": False,
        "drain_seconds": 1.0,
        "learning_rate": 0.01,
        **options,
    }
    settings = Settings(model=str(directory), **given)
    core = build_core(settings)
    engine = AsyncEngine(core)
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(engine, settings),
        log_level="error",
        lifespan="on",
        http="h11",
        loop="asyncio",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = DrainingServer(config, engine, settings.drain_seconds, lambda: None)
    url = base_url(sock)
    thread = threading.Thread(target=server.run, args=([sock],), name="server")
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server did not start in time"
            time.sleep(0.01)
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            openai.OpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60
            ) as client,
        ):
            yield Live(url, engine, server, http, client)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()
