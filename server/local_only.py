"""Keeping web pages away from a server that asks for no keys.

Only its own machine reaches such a server, but a browser runs there, too, and any page may send it
requests: from its own origin, or under a name of its own that it has come to resolve to this
machine (DNS rebinding). Other programs send neither header, or the server's own.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import status_response


class LocalOnly:
    """Middleware: answers 403 where Host or Origin name another machine than this one.

    Args:
        app: the application inside.
        host: that the server was told to listen on; a name that it may be called by.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            for name, netloc in (
                ("Host", headers.get("host", "localhost")),
                ("Origin", headers.get("origin", "localhost").rpartition("://")[2]),
            ):
                if not self._is_here(netloc):
                    message = (
                        f"{name} {netloc[:100]!r} is not this machine; this server has no keys and "
                        "answers to its own address only (localhost, 127.0.0.1). Give "
                        "--api-key-file FILE, or --allow-unauthenticated if something else keeps "
                        "strangers out"
                    )
                    await status_response(403, message)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_here(self, netloc: str) -> bool:
        try:
            name = (urlsplit(f"//{netloc}").hostname or "").lower()
        except ValueError:
            return False
        if name in ("localhost", self._host) or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
