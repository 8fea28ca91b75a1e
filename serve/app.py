"""The HTTP application: routes, what surrounds them, and errors to bodies in one place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qserve.serve.bodies import BodyTooLarge
from qserve.serve.chat import ChatEndpoint
from qserve.serve.completions import CompletionEndpoint
from qserve.serve.errors import EngineDead, ModelNotFound, Overloaded, ServeError
from qserve.serve.middleware import Admitted, ApiKeys, HttpMetrics, RequestIds
from qserve.serve.protocol import cut
from qserve.serve.service import Service
from qserve.serve.streaming import ClientDisconnected, error_body
from qserve.serve.tokenization import TokenizerEndpoint

DISTRIBUTION = "qserve-llm"
HEALTH_PATHS = ("/health", "/v1/health", "/healthz", "/livez", "/readyz", "/ping")
CLIENT_LEFT = 499  # nobody reads it but the access log, where nginx made the number known
HTTP_ERROR_TYPES = {404: "NotFoundError", 405: "Method Not Allowed"}


def create_app(service: Service) -> ASGIApp:
    """The application of one service; its lifespan starts and stops the engine."""
    operations = Operations(service)
    app = Starlette(
        routes=[*_operation_routes(operations), *_model_routes(service)],
        exception_handlers=_error_handlers(service),
        lifespan=operations.lifespan,
    )
    app.router.redirect_slashes = False
    guarded: ASGIApp = app
    if service.config.api_keys:
        guarded = ApiKeys(guarded, service.config.api_keys)
    if service.config.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return RequestIds(HttpMetrics(guarded, service.metrics))


class Operations:
    """The routes that tell how the server is, and its start and end."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The time in which the engine runs."""
        self._service.bridge.start()
        try:
            yield
        finally:
            await self._service.bridge.stop()

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, 503 once the server drains or its engine has died."""
        if self._service.admission.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        if not self._service.bridge.alive:
            return JSONResponse({"status": "engine dead"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """The version of this program."""
        return JSONResponse({"version": version(DISTRIBUTION)})

    async def metrics(self, request: Request) -> Response:
        """Everything counted, for Prometheus."""
        return Response(self._service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """A card for each name the model is served under."""
        card = self._service.card
        return JSONResponse(
            {"object": "list", "data": [card.describe(name) for name in card.names]}
        )

    async def model(self, request: Request) -> Response:
        """One card. Raises ``ModelNotFound``."""
        name = request.path_params["name"]
        if name not in self._service.card.names:
            raise ModelNotFound(name)
        return JSONResponse(self._service.card.describe(name))


def _operation_routes(operations: Operations) -> list[Route]:
    return [
        *(Route(path, operations.health) for path in HEALTH_PATHS),
        Route("/version", operations.version),
        Route("/metrics", operations.metrics),
        Route("/v1/models", operations.models),
        Route("/v1/models/{name:path}", operations.model),
    ]


def _model_routes(service: Service) -> list[Route]:
    tokenizer = TokenizerEndpoint(service)
    endpoints: dict[str, Callable[[Request], Any]] = {
        "/v1/chat/completions": ChatEndpoint(service).create,
        "/v1/completions": CompletionEndpoint(service).create,
        "/tokenize": tokenizer.tokenize,
        "/detokenize": tokenizer.detokenize,
    }
    door = [Middleware(Admitted, service.admission)]
    return [
        Route(path, endpoint, methods=["POST"], middleware=door)
        for path, endpoint in endpoints.items()
    ]


def _error_handlers(service: Service) -> dict[Any, Callable[[Request, Exception], Response]]:
    def on_serve_error(request: Request, error: Exception) -> Response:
        """The body of an expected error, and what its kind tells a client in headers."""
        assert isinstance(error, ServeError)
        headers = {}
        if isinstance(error, Overloaded):
            service.metrics.reject("draining" if service.admission.draining else "queue")
            headers["retry-after"] = str(error.retry_after_s)
        elif isinstance(error, EngineDead):
            headers["x-should-retry"] = "false"
        elif isinstance(error, BodyTooLarge):
            headers["connection"] = "close"  # the rest of the body is not read
        return JSONResponse(error_body(error), status_code=error.status, headers=headers)

    return {
        ServeError: on_serve_error,
        HTTPException: on_http_error,
        ClientDisconnected: on_disconnect,
        ClientDisconnect: on_disconnect,
        Exception: on_bug,
    }


def on_http_error(request: Request, error: Exception) -> Response:
    """An unknown route or a wrong verb."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    asked = f"{request.method} {cut(request.url.path)}"
    message = f"{asked}: {error.detail}."
    if status == 404:
        message = f"There is no route {asked}; the completions are below /v1."
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"The route does not take {asked}: use {allowed}."
    body = {
        "message": message,
        "type": HTTP_ERROR_TYPES.get(status, "BadRequestError"),
        "param": None,
        "code": status,
    }
    return JSONResponse({"error": body}, status_code=status, headers=error.headers)


def on_disconnect(request: Request, error: Exception) -> Response:
    """The client has gone: the answer reaches nobody."""
    return Response(status_code=CLIENT_LEFT)


def on_bug(request: Request, error: Exception) -> Response:
    """What we did not foresee. The traceback goes to the log, never to the client."""
    return JSONResponse(
        error_body(ServeError("The server failed to answer; its log says why.")), status_code=500
    )
