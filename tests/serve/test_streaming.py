"""Event streams and clients that leave, on the level of ASGI messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from qserve.serve.streaming import (
    ClientDisconnected,
    EventStream,
    keep_alive,
    unless_disconnected,
)

Events = AsyncGenerator[dict[str, Any], None]
LIMIT_S = 5


async def never() -> Any:
    await asyncio.Event().wait()


async def leaves_at_once() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def asgi(
    app: Any, path: str, body: object, gone: asyncio.Event
) -> tuple[Awaitable[None], list[Any]]:
    """A POST on the level of ASGI, whose client leaves when ``gone`` is set; what was sent."""
    sent: list[Any] = []
    raw = json.dumps(body).encode()
    pending = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Any:
        if pending:
            return pending.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("test", 80),
    }  # fmt: skip
    return app(scope, receive, send), sent


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_frees_everything(client: Any, path: str, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": ["a", "b"], "n": 2}
    client.engine.holds = True

    async def work() -> None:
        client.service.bridge.start()
        gone = asyncio.Event()
        call, sent = asgi(client.app, path, body | {"stream": stream}, gone)
        running = asyncio.ensure_future(call)
        await until(lambda: client.engine.running)
        if stream:
            await until(lambda: sent)
        gone.set()
        await asyncio.wait_for(running, LIMIT_S)
        assert client.engine.running == set()

    asyncio.run(work())
    assert len(client.engine.aborted) == len(client.engine.added) >= 2
    metrics = client.get("/metrics").text
    labels = 'engine="0",finished_reason="abort",model_name="tiny"'
    assert f"qserve:request_success_total{{{labels}}} {len(client.engine.added)}.0" in metrics
    assert client.service.admission._num_inside == 0


def test_a_client_that_left_before_the_first_frame_frees_everything() -> None:
    closed = []

    async def events() -> Events:
        yield {"never": "sent"}

    async def work() -> None:
        response = EventStream(events(), lambda: closed.append(True))
        await response({"type": "http"}, leaves_at_once, lambda message: never())

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    assert closed == [True]


def test_a_failing_generator_ends_the_stream_in_good_form() -> None:
    sent: list[Any] = []

    async def events() -> Events:
        yield {"a": "ü"}
        raise RuntimeError("secret")

    async def send(message: Any) -> None:
        sent.append(message)

    response = EventStream(events(), lambda: None)
    asyncio.run(response({"type": "http"}, never, send))
    body = b"".join(message.get("body", b"") for message in sent).decode()
    first, error, done, rest = body.split("\n\n")
    assert (first, done, rest) == ('data: {"a":"ü"}', "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
    assert "secret" not in body
    assert sent[-1]["more_body"] is False


def test_silence_is_filled_with_comments() -> None:
    async def events() -> Events:
        yield {"n": 1}
        await asyncio.sleep(0.1)
        yield {"n": 2}

    async def work() -> list[Any]:
        return [event async for event in keep_alive(events(), 0.02)]

    found = asyncio.run(work())
    assert [event for event in found if event] == [{"n": 1}, {"n": 2}]
    assert found[0] == {"n": 1} and found[-1] == {"n": 2} and found.count(None) >= 2


def test_comments_do_not_disturb_the_events(make_client: Any, read_stream: Any) -> None:
    stream = read_stream(make_client(sse_keep_alive_s=0.001).chat(stream=True))
    assert stream.chat_text() == "Paris is the capital."


def test_a_stream_with_comments_stops_when_its_client_leaves() -> None:
    ended = []

    async def events() -> Events:
        try:
            await never()
            yield {}
        finally:
            ended.append(True)

    async def work() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            await until(lambda: any(m.get("body") == b": keep-alive\n\n" for m in sent))
            return {"type": "http.disconnect"}

        await EventStream(events(), lambda: None, 0.01)({"type": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    assert ended == [True]


def test_work_is_cancelled_when_the_client_leaves() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def late() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return await leaves_at_once()

    with pytest.raises(ClientDisconnected):
        asyncio.run(asyncio.wait_for(unless_disconnected(work(), late), LIMIT_S))
    assert cancelled == [True]


def test_errors_of_the_work_come_out() -> None:
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(unless_disconnected(work(), never))
