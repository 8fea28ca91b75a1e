"""Which requests are let in: none once the server drains, and it knows how many are inside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from qserve.serve.errors import Overloaded

SHUTTING_DOWN = "The server is shutting down: send the request to another one, or try again later."


class Admission:
    """Counts the requests under way, so that a shutdown can wait for them."""

    def __init__(self) -> None:
        self.draining = False
        self._num_inside = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """The time of one request. Raises ``Overloaded`` while the server drains."""
        if self.draining:
            raise Overloaded(SHUTTING_DOWN)
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1

    def drain(self) -> None:
        """Let nobody in any more."""
        self.draining = True

    async def empty(self, timeout_s: float) -> bool:
        """Wait until all are out. Returns False when ``timeout_s`` passed before that."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while self._num_inside:
            if asyncio.get_running_loop().time() >= deadline_s:
                return False
            await asyncio.sleep(0.02)
        return True
