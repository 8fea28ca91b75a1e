"""How the server begins and ends: its address, its keys, the signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

SERVE_ERROR = 6  # the exit code of cli.errors.ExitCode.SERVE


@pytest.fixture(scope="module")
def long_llama(make_tiny_llama: Any) -> str:
    """A model whose answers are long enough to be interrupted."""
    return str(make_tiny_llama(max_position_embeddings=32768))


class Reader:
    """Reads a stream in a thread, as a client of its own."""

    def __init__(self, client: httpx.Client, **fields: Any) -> None:
        self.body = {"prompt": "The", "ignore_eos": True, "stream": True} | fields
        self.events: list[dict[str, Any]] = []
        self.started = threading.Event()
        self.done = False
        self.thread = threading.Thread(target=self._read, args=(client,), daemon=True)
        self.thread.start()
        assert self.started.wait(30)

    def _read(self, client: httpx.Client) -> None:
        with client.stream("POST", "/v1/completions", json=self.body) as response:
            for line in response.iter_lines():
                self.started.set()
                if line == "data: [DONE]":
                    self.done = True
                elif line:
                    self.events.append(json.loads(line.removeprefix("data: ")))

    def finish(self) -> list[dict[str, Any]]:
        self.thread.join(30)
        assert self.done
        return self.events


def test_sigterm_lets_running_requests_finish_and_a_second_one_does_not(
    start_server: Any, long_llama: str
) -> None:
    with start_server(long_llama, "--port", "0", "--threads", "1") as server:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, timeout=30) as client:
            short = Reader(client, max_tokens=400)
            endless = Reader(client, max_tokens=32000)
            server.signal(signal.SIGTERM)
            wait_for_status(client, "/health", 503)
            refused = client.post("/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503 and "retry-after" in refused.headers
            last = short.finish()[-1]
            assert last["choices"][0]["finish_reason"] == "length"
            assert server.process.poll() is None  # the endless one still runs
            server.signal(signal.SIGTERM)
            assert endless.finish()[-1]["error"]["code"] == 503
        assert server.wait(10) == 0
        assert "Traceback" not in "".join(server.log)


def wait_for_status(client: httpx.Client, path: str, status: int) -> None:
    deadline_s = time.monotonic() + 5
    while client.get(path).status_code != status:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_port_in_use_is_told_in_one_line(start_server: Any, tiny_llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with start_server(str(tiny_llama), "--port", port) as server:
            assert server.wait(30) == SERVE_ERROR
    [line] = server.log
    assert re.fullmatch(rf"error: 127.0.0.1 port {port} is in use .*--port\n", line)


def test_a_unix_socket_with_keys_of_the_environment_and_a_bounded_shutdown(
    start_server: Any, long_llama: str, tmp_path: Path
) -> None:
    path = tmp_path / "api.sock"
    options = ["--uds", str(path), "--threads", "1", "--shutdown-timeout", "0.2"]
    options += ["--tensor-parallel-size", "2", "--max_model_len=16K"]
    transport = httpx.HTTPTransport(uds=str(path))
    with (
        start_server(long_llama, *options, environment={"QSERVE_API_KEY": "one two"}) as server,
        httpx.Client(transport=transport, base_url="http://localhost", timeout=30) as client,
    ):
        server.wait_until_ready()
        assert server.url == f"unix:{path}"
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer two"
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 2**14
        endless = Reader(client, max_tokens=16000)
        server.signal(signal.SIGINT)
        assert endless.finish()[-1]["error"]["code"] == 503
        assert server.wait(30) == 0  # 0.2 s, then at most 5 for replies and 10 for the engine
    assert not path.exists()
    assert any(
        "--tensor-parallel-size is accepted and has no effect" in line for line in server.log
    )
