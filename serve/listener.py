"""The address of the server, bound before anything heavy is loaded: problems show at once."""

from __future__ import annotations

import errno
import os
import socket
import stat

from qserve.serve.errors import StartupError
from qserve.serve.server_config import ServerConfig


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
        raise cannot_listen(config, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise cannot_listen(config, error) from None
    return listener


def address_of(config: ServerConfig, listener: socket.socket | None) -> str:
    """Where clients find the server: a URL, or the path of the Unix socket."""
    if listener is None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
    raise cannot_listen(config, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def cannot_listen(config: ServerConfig, error: OSError) -> StartupError:
    """The error to raise for what the system said."""
    place = config.uds if config.uds is not None else f"{config.host} port {config.port}"
    if error.errno == errno.EADDRINUSE:
        flag = "--uds" if config.uds is not None else "--port"
        return StartupError(
            f"{place} is in use by another program: stop that one, or choose another {flag}"
        )
    return StartupError(f"cannot listen on {place}: {error.strerror or error}")
