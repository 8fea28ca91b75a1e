"""Sizes as people write them."""

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
