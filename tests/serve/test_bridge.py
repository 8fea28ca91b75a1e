"""The bridge: outputs find their request, limits hold, an abort reaches the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qserve.serve.bridge import Bridge
from qserve.serve.errors import BadRequest, EngineDead, Overloaded, ServeError
from qserve.serve.messages import (
    AddRequest,
    FinishReason,
    NewTokens,
    RequestFailed,
    SamplingParams,
)


def request(name: str) -> AddRequest:
    return AddRequest(name, (5,), SamplingParams(max_tokens=4), 0.0)


def end(name: str, token: int = 9) -> NewTokens:
    return NewTokens(name, (token,), finish_reason=FinishReason.STOP)


def run(
    engine: Any, work: Callable[[Bridge], Awaitable[None]], max_sequences: int | None = None
) -> None:
    async def up() -> None:
        bridge = Bridge(engine.connect, max_sequences)
        bridge.start()
        await work(bridge)

    engine.holds = True
    asyncio.run(up())


@pytest.fixture
def engine(client: Any) -> Any:
    """A scripted engine that waits to be told what to say."""
    return type(client.engine)()


async def collect(submission: Any) -> list[tuple[int, tuple[int, ...]]]:
    return [(index, new.token_ids) async for index, new in submission.outputs()]


def test_outputs_find_the_request_they_are_for(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        first = bridge.submit([request("a"), request("b")])
        second = bridge.submit([request("c")])
        engine._outputs([NewTokens("b", (1,)), NewTokens("c", (2,)), end("a")])
        engine._outputs([end("c", 3), end("b", 4)])
        assert await collect(first) == [(1, (1,)), (0, (9,)), (1, (4,))]
        assert await collect(second) == [(0, (2,)), (0, (3,))]

    run(engine, work)


def test_outputs_may_come_from_another_thread(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        submission = bridge.submit([request("a")])
        await asyncio.to_thread(engine._outputs, [end("a")])
        assert await asyncio.wait_for(collect(submission), 5) == [(0, (9,))]

    run(engine, work)


def test_a_failure_ends_the_whole_submission(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        submission = bridge.submit([request("a"), request("b")])
        engine._outputs([RequestFailed("a", "no memory")])
        with pytest.raises(ServeError, match="no memory"):
            await collect(submission)
        submission.abort()
        assert engine.aborted == ["b"]

    run(engine, work)


def test_nothing_is_delivered_after_an_abort(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        submission = bridge.submit([request("a"), request("b")])
        engine._outputs([NewTokens("a", (1,))])
        submission.abort(0)
        engine._outputs([NewTokens("a", (2,)), end("b")])
        assert await collect(submission) == [(1, (9,))]
        submission.abort()
        assert engine.aborted == ["a"]

    run(engine, work)


def test_a_full_queue_takes_nobody_until_there_is_room(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        first = bridge.submit([request("a"), request("b")])
        with pytest.raises(Overloaded):
            bridge.submit([request("c"), request("d")])
        assert len(engine.added) == 2  # not even the one that would have had room
        first.abort(1)
        assert await collect_one(first, engine)
        bridge.submit([request("e"), request("f"), request("g")])

    async def collect_one(submission: Any, engine: Any) -> bool:
        engine._outputs([end("a")])
        return await collect(submission) == [(0, (9,))]

    run(engine, work, max_sequences=3)


def test_more_sequences_than_ever_fit_are_the_request_s_fault(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        with pytest.raises(BadRequest, match="4 sequences"):
            bridge.submit([request(name) for name in "abcd"])

    run(engine, work, max_sequences=3)


def test_a_request_that_the_engine_refuses_leaves_nothing_behind(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.submit

    def refuse_b(message: Any) -> None:
        if isinstance(message, AddRequest) and message.request_id == "b":
            raise BadRequest("no", "prompt")
        submit(message)

    monkeypatch.setattr(engine, "submit", refuse_b)

    async def work(bridge: Bridge) -> None:
        with pytest.raises(BadRequest):
            bridge.submit([request("a"), request("b")])
        assert engine.running == set()
        bridge.submit([request("x"), request("y")])

    run(engine, work, max_sequences=2)


def test_a_dead_engine_can_be_left_without_a_fuss(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        submission = bridge.submit([request("a")])
        engine.dead = True
        submission.abort()
        with pytest.raises(EngineDead):
            bridge.submit([request("b")])
        assert not bridge.alive

    run(engine, work)


def test_all_can_be_ended_with_one_error(engine: Any) -> None:
    async def work(bridge: Bridge) -> None:
        submissions = [bridge.submit([request(name)]) for name in "ab"]
        bridge.fail_all(Overloaded("closing"))
        for submission in submissions:
            with pytest.raises(Overloaded):
                await collect(submission)
        assert sorted(engine.aborted) == ["a", "b"]

    run(engine, work)
