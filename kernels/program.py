"""Native calls noted down once and run many times, without Python between them."""

from __future__ import annotations

from collections.abc import Callable

from qserve.kernels.native import extension


class Program:
    """What a function asks of the native kernels, to be run again and again: a CUDA graph on a CPU.

    A decode step calls the same few hundred kernels with the same buffers every time; run as a
    program it costs one call and releases Python's lock once. The addresses, shapes and strides are
    those of the recording; what lies at the addresses may change. ``body`` is kept, and with it
    every tensor it holds.
    """

    def __init__(self, body: Callable[[], object]) -> None:
        """Record ``body``, which is called once here. Its native calls are noted, and do not run.

        An op that does not run natively (see ``backend.choose``) is not noted but done at once: the
        caller compares ``len(program)`` with the calls it expects. Raises ``RuntimeError``
        without the native kernels.
        """
        self._body = body
        self._native = extension().Program()
        self.run: Callable[[], None] = self._native.run
        self._native.begin()
        try:
            body()
        finally:
            self._native.end()

    def __len__(self) -> int:
        return len(self._native)
