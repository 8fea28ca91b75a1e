"""uvicorn behind a bound socket, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from qserve.serve.admission import SHUTTING_DOWN
from qserve.serve.app import create_app
from qserve.serve.errors import Overloaded
from qserve.serve.listener import cannot_listen
from qserve.serve.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Longer than the clients' pools keep a connection (httpx: 5 s), so that they, not we, close idle
# ones: a server that closes first makes a client lose a request now and then.
KEEP_ALIVE_S = 75
GRACE_S = 5  # for responses to be sent once nothing is generated any more


def serve(service: Service, listener: socket.socket | None, announce: Callable[[], None]) -> None:
    """Answer requests until a signal asks to stop.

    announce: called once requests are taken. Raises ``StartupError`` when another process took the
    port since ``listen``.
    """
    config = service.config
    settings = uvicorn.Config(
        create_app(service),
        uds=str(config.uds) if config.uds is not None else None,
        lifespan="on",
        ws="none",
        log_config=None,
        log_level=config.log_level,
        access_log=config.access_log,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = DrainingServer(settings, service, announce)
    try:
        server.run(sockets=None if listener is None else [listener])
    except OSError as error:
        raise cannot_listen(config, error) from error
    finally:
        if config.uds is not None:
            config.uds.unlink(missing_ok=True)


class DrainingServer(uvicorn.Server):
    """Ends in steps. The first SIGTERM or SIGINT: ``/health`` turns 503, new requests are refused,
    running ones may finish within ``shutdown_timeout_s``. The second: running ones are aborted.
    """

    def __init__(
        self, settings: uvicorn.Config, service: Service, announce: Callable[[], None]
    ) -> None:
        super().__init__(settings)
        self._service = service
        self._announce = announce
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Listen to the signals while the server runs; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._service.admission.drain()
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._abort()

    async def _drain(self) -> None:
        if await self._service.admission.empty(self._service.config.shutdown_timeout_s):
            self.should_exit = True
        else:
            self._abort()

    def _abort(self) -> None:
        self._service.bridge.fail_all(Overloaded(SHUTTING_DOWN))
        self.should_exit = True
