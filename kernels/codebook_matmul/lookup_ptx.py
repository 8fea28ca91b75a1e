"""The PTX that looks up the codes of a planar4 register in a table of 16-bit floats.

`prmt` picks four bytes out of eight by the nibbles of a selector. The table is four registers of
lower bytes and four of upper ones: two `prmt` look four codes up in either half of a plane of
bytes, and a third, by the highest bit of each code, keeps the right half of the two. There is no
memory in it, and no branch.
"""

from __future__ import annotations

import torch


def table_words(codebook: tuple[float, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The table of ``lookup_ptx``: of ``codebook`` rounded to ``dtype``, a 16-bit float, the lower
    bytes of all values in four 32-bit words, then the upper ones."""
    halves = torch.tensor(codebook).to(dtype).view(torch.uint8).reshape(-1, 2).T.contiguous()
    return tuple(word & 0xFFFFFFFF for word in halves.view(torch.int32).flatten().tolist())


def lookup_ptx(table: tuple[int, ...]) -> str:
    """Instructions from two containers in $4 to the pairs $0 to $3, one for each plane.

    table: see ``table_words``.
    """
    lines = [
        ".reg .b32 index, keep, lower, upper, low0, low1, high0, high1",
        "and.b32 index, $4, 0x77777777",
        "shr.b32 keep, $4, 1",
        "lop3.b32 keep, keep, 0x44444444, 0x32103210, 0xea",
    ]
    for container in (0, 1):  # in bits 0-15 and 16-31; of a selector only bits 0-15 count
        if container:
            lines += ["shr.b32 index, index, 16", "shr.b32 keep, keep, 16"]
        for name, words in (("low", table[:4]), ("high", table[4:])):
            lines += [
                f"prmt.b32 lower, {words[0]}, {words[1]}, index",
                f"prmt.b32 upper, {words[2]}, {words[3]}, index",
                f"prmt.b32 {name}{container}, lower, upper, keep",
            ]
    # Bytes p of the four registers are the two halves of both values of plane p.
    for first, selector in ((0, "0x5140"), (2, "0x7362")):
        lines += [
            f"prmt.b32 lower, low0, high0, {selector}",
            f"prmt.b32 upper, low1, high1, {selector}",
            f"prmt.b32 ${first}, lower, upper, 0x5410",
            f"prmt.b32 ${first + 1}, lower, upper, 0x7632",
        ]
    return "{ " + "; ".join(lines) + "; }"


def lookup_constraints() -> str:
    """The operands of ``lookup_ptx``; results are written before the last input is read."""
    return "=&r,=&r,=&r,=&r,r"
