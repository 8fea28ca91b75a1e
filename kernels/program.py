"""Native calls noted down once and run many times, without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from qserve.kernels.native import extension


class Program:
    """What a function asks of the native kernels, to be run again and again: a CUDA graph on a CPU.

    A decode step calls the same few hundred kernels with the same buffers every time; run as a
    program it costs one call and releases Python's lock once. The addresses, shapes and strides are
    those of the recording; what lies at the addresses may change. ``body`` is kept, and with it
    every tensor it holds.

    others: the operations of PyTorch that ran while recording, which is what ops do that have no
    native kernel for what they were given (see ``backend.choose``). They are not part of the
    program: with any of them it is not what ``body`` does. result: what ``body`` returned.
    """

    def __init__(self, body: Callable[[], object]) -> None:
        """Record ``body``, which is called once here. Its native calls are noted, and do not run.

        Raises ``RuntimeError`` without the native kernels.
        """
        self._body = body
        self._native = extension().Program()
        self.run: Callable[[], None] = self._native.run
        self._native.begin()
        observer = _Observer()
        try:
            with observer:
                self.result: Any = body()
        finally:
            self._native.end()
        self.others = frozenset(observer.names)

    def __len__(self) -> int:
        return len(self._native)


class _Observer(TorchDispatchMode):
    """Notes the operations of PyTorch that compute or allocate: all but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # in PyTorch
        self.names: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to keep it out of here: 1.6 s at the first token."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        aliases = [value.alias_info for value in func._schema.returns]
        if any(alias is None or alias.is_write for alias in aliases):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))
