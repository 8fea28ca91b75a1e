"""Sizes and durations as people read and write them."""

from __future__ import annotations

import re

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?", re.IGNORECASE)
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4.5GB`` (powers of ten) or ``2GiB`` (powers of two).

    Raises ``ValueError`` for a text that is no size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: expected a number of bytes or one like 4.5GB")
    base = 1024 if "i" in text.lower() else 1000
    return int(float(match[1]) * base ** POWERS[match[2].lower()])


def format_bytes(num_bytes: float) -> str:
    """``512 B``, ``1.5 kB``, ``269.1 MB``: in powers of ten, as disks are sold."""
    if abs(num_bytes) < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if abs(num_bytes) < 999.95:  # what would be rounded to 1000.0 belongs to the next unit
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"


def format_seconds(seconds: float) -> str:
    """``4.2 s`` below a minute, ``3 min 07 s`` above, ``2 h 05 min`` above an hour."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
