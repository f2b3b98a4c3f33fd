"""Who may come in: bearer tokens, checked before a request's body is read."""

from __future__ import annotations

import ipaddress
import socket

from starlette.types import ASGIApp, Receive, Scope, Send

from ponderttt.errors import PonderError
from server import keys
from server.errors import status_response
from server.keys import ApiKey, KeyRing, bearer_token
from server.settings import Settings

#: What load balancers and people without a key may see.
OPEN = frozenset({"/", "/health", "/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json"})

_SCOPES: dict[str, keys.Scope] = {"/metrics": "metrics"}


class Authentication:
    """Middleware: answers 401 without a key of the ring, 403 where the key's scope is too small.

    Leaves the key in `scope["state"]["key"]`.

    Args:
        app: the application inside.
        ring: the keys; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing | None) -> None:
        self._app = app
        self._ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        state["key"] = None
        if self._ring is not None and scope["path"] not in OPEN:
            key = self._key(self._ring, scope)
            state["key"] = key
            state["record"].key_id = key.id if key is not None else None
            wanted = _SCOPES.get(scope["path"], "completions")
            if key is None or not key.may(wanted):
                response = _unknown(scope) if key is None else _too_small(key, wanted)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _key(self, ring: KeyRing, scope: Scope) -> ApiKey | None:
        token = bearer_token(scope["headers"])
        return ring.find(token) if token is not None else None


def _unknown(scope: Scope) -> ASGIApp:
    given = sum(name == b"authorization" for name, _ in scope["headers"])
    message = {
        0: "this server needs an API key; send the header 'Authorization: Bearer KEY'",
        1: "the API key is not known here, or the header is not of the form "
        "'Authorization: Bearer KEY'",
    }.get(given, f"{given} headers Authorization; send one, 'Authorization: Bearer KEY'")
    challenge = 'Bearer realm="ponderttt"' + (', error="invalid_token"' if given else "")
    return status_response(401, message, {"WWW-Authenticate": challenge})


def _too_small(key: ApiKey, wanted: keys.Scope) -> ASGIApp:
    message = f"the API key {key.id!r} has no scope {wanted!r}; its owner can add it to the file"
    challenge = f'Bearer realm="ponderttt", error="insufficient_scope", scope="{wanted}"'
    return status_response(403, message, {"WWW-Authenticate": challenge})


def check_exposure(sock: socket.socket, settings: Settings) -> None:
    """Refuse to serve without keys on an address that others can reach.

    Args:
        sock: bound.
        settings: whether there are keys, or leave to go without.
    Raises:
        PonderError: says what to do.
    """
    if settings.api_key_file is not None or settings.allow_unauthenticated:
        return
    host = str(sock.getsockname()[0])
    if not ipaddress.ip_address(host).is_loopback:
        raise PonderError(
            f"host: {host} can be reached from other machines, and anybody there could read and "
            "change every session. Give --api-key-file FILE (`ponderttt keys new --id NAME` prints "
            "what belongs in it), or listen on 127.0.0.1, or say --allow-unauthenticated if "
            "something else keeps strangers out"
        )
