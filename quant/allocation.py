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
