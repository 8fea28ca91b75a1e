"""asyncio on one side, the engine's thread on the other: requests over, tokens back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from qserve.serve.errors import BadRequest, EngineDead, Overloaded, ServeError
from qserve.serve.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    NewTokens,
    RequestFailed,
)

Output = NewTokens | RequestFailed
Outputs = Callable[[list[Output]], None]


class EngineLink(Protocol):
    """What the bridge needs of the engine: ``EngineThread``, or a stand-in."""

    stats: EngineStats

    @property
    def alive(self) -> bool: ...

    def start(self) -> None: ...

    def submit(self, message: AddRequest | AbortRequest) -> None: ...

    def stop(self) -> bool: ...


def is_last(output: Output) -> bool:
    """Whether a sequence has ended with this output."""
    return isinstance(output, RequestFailed) or output.finish_reason is not None


class Submission:
    """The sequences of one HTTP request, which live and die together."""

    def __init__(self, bridge: Bridge, request_ids: Sequence[str]) -> None:
        self._bridge = bridge
        self._index_of = {request_id: index for index, request_id in enumerate(request_ids)}
        self._unfinished = set(request_ids)
        self._arrived: asyncio.Queue[tuple[int, NewTokens | ServeError]] = asyncio.Queue()

    async def outputs(self) -> AsyncIterator[tuple[int, NewTokens]]:
        """The new tokens of every sequence as they come, with its index, until all have finished.

        Raises ``ServeError`` when the engine gave up on one of them.
        """
        while self._unfinished or not self._arrived.empty():
            index, output = await self._arrived.get()
            if isinstance(output, ServeError):
                raise output
            yield index, output

    def deliver(self, request_id: str, output: Output) -> None:
        """Take an output of the engine; for the bridge."""
        if isinstance(output, RequestFailed):
            self.fail(request_id, ServeError(output.message))
            return
        if output.finish_reason is not None:
            self._unfinished.discard(request_id)
        self._arrived.put_nowait((self._index_of[request_id], output))

    def fail(self, request_id: str, error: ServeError) -> None:
        """End a sequence, and with it the HTTP request, with an error; for the bridge."""
        self._unfinished.discard(request_id)
        self._arrived.put_nowait((self._index_of[request_id], error))

    def abort(self, index: int | None = None) -> None:
        """Stop one sequence, or all, and free what they hold. Finished ones are ignored."""
        for request_id in list(self._unfinished):
            if index is None or self._index_of[request_id] == index:
                self._unfinished.discard(request_id)
                self._bridge.abort(request_id)


class Bridge:
    """Owns the engine's thread; lives in one event loop.

    connect: makes the link to the engine from the function that receives its outputs, such as
        ``partial(EngineThread, engine)``.
    max_sequences: unfinished sequences at most, running and waiting; None is no limit.
    """

    def __init__(
        self, connect: Callable[[Outputs], EngineLink], max_sequences: int | None = None
    ) -> None:
        self._engine = connect(self._receive)
        self._max_sequences = max_sequences
        self._owners: dict[str, Submission] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the engine; outputs come to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def stop(self) -> bool:
        """End the engine. What is unfinished fails. Returns whether its thread ended in time."""
        return await asyncio.to_thread(self._engine.stop)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._engine.alive

    @property
    def stats(self) -> EngineStats:
        """The engine's load after its last step."""
        return self._engine.stats

    def submit(self, requests: Sequence[AddRequest]) -> Submission:
        """Hand all requests to the engine, or none.

        Raises ``Overloaded`` when the queue is full, ``BadRequest`` for requests that can never be
        computed or never fit the queue, ``EngineDead`` when the engine has ended.
        """
        self._check_room(len(requests))
        submission = Submission(self, [request.request_id for request in requests])
        try:
            for request in requests:
                self._owners[request.request_id] = submission
                self._engine.submit(request)
        except ServeError:
            submission.abort()
            raise
        return submission

    def _check_room(self, num_sequences: int) -> None:
        if self._max_sequences is None:
            return
        if num_sequences > self._max_sequences:
            raise BadRequest(
                f"the request asks for {num_sequences} sequences (prompts times n), this server "
                f"takes {self._max_sequences} at once: ask for fewer",
                "n",
            )
        if len(self._owners) + num_sequences > self._max_sequences:
            raise Overloaded(
                f"{len(self._owners)} sequences are running or waiting, the limit is "
                f"{self._max_sequences}: try again later"
            )

    def abort(self, request_id: str) -> None:
        """Forget a sequence; nothing of it is delivered any more."""
        if self._owners.pop(request_id, None) is not None:
            with contextlib.suppress(EngineDead):  # then it has freed everything already
                self._engine.submit(AbortRequest(request_id))

    def fail_all(self, error: ServeError) -> None:
        """End every unfinished sequence with an error for its client."""
        for request_id, submission in list(self._owners.items()):
            self.abort(request_id)
            submission.fail(request_id, error)

    def _receive(self, outputs: list[Output]) -> None:
        """Called in the engine's thread."""
        assert self._loop is not None, "the engine spoke before it was started"
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            submission = self._owners.get(output.request_id)
            if submission is None:  # it was aborted while this was on its way
                continue
            if is_last(output):
                del self._owners[output.request_id]
            submission.deliver(output.request_id, output)
