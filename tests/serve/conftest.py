"""What tests of the engine and of HTTP share: greedy tokens, a scripted engine, real processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qserve.serve.admission import Admission
from qserve.serve.app import create_app
from qserve.serve.bridge import Bridge, Outputs
from qserve.serve.engine import Engine
from qserve.serve.errors import EngineDead
from qserve.serve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    FinishReason,
    NewTokens,
    RequestFailed,
    SamplingParams,
    TokenLogprobs,
)
from qserve.serve.metrics import Metrics
from qserve.serve.sampling_defaults import SamplingDefaults
from qserve.serve.server_config import ServerConfig
from qserve.serve.service import ModelCard, Service
from qserve.serve.tokenizer import Tokenizer

EOS = 2
MAX_MODEL_LEN = 64
LISTENS = re.compile(r"serves .* at (http://\S+|unix:\S+)")
START_LIMIT_S = 60
Result = TypeVar("Result")


class ScriptedEngine:
    """An engine link that answers every request with the same tokens, at once.

    script: the tokens of the answer; the end-of-sequence token follows by itself.
    endless: give the script and never end. frame_size: tokens in one message.
    fails_after: messages before the request fails.
    holds: take requests and answer nothing. dead: refuse them.
    """

    def __init__(self) -> None:
        self.script: list[int] = []
        self.frame_size = 1
        self.fails_after: int | None = None
        self.holds = False
        self.endless = False
        self.dead = False
        self.added: list[AddRequest] = []
        self.aborted: list[str] = []
        self.running: set[str] = set()
        self._outputs: Outputs = lambda outputs: None

    def connect(self, outputs: Outputs) -> ScriptedEngine:
        self._outputs = outputs
        return self

    @property
    def alive(self) -> bool:
        return not self.dead

    @property
    def stats(self) -> EngineStats:
        return EngineStats(len(self.running), 0, 0.25, 3, 10, 20)

    @stats.setter
    def stats(self, value: EngineStats) -> None:
        raise AssertionError("nobody but the engine sets its stats")

    def start(self) -> None:
        pass

    def stop(self) -> bool:
        return True

    def submit(self, message: AddRequest | AbortRequest) -> None:
        """Answer a request from the script at once, unless told to hold it."""
        if self.dead:
            raise EngineDead("The engine is not running.")
        if isinstance(message, AbortRequest):
            self.aborted.append(message.request_id)
            self.running.discard(message.request_id)
            return
        self.added.append(message)
        self.running.add(message.request_id)
        if not self.holds:
            for output in self._answer(message):
                self._outputs([output])

    def _answer(self, request: AddRequest) -> Iterator[NewTokens | RequestFailed]:
        params = request.params
        tokens = [*self.script, EOS][: params.max_tokens]
        frames = [
            tokens[start : start + self.frame_size]
            for start in range(0, len(tokens), self.frame_size)
        ]
        for number, frame in enumerate(frames, start=1):
            if self.fails_after is not None and number > self.fails_after:
                self.running.discard(request.request_id)
                yield RequestFailed(request.request_id, "The engine could not compute this.")
                return
            reason = None
            if number == len(frames) and not self.endless:
                reason = FinishReason.STOP if frame[-1] == EOS else FinishReason.LENGTH
                self.running.discard(request.request_id)
            logprobs: tuple[TokenLogprobs, ...] = ()
            if params.num_logprobs is not None:
                logprobs = tuple(scripted_logprobs(token, params.num_logprobs) for token in frame)
            yield NewTokens(request.request_id, tuple(frame), logprobs, reason)


def scripted_logprobs(token_id: int, num_logprobs: int) -> TokenLogprobs:
    """The drawn token is second; the last of the candidates is impossible."""
    candidates = [(30, -0.5), (token_id, -1.0), (31, -2.0), (32, float("-inf"))]
    return TokenLogprobs(token_id, -1.0, tuple(candidates[:num_logprobs]))


@dataclass
class Stream:
    """A stream as a client sees it."""

    raw: str
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, response: httpx.Response) -> Stream:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        frames = response.text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""], response.text
        data = [frame for frame in frames[:-2] if not frame.startswith(":")]
        assert all(frame.startswith("data: ") for frame in data), response.text
        return cls(response.text, [json.loads(frame.removeprefix("data: ")) for frame in data])

    def choices(self, index: int = 0) -> list[dict[str, Any]]:
        """The choices with this index, in order."""
        return [
            choice
            for event in self.events
            for choice in event.get("choices", [])
            if choice["index"] == index
        ]

    def chat_text(self, index: int = 0) -> str:
        """The content of a chat stream."""
        return "".join(choice["delta"].get("content", "") for choice in self.choices(index))

    def text(self, index: int = 0) -> str:
        """The text of a completion stream."""
        return "".join(choice["text"] for choice in self.choices(index))


class AppClient:
    """Talks to an application in this process; every call is an event loop of its own."""

    def __init__(self, service: Service, engine: ScriptedEngine) -> None:
        self.service = service
        self.engine = engine
        self.app = create_app(service)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Result]]) -> Result:
        """The result of ``work`` with a client, while the application is up."""

        async def up() -> Result:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            self.service.bridge.start()
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await work(client)

        return asyncio.run(up())

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request."""
        return self.run(lambda client: client.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.request("POST", path, **options)

    def chat(self, **fields: Any) -> httpx.Response:
        """A chat request with one short message."""
        fields.setdefault("messages", [{"role": "user", "content": "Hello"}])
        return self.post("/v1/chat/completions", fields)

    def complete(self, **fields: Any) -> httpx.Response:
        """A text completion of a short prompt."""
        fields.setdefault("prompt", "The harbour")
        return self.post("/v1/completions", fields)

    def says(self, text: str) -> AppClient:
        """Let the engine answer with this text from now on."""
        self.engine.script = list(self.service.tokenizer.encode(text, False))
        return self

    def params(self) -> Any:
        """The sampling parameters of the last request that reached the engine."""
        return self.engine.added[-1].params


def refused(response: httpx.Response, status: int, param: str | None) -> str:
    """The message of an error body, after checking its shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, status), error
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    return str(error["message"])


class ServerProcess:
    """`qserve serve` as users run it; use as a context manager."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.log: list[str] = []
        self.url = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qserve.cli.main", "serve", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "QSERVE_WEIGHT_CACHE": "off", **(environment or {})},
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := LISTENS.search(line):
                self.url = found.group(1)
            if "curl" in line:
                self._ready.set()
        self._ready.set()  # it has died

    def wait_until_ready(self) -> ServerProcess:
        self._ready.wait(START_LIMIT_S)
        assert self.url, f"the server did not start:\n{''.join(self.log)}"
        return self

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """The exit code, once the process has ended by itself."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = httpx.get(f"{self.url}/metrics").text
        samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"qserve:{name}" and labels.items() <= sample.labels.items()
        ]
        return sum(float(sample.value) for sample in samples)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., ServerProcess]:
    """``with start_server(MODEL, "--port", "0") as server`` runs the command in a process."""
    return ServerProcess


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer(tiny_llama)


MakeClient = Callable[..., AppClient]


@pytest.fixture
def make_client(tokenizer: Tokenizer) -> MakeClient:
    """``make_client(api_keys=("k",))`` gives a client of an application with this configuration."""

    def make(
        defaults: SamplingDefaults | None = None,
        max_sequences: int | None = None,
        tokenizer: Tokenizer = tokenizer,
        **config: Any,
    ) -> AppClient:
        """A client; config: other fields of ``ServerConfig``, and the names of the model."""
        engine = ScriptedEngine()
        bridge = Bridge(engine.connect, max_sequences)
        names = config.pop("served_model_names", ("tiny", "org/tiny-alias"))
        card = ModelCard(names, "tiny", MAX_MODEL_LEN, 512, "qserve-test", int(time.time()))
        settings = ServerConfig(**config)
        prefix = settings.metrics_prefix
        metrics = Metrics(prefix, names[0], MAX_MODEL_LEN, lambda: bridge.stats)
        service = Service(
            settings,
            card,
            tokenizer,
            defaults or SamplingDefaults(),
            bridge,
            metrics,
            Admission(),
        )
        return AppClient(service, engine).says("Paris is the capital.")

    return make


@pytest.fixture
def client(make_client: MakeClient) -> AppClient:
    """A client of an application with the default configuration."""
    return make_client()


@pytest.fixture
def read_stream() -> Callable[[httpx.Response], Stream]:
    """Reads the frames of a stream and checks their form."""
    return Stream.read


@pytest.fixture
def message_of() -> Callable[[httpx.Response, int, str | None], str]:
    """``message_of(response, 400, "n")`` checks an error body and gives its message."""
    return refused


@pytest.fixture(scope="session")
def generate() -> Callable[..., list[tuple[int, ...]]]:
    """Gives the tokens after each of some prompts, which an engine is handed all at once.

    Called with the engine, the prompts and ``num_tokens``; greedy unless other parameters of
    sampling are given by name.
    """

    def tokens_after(
        engine: Engine, prompts: list[tuple[int, ...]], num_tokens: int, **params: Any
    ) -> list[tuple[int, ...]]:
        """A tuple of tokens for each prompt, in order."""
        greedy = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        settings = SamplingParams(**(greedy | params))
        for i, prompt in enumerate(prompts):
            engine.add(AddRequest(str(i), prompt, settings, 0.0))
        found: dict[str, tuple[int, ...]] = {}
        while engine.has_work():
            for output in engine.step():
                assert isinstance(output, NewTokens), output
                found[output.request_id] = found.get(output.request_id, ()) + output.token_ids
        return [found[str(i)] for i in range(len(prompts))]

    return tokens_after
