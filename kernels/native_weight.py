"""A weight in the layout of the native kernels: what it is, and the run of memory that holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qserve.kernels.native import extension


class NativeWeight:
    """A weight object of the extension, made anew from ``kind``, ``sizes`` and its bytes.

    kind: the class of the extension. sizes: what its constructor takes, integers and booleans.
    nbytes: of the layout, which holds all of the weight and is the same for every instruction set.
    run: its product, see kernels/csrc. product: the object itself, for ops made of products.
    """

    __slots__ = ("kind", "nbytes", "product", "run", "sizes")

    def __init__(self, kind: str, sizes: tuple[int, ...]) -> None:
        """Has no memory yet: call ``pack`` or ``allocate`` before ``run``."""
        self.product: Any = getattr(extension(), kind)(*sizes)
        self.kind = kind
        self.sizes = sizes
        self.nbytes: int = self.product.nbytes
        self.run: Callable[..., None] = self.product.run

    @property
    def address(self) -> int:
        """Where the layout lies."""
        return int(self.product.address)

    def pack(self, *addresses: int) -> None:
        """Makes the layout of the arrays at ``addresses``: those that ``kind`` packs."""
        self.product.pack(*addresses)

    def allocate(self) -> int:
        """The address of new memory of ``nbytes``, to which the caller writes the layout."""
        return int(self.product.allocate())


def checksum(address: int, nbytes: int) -> int:
    """A 64-bit checksum of ``nbytes`` at ``address``, at the speed of memory: finds damage, not
    forgery. The same on every machine of one byte order."""
    return int(extension().checksum(address, nbytes))
