"""The PTX that turns codes of a planar4 register into packed pairs of 16-bit floats, or into bytes.

`lop3` with table 0xea is ``(a & mask) | magic``: the code becomes the low mantissa bits of 1024
(float16) or 128 (bfloat16). float16 has ten of them, so the upper nibble of a byte needs no shift:
it reads as 1024 + 16 q, and one fused multiply-add by 1/16 gives 64 + q. The zero point then leaves
by an exact addition. bfloat16 has seven, takes lower nibbles only, and adds by a fused multiply-add
by one, since its packed addition begins with sm_90.
"""

from __future__ import annotations

FP16_LOW_BIAS = 0xE400
"""Bits of the float16 -(1024 + z), when z is or-ed in."""

FP16_HIGH_BIAS = 0xD400
"""Bits of the float16 -(64 + z), when 16 z is or-ed in."""

BF16_BIAS = 0xC300
"""Bits of the bfloat16 -(128 + z), when z is or-ed in."""


def unpack_ptx(first_plane: int, bfloat16: bool, scaled: bool) -> str:
    """Instructions for planes ``first_plane`` (0 or 2) and the next.

    $0 and $1 are the results, $2 the containers, $3 and $4 the biases of the planes, $5 and $6
    their scales when ``scaled`` (float16 only). Calls nothing of ours: Triton runs it while it
    compiles, and hashes no function below it.
    """
    shift = 4 * first_plane
    source = "moved" if shift else "$2"
    lines = [".reg .b32 moved, next, factor"]
    if shift:
        lines.append(f"shr.b32 moved, $2, {shift}")
    if bfloat16:
        lines += [
            f"shr.b32 next, $2, {shift + 4}",
            f"lop3.b32 $0, {source}, 0x000f000f, 0x43004300, 0xea",
            "lop3.b32 $1, next, 0x000f000f, 0x43004300, 0xea",
            "mov.b32 factor, 0x3f803f80",
            "fma.rn.bf16x2 $0, $0, factor, $3",
            "fma.rn.bf16x2 $1, $1, factor, $4",
        ]
    else:
        lines += [
            f"lop3.b32 $0, {source}, 0x000f000f, 0x64006400, 0xea",
            f"lop3.b32 $1, {source}, 0x00f000f0, 0x64006400, 0xea",
            "add.rn.f16x2 $0, $0, $3",
            "mov.b32 factor, 0x2c002c00",
            "fma.rn.f16x2 $1, $1, factor, $4",
        ]
    if scaled:
        lines += ["mul.rn.f16x2 $0, $0, $5", "mul.rn.f16x2 $1, $1, $6"]
    return "{ " + "; ".join(lines) + "; }"


def unpack_constraints(scaled: bool) -> str:
    """The operands of ``unpack_ptx``; results are written before the last input is read."""
    return "=&r,=&r,r,r,r" + (",r,r" if scaled else "")


def byte_ptx(progressive: bool) -> str:
    """Instructions for the lower ($0) and upper ($1) codes of four bytes, less their zero points.

    $2 are the bytes, $3 the zero points as four bytes. ``progressive``: $4 is the scale as four
    bytes, 0 to 17, $3 the products of scale and zero point, and the results are multiplied by the
    scale. Bytes are subtracted in one register: a bit above each keeps the borrow.
    """
    lines = [".reg .b32 code, even, factor, other, zero", "shr.b32 other, $2, 4"]
    if progressive:
        lines += ["and.b32 factor, $4, 0xff", "and.b32 zero, $3, 0x7f7f7f7f"]
    for result, source in (("$0", "$2"), ("$1", "other")):
        if progressive:
            lines += [
                f"and.b32 code, {source}, 0x0f0f0f0f",
                "mul.lo.u32 code, code, factor",
                "lop3.b32 even, code, $3, 0x80808080, 0x82",  # ~(code ^ $3) & 0x80808080
                "or.b32 code, code, 0x80808080",
                "sub.u32 code, code, zero",
                f"xor.b32 {result}, code, even",
            ]
        else:
            lines += [
                f"lop3.b32 code, {source}, 0x0f0f0f0f, 0x80808080, 0xea",
                "sub.u32 code, code, $3",
                f"xor.b32 {result}, code, 0x80808080",
            ]
    return "{ " + "; ".join(lines) + "; }"


def byte_constraints(progressive: bool) -> str:
    """The operands of ``byte_ptx``."""
    return "=&r,=&r,r,r" + (",r" if progressive else "")
