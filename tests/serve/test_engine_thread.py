"""The engine's thread: it answers, survives failures, and stops in bounded time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import cast

import pytest
import torch

from qserve.serve.config import EngineConfig
from qserve.serve.engine import Engine, Output
from qserve.serve.engine_thread import EngineThread
from qserve.serve.errors import BadRequest, EngineDead, ServeError
from qserve.serve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    FinishReason,
    NewTokens,
    RequestFailed,
    SamplingParams,
)

TIMEOUT_S = 10.0


class StubEngine:
    """Gives every request ``max_tokens`` tokens, one a step, and does what a test tells it."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.num_steps = 0
        self.error: Exception | None = None
        self.gate = threading.Event()  # cleared: the step hangs
        self.gate.set()
        self.stepping = threading.Event()
        self.num_threads: int | None = None

    def check(self, request: AddRequest) -> None:
        if not request.prompt_token_ids:
            raise BadRequest("no tokens", "prompt")

    def add(self, request: AddRequest) -> None:
        if request.request_id in self.left:
            raise BadRequest("in use")
        self.left[request.request_id] = request.params.max_tokens

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Output]:
        self.stepping.set()
        self.gate.wait(TIMEOUT_S)
        self.num_steps += 1
        self.num_threads = torch.get_num_threads()
        if self.error:
            error, self.error = self.error, None
            raise error
        outputs: list[Output] = []
        for name in list(self.left):
            self.left[name] -= 1
            done = not self.left[name]
            outputs.append(
                NewTokens(name, (7,), finish_reason=FinishReason.LENGTH if done else None)
            )
            if done:
                del self.left[name]
        return outputs

    def fail_all(self, error: Exception) -> list[Output]:
        failed: list[Output] = [RequestFailed(name, str(error)) for name in self.left]
        self.left.clear()
        return failed

    def stats(self) -> EngineStats:
        return EngineStats(len(self.left), 0, 0.0, 0, 0, self.num_steps)


class Receiver:
    """Collects outputs, and waits for them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Output] = SimpleQueue()
        self.error: Exception | None = None

    def __call__(self, outputs: list[Output]) -> None:
        assert outputs
        for output in outputs:
            self._queue.put(output)
        if self.error:
            error, self.error = self.error, None
            raise error

    def next(self) -> Output:
        return self._queue.get(timeout=TIMEOUT_S)

    def until_finished(self, *names: str) -> dict[str, Output]:
        """The last output of each of these requests."""
        last: dict[str, Output] = {}
        while set(last) != set(names):
            output = self.next()
            if isinstance(output, RequestFailed) or output.finish_reason:
                last[output.request_id] = output
        return last

    def is_empty(self) -> bool:
        return self._queue.empty()


Run = Callable[[StubEngine], tuple[EngineThread, Receiver]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts a thread around an engine; it is stopped when the test is over."""
    started: list[tuple[EngineThread, StubEngine]] = []

    def start(engine: StubEngine) -> tuple[EngineThread, Receiver]:
        receiver = Receiver()
        thread = EngineThread(cast(Engine, engine), receiver)
        thread.start()
        started.append((thread, engine))
        return thread, receiver

    yield start
    for thread, engine in started:
        engine.gate.set()
        assert thread.stop(TIMEOUT_S)


def request(name: str, prompt: tuple[int, ...] = (1,), max_tokens: int = 3) -> AddRequest:
    return AddRequest(name, prompt, SamplingParams(max_tokens=max_tokens), 0.0)


def test_a_request_is_answered(run: Run) -> None:
    thread, receiver = run(StubEngine())
    thread.submit(request("a"))
    assert receiver.next() == NewTokens("a", (7,))
    assert receiver.until_finished("a") == {
        "a": NewTokens("a", (7,), finish_reason=FinishReason.LENGTH)
    }


def test_requests_from_many_threads_are_all_answered(run: Run) -> None:
    thread, receiver = run(StubEngine())
    names = [str(i) for i in range(40)]
    senders = [threading.Thread(target=thread.submit, args=(request(n),)) for n in names]
    for sender in senders:
        sender.start()
    assert set(receiver.until_finished(*names)) == set(names)
    for sender in senders:
        sender.join()


def test_an_idle_engine_does_not_step_and_takes_no_time(run: Run) -> None:
    engine = StubEngine()
    thread, receiver = run(engine)
    thread.submit(request("a"))
    receiver.until_finished("a")
    before = engine.num_steps, time.process_time()
    time.sleep(0.3)
    assert engine.num_steps == before[0]
    assert time.process_time() - before[1] < 0.1


def test_an_aborted_request_is_forgotten(run: Run) -> None:
    engine = StubEngine()
    engine.gate.clear()
    thread, receiver = run(engine)
    thread.submit(request("a", max_tokens=1000))
    thread.submit(request("b"))
    thread.submit(AbortRequest("a"))
    engine.gate.set()
    receiver.until_finished("b")
    assert "a" not in engine.left


def test_a_failing_step_fails_the_requests_and_the_thread_lives_on(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    engine = StubEngine()
    engine.error = RuntimeError("boom")
    thread, receiver = run(engine)
    with caplog.at_level(logging.CRITICAL):
        thread.submit(request("a"))
        assert receiver.next() == RequestFailed("a", "boom")
        thread.submit(request("b"))
        assert isinstance(receiver.until_finished("b")["b"], NewTokens)
    assert thread.alive


def test_a_failing_receiver_does_not_stop_the_engine(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    thread, receiver = run(StubEngine())
    receiver.error = RuntimeError("the loop is closed")
    with caplog.at_level(logging.CRITICAL):
        thread.submit(request("a"))
        receiver.until_finished("a")
    assert thread.alive


def test_a_request_that_cannot_be_computed_is_refused_at_once(run: Run) -> None:
    thread, receiver = run(StubEngine())
    with pytest.raises(BadRequest):
        thread.submit(request("a", prompt=()))
    assert receiver.is_empty()


def test_a_request_that_the_engine_refuses_later_fails(run: Run) -> None:
    engine = StubEngine()
    thread, receiver = run(engine)
    engine.left["a"] = 1_000_000
    thread.submit(request("a"))
    while not isinstance(output := receiver.next(), RequestFailed):
        pass
    assert output == RequestFailed("a", "in use")


def test_stopping_fails_what_is_unfinished(run: Run) -> None:
    thread, receiver = run(StubEngine())
    thread.submit(request("a", max_tokens=10**9))
    receiver.next()
    assert thread.stop(TIMEOUT_S)
    failed = receiver.until_finished("a")["a"]
    assert isinstance(failed, RequestFailed)
    assert not thread.alive


def test_a_stopped_engine_refuses_messages(run: Run) -> None:
    thread, _ = run(StubEngine())
    thread.stop(TIMEOUT_S)
    with pytest.raises(EngineDead):
        thread.submit(request("a"))


def test_an_engine_that_has_not_started_refuses_messages_and_stops() -> None:
    thread = EngineThread(cast(Engine, StubEngine()), Receiver())
    with pytest.raises(ServeError):
        thread.submit(request("a"))
    assert thread.stop(0.1)


def test_stopping_does_not_wait_for_a_step_that_hangs(run: Run) -> None:
    engine = StubEngine()
    engine.gate.clear()
    thread, _ = run(engine)
    thread.submit(request("a"))
    assert engine.stepping.wait(TIMEOUT_S)
    start = time.monotonic()
    assert not thread.stop(timeout_s=0.2)
    assert time.monotonic() - start < 2.0


def test_stopping_twice_is_harmless(run: Run) -> None:
    thread, _ = run(StubEngine())
    assert thread.stop(TIMEOUT_S)
    assert thread.stop(TIMEOUT_S)


def test_stats_are_those_after_the_last_step(run: Run) -> None:
    thread, receiver = run(StubEngine())
    thread.submit(request("a"))
    receiver.until_finished("a")
    assert thread.stop(TIMEOUT_S)
    assert thread.stats == EngineStats(0, 0, 0.0, 0, 0, 3)


def test_torch_has_one_thread_while_the_engine_steps(run: Run) -> None:
    engine = StubEngine()
    thread, receiver = run(engine)
    thread.submit(request("a"))
    receiver.until_finished("a")
    assert engine.num_threads == 1


def test_a_real_engine_answers_some_and_forgets_the_others(tiny_llama: Path) -> None:
    engine = Engine.from_checkpoint(tiny_llama, EngineConfig(max_model_len=128, max_num_seqs=4))
    receiver = Receiver()
    thread = EngineThread(engine, receiver)
    thread.start()
    names = [str(i) for i in range(24)]
    for name in names:
        params = SamplingParams(max_tokens=1000 if int(name) % 3 == 0 else 20, ignore_eos=True)
        thread.submit(AddRequest(name, (5, 6, 7 + int(name)), params, 0.0))
    left = names[::3]  # would go on to the end of the context
    for name in left:
        thread.submit(AbortRequest(name))
    receiver.until_finished(*(name for name in names if name not in left))
    assert thread.stop(TIMEOUT_S)
    assert thread.stats.kv_usage == 0.0
    assert (thread.stats.num_running, thread.stats.num_waiting) == (0, 0)
    assert thread.stats.generation_tokens >= 16 * 20
