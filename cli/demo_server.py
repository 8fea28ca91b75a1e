"""A `qserve serve` process for the length of a block, and the questions that the demo asks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from qserve.cli.errors import CommandError, ExitCode

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
LOG_LINES = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """A chat completion: its text, and the rate at which tokens came after the first."""

    text: str
    num_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class DemoServer:
    """A server that answers. Connections are direct: a proxy of the environment is not asked."""

    port: int

    @property
    def url(self) -> str:
        """What a client takes as its base URL."""
        return f"http://{HOST}:{self.port}/v1"

    def ask(self, question: str, max_tokens: int, ignore_eos: bool = False) -> Answer:
        """Stream one chat completion at temperature 0.

        Raises ``CommandError`` when the server answers with an error or stops answering.
        """
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            return self._stream(json.dumps(body))
        except (OSError, HTTPException) as error:
            raise CommandError(
                f"the server stopped answering ({error}): this is a bug in qserve", ExitCode.SERVE
            ) from error

    def is_healthy(self) -> bool:
        """Whether the server takes requests."""
        connection = HTTPConnection(HOST, self.port, timeout=POLL_S * 20)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _stream(self, body: str) -> Answer:
        connection = HTTPConnection(HOST, self.port, timeout=REQUEST_TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise CommandError(
                    f"the server answered {response.status}: {response.read().decode()}",
                    ExitCode.SERVE,
                )
            return _collect(_events(response))
        finally:
            connection.close()


def _events(lines: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in lines:
        data = line.decode().removeprefix("data:").strip()
        if data.startswith("{"):
            yield json.loads(data)


def _collect(events: Iterator[dict[str, Any]]) -> Answer:
    pieces: list[str] = []
    times: list[float] = []
    num_tokens = 0
    for event in events:
        if "error" in event:
            raise CommandError(f"the server failed: {event['error']}", ExitCode.SERVE)
        for choice in event.get("choices", ()):
            if content := choice.get("delta", {}).get("content"):
                pieces.append(content)
                times.append(time.monotonic())
        if usage := event.get("usage"):
            num_tokens = usage["completion_tokens"]
    duration_s = times[-1] - times[0] if times else 0.0
    rate = (num_tokens - 1) / duration_s if duration_s > 0 else 0.0
    return Answer("".join(pieces), num_tokens, rate)


@contextmanager
def running_server(folder: Path, port: int = 0) -> Iterator[DemoServer]:
    """Start `qserve serve` on the checkpoint in ``folder``, and stop it whatever happens.

    port: 0 takes a free one. Raises ``CommandError`` with the end of the server's own output when
    it dies or does not get ready.
    """
    server = DemoServer(port or _free_port())
    command = [sys.executable, "-m", "qserve.cli.main", "serve", str(folder)]
    command += ["--host", HOST, "--port", str(server.port), "--served-model-name", "demo"]
    # A key that guards the user's own server would lock the demo out of this one.
    environment = {name: value for name, value in os.environ.items() if name != "QSERVE_API_KEY"}
    with TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_healthy(server, process, log)
            yield server
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_until_healthy(
    server: DemoServer, process: subprocess.Popen[bytes], log: IO[bytes]
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not server.is_healthy():
        if process.poll() is not None:
            raise CommandError(
                f"the server ended with {process.returncode} before it was ready: {_tail(log)}",
                ExitCode.SERVE,
            )
        if time.monotonic() > deadline:
            raise CommandError(
                f"the server was not ready within {START_TIMEOUT_S:.0f} s: {_tail(log)}",
                ExitCode.SERVE,
            )
        time.sleep(POLL_S)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return " / ".join(lines[-LOG_LINES:]) or "it printed nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
