"""What happens to requests before their route: an id, a count, a key, a door."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Iterable
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.serve.admission import Admission
from qserve.serve.errors import Unauthorized
from qserve.serve.metrics import Metrics
from qserve.serve.streaming import error_body

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")
OPEN_PATHS = frozenset(
    ("/health", "/v1/health", "/healthz", "/livez", "/readyz", "/ping", "/version", "/metrics")
)
KNOWN_PATHS = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize")
)

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Admitted:
    """Counts a route's requests as inside until their response has been sent in full."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Raises ``Overloaded`` while the server drains."""
        with self._admission.enter():
            await self._app(scope, receive, send)


class RequestIds:
    """Gives every request an id, the client's own if it sent a usable one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HttpMetrics:
    """Counts answered requests and their time, but for those of probes and scrapers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        status = 499  # the client left before there was an answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        start_s = time.monotonic()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            seconds = time.monotonic() - start_s
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.http(method, _handler(scope["path"]), status, seconds)


class ApiKeys:
    """Lets only requests with one of the keys through, except to routes that are open to all."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        if is_open or scope["method"] == "OPTIONS" or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = Unauthorized(
            "The request has no API key that this server knows: send it as "
            '"Authorization: Bearer KEY" or "x-api-key: KEY".'
        )
        headers = {"www-authenticate": "Bearer"}
        response = JSONResponse(error_body(error), status_code=error.status, headers=headers)
        await response(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [_digest(headers.get("x-api-key", ""))]
        if scheme.lower() == "bearer":
            given.append(_digest(token.strip()))
        # Every key is compared in full, so that the time says nothing about any of them.
        return any([hmac.compare_digest(one, key) for one in given for key in self._digests])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _handler(path: str) -> str:
    """The route of a path: a label must not take as many values as clients can think of."""
    if path in KNOWN_PATHS:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
