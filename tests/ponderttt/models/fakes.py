"""A package index and a hub on this machine, for tests."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ponderttt.errors import ModelError
from ponderttt.models.embedded import EmbeddedModel, HubFile, WheelPart

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def model_of(pieces: list[bytes], name: str = "tiny", hub: HubFile | None = None) -> EmbeddedModel:
    """An embedded model whose file is cut into these pieces."""
    whole = b"".join(pieces)
    return EmbeddedModel(
        name=name,
        parameters=1000,
        licence="Apache-2.0",
        description="for tests",
        size=len(whole),
        sha256=sha256(whole),
        hub=hub,
        parts=tuple(
            WheelPart(f"piece-{n}==1.0", f"piece_{n}/data.bin", len(piece), sha256(piece))
            for n, piece in enumerate(pieces, start=1)
        ),
    )


def write_wheel(path: Path, member: str, data: bytes) -> Path:
    """A zip file with one compressed member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
    return path


class FakeIndex:
    """Serves a model's pieces as wheels, counts what is asked for, and can be made to misbehave.

    Attributes:
        asked: requirements in the order they were asked for.
        damage: for a requirement, the wheels to give instead, one for each time it is asked.
        broken: requirements for which the index is out of reach.
    """

    def __init__(self, model: EmbeddedModel, pieces: list[bytes]) -> None:
        self._wheels = {
            part.requirement: (part.member, piece)
            for part, piece in zip(model.parts, pieces, strict=True)
        }
        self.asked: list[str] = []
        self.damage: dict[str, list[bytes]] = {}
        self.broken: set[str] = set()

    def __call__(self, requirement: str, directory: Path, *, progress: bool) -> Path:
        self.asked.append(requirement)
        if requirement in self.broken:
            raise ModelError(f"no route to {requirement}")
        path = directory / "piece.whl"
        if waiting := self.damage.get(requirement):
            path.write_bytes(waiting.pop(0))
            return path
        return write_wheel(path, *self._wheels[requirement])


def no_hub(repository: str, filename: str, directory: Path, *, progress: bool) -> Path:
    """A hub that is out of reach."""
    raise ModelError("the hub is out of reach (no such host)")


class _HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client asks for when it fetches a model."""

    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Tests look at `FakeHub.requests` instead."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        hub = self.server
        hub.requests.append((self.command, path))
        model = f"/api/models/{hub.repository}"
        if path == "/":
            self._send(b"", with_body)
        elif path in (f"{model}/revision/main", model):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"id": hub.repository, "sha": COMMIT, "siblings": siblings}, with_body)
        elif path == f"{model}/tree/{COMMIT}":
            self._json([hub.entry(name) for name in hub.files], with_body)
        elif path.startswith(f"/{hub.repository}/resolve/"):
            name = path.removeprefix(f"/{hub.repository}/resolve/").partition("/")[2]
            data = hub.files[name]
            headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT}
            self._send(data, with_body, headers)
        else:
            self._send(b"{}", with_body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def _json(self, value: object, with_body: bool) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(json.dumps(value).encode(), with_body, headers)

    def _send(
        self,
        data: bytes,
        with_body: bool,
        headers: dict[str, str] | None = None,
        status: int = 200,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


class FakeHub(ThreadingHTTPServer):
    """A hub with one repository, on a loopback port.

    Attributes:
        requests: method and path of everything asked for.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.repository = repository
        self.files = files
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entry(self, name: str) -> dict[str, object]:
        """A file as the hub lists it."""
        data = self.files[name]
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were sent."""
        start = f"/{self.repository}/resolve/"
        return {
            path.removeprefix(start).partition("/")[2]
            for method, path in self.requests
            if method == "GET" and path.startswith(start)
        }


@contextmanager
def running_hub(repository: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    """A hub that answers while the block runs."""
    with FakeHub(repository, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
