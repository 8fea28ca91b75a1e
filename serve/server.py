"""A listening socket, uvicorn behind it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator

import uvicorn

from qserve.serve.admission import SHUTTING_DOWN
from qserve.serve.app import create_app
from qserve.serve.errors import Overloaded, StartupError
from qserve.serve.server_config import ServerConfig
from qserve.serve.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Longer than the clients' pools keep a connection (httpx: 5 s), so that they, not we, close idle
# ones: a server that closes first makes a client lose a request now and then.
KEEP_ALIVE_S = 75
GRACE_S = 5  # for responses to be sent once nothing is generated any more


def listen(config: ServerConfig) -> socket.socket | None:
    """A bound socket, before the model is loaded: a port in use is known at once.

    None for a Unix socket, which is made later. Raises ``StartupError`` when the address is taken
    or not ours.
    """
    if config.uds is not None:
        _check_unix_socket(config)
        return None
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(config, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from None
    return listener


def address_of(config: ServerConfig, listener: socket.socket | None) -> str:
    """Where clients find the server: a URL, or the path of the Unix socket."""
    if listener is None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
        raise _cannot_listen(config, error) from error
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


def _check_unix_socket(config: ServerConfig) -> None:
    """Raise ``StartupError`` unless the path is free, or has a socket that nobody listens on."""
    assert config.uds is not None
    if not config.uds.exists():
        return
    if not stat.S_ISSOCK(config.uds.stat().st_mode):
        raise StartupError(f"{config.uds} exists and is not a socket: choose another --uds")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(config.uds))
        except OSError:
            return
    raise _cannot_listen(config, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def _cannot_listen(config: ServerConfig, error: OSError) -> StartupError:
    place = config.uds if config.uds is not None else f"{config.host} port {config.port}"
    if error.errno == errno.EADDRINUSE:
        flag = "--uds" if config.uds is not None else "--port"
        return StartupError(
            f"{place} is in use by another program: stop that one, or choose another {flag}"
        )
    return StartupError(f"cannot listen on {place}: {error.strerror or error}")
