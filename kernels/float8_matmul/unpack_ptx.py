"""The PTX that turns four float8 values of a register into two packed pairs of 16-bit floats.

For hardware without float8: the bits of an e4m3, moved to where a wider float has its exponent and
mantissa, are the value over a power of two, subnormals included; a multiplication by the power is
exact. NaN, of which weights have none, becomes 480.
"""

from __future__ import annotations


def unpack_ptx(bfloat16: bool) -> str:
    """Instructions from four values $2 to the pairs $0 and $1."""
    # Exponents start at 2^-6, in float16 at 2^-14 and in bfloat16 at 2^-126.
    shift, magnitude = (4, "0x07f007f0") if bfloat16 else (1, "0x3f803f80")
    power = "0x7b807b80" if bfloat16 else "0x5c005c00"  # 2^120 and 2^8
    lines = [".reg .b32 high, low, power, zero", f"mov.b32 power, {power}"]
    if bfloat16:
        lines.append("mov.b32 zero, 0x80008000")  # -0, which leaves the sign of a zero
    for result, selector in (("$0", "0x1404"), ("$1", "0x3424")):
        lines += [
            f"prmt.b32 high, $2, 0, {selector}",
            f"shr.b32 low, high, {shift}",
            f"and.b32 low, low, {magnitude}",
            "lop3.b32 high, high, 0x80008000, low, 0xea",
            f"fma.rn.bf16x2 {result}, high, power, zero"
            if bfloat16
            else f"mul.rn.f16x2 {result}, high, power",
        ]
    return "{ " + "; ".join(lines) + "; }"


def unpack_constraints() -> str:
    """The operands of ``unpack_ptx``; results are written before the last input is read."""
    return "=&r,=&r,r"
