"""How the C library deals with large pieces of memory."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
"""The number of this setting of glibc's ``mallopt``."""

LARGE_BYTES = 8 << 20


def return_large_pieces() -> None:
    """Let pieces of 8 MiB and more go back to the system as soon as they are freed.

    glibc would raise the limit to 32 MiB by itself, keep freed matrices for later and find them too
    small for the next: a run over blocks of 130 MiB then takes 120 MiB more. A C library that
    has no such setting is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def return_freed() -> None:
    """Give the system back what is free between pieces that are in use.

    Between the stages of blocks of 124 MiB this is up to 70 MiB, in some milliseconds.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
