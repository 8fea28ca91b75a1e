"""The engine in a thread of its own: plain messages in, plain messages out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import torch

from qserve.serve.engine import Engine, Output
from qserve.serve.errors import EngineDead, ServeError
from qserve.serve.messages import AbortRequest, AddRequest, EngineStats, RequestFailed

logger = logging.getLogger(__name__)

Message = AddRequest | AbortRequest
Outputs = Callable[[list[Output]], None]


class EngineThread:
    """Steps an engine while it has work and sleeps on a queue while it has none.

    outputs: called in the engine's thread with what a step gave, never with an empty list; it must
    return soon, since the next step waits for it. Every request gets an output that ends it, also
    when the engine stops, unless it was aborted.
    """

    def __init__(self, engine: Engine, outputs: Outputs) -> None:
        self._engine = engine
        self._outputs = outputs
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()  # None: stop
        self._thread = Thread(target=self._run, name="qserve-engine", daemon=True)
        self._lock = Lock()  # nothing is put into the inbox after the None
        self._closed = True
        self.stats: EngineStats = engine.stats()
        """The load after the last step; replaced whole, so any thread may read it."""

    def start(self) -> None:
        """Begin to take messages."""
        self._closed = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether messages are taken."""
        return not self._closed and self._thread.is_alive()

    def submit(self, message: Message) -> None:
        """Hand a message to the engine, from any thread.

        Raises ``BadRequest`` for a request that can never be computed, ``EngineDead`` when the
        engine has ended.
        """
        if isinstance(message, AddRequest):
            self._engine.check(message)
        with self._lock:
            if not self.alive:
                raise EngineDead("The engine is not running: the server is starting or stopping.")
            self._inbox.put(message)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End after the current step; what is unfinished fails.

        Returns whether the thread ended in time. One that hangs in a step is left behind as a
        daemon: it does not keep the process alive.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(1)  # the kernels have a thread pool of their own; two would fight
        try:
            while self._take_messages():
                if self._engine.has_work():
                    self._emit(self._step())
        finally:
            with self._lock:
                self._closed = True
            self._fail_the_rest(EngineDead("The server is stopping."))

    def _step(self) -> list[Output]:
        try:
            return self._engine.step()
        except Exception as error:
            logger.exception("a step failed")
            return self._engine.fail_all(error)

    def _take_messages(self) -> bool:
        """Handle what has arrived, waiting for it when there is nothing else to do.

        Returns False when it is time to stop.
        """
        for message in self._arrived():
            if message is None:
                return False
            if isinstance(message, AbortRequest):
                self._engine.abort(message.request_id)
            else:
                self._add(message)
        return True

    def _fail_the_rest(self, error: EngineDead) -> None:
        outputs = self._engine.fail_all(error)
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            if isinstance(message, AddRequest):
                outputs.append(RequestFailed(message.request_id, str(error)))
        self._emit(outputs)

    def _arrived(self) -> Iterator[Message | None]:
        if not self._engine.has_work():
            self.stats = self._engine.stats()
            yield self._inbox.get()
        try:
            while True:
                yield self._inbox.get_nowait()
        except Empty:
            return

    def _add(self, request: AddRequest) -> None:
        try:
            self._engine.add(request)
        except ServeError as error:
            self._emit([RequestFailed(request.request_id, str(error))])

    def _emit(self, outputs: list[Output]) -> None:
        self.stats = self._engine.stats()
        if not outputs:
            return
        try:
            self._outputs(outputs)
        except Exception:
            logger.exception("the receiver of %d outputs failed", len(outputs))
