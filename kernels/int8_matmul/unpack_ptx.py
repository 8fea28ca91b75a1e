"""The PTX that turns four int8 codes of a register into two packed pairs of 16-bit floats.

float16: a byte with its sign flipped is the low mantissa of 1024, which leaves with the zero point
by an exact addition. bfloat16 has seven bits of mantissa: 128 takes the lower seven of the code,
and the sign, as the lowest bit of an exponent, is -128 or -256; their sum is the code, exactly.
"""

from __future__ import annotations


def unpack_ptx(bfloat16: bool, asymmetric: bool) -> str:
    """Instructions from four codes $2 to the pairs $0 and $1.

    ``asymmetric``: $3 and $4 are added to the pairs: the negative zero point, for float16 less
    1152, which stands for a code of zero.
    """
    lines = [".reg .b32 bytes, sign, bias", "mov.b32 bias, 0xe480e480"]  # -1152
    if not bfloat16:
        lines += ["xor.b32 bytes, $2, 0x80808080"]
    for result, selector, zero in (("$0", "0x4140", "$3"), ("$1", "0x4342", "$4")):
        if bfloat16:
            lines += [
                f"prmt.b32 bytes, $2, 0, {selector}",
                "lop3.b32 sign, bytes, 0x00800080, 0xc300c300, 0xea",
                "lop3.b32 bytes, bytes, 0x007f007f, 0x43004300, 0xea",
                "mov.b32 bias, 0x3f803f80",
                f"fma.rn.bf16x2 {result}, bytes, bias, sign",
            ]
            if asymmetric:
                lines.append(f"fma.rn.bf16x2 {result}, {result}, bias, {zero}")
        else:
            lines += [
                f"prmt.b32 sign, bytes, 0x64646464, {selector}",
                f"add.rn.f16x2 {result}, sign, {zero if asymmetric else 'bias'}",
            ]
    return "{ " + "; ".join(lines) + "; }"


def unpack_constraints(asymmetric: bool) -> str:
    """The operands of ``unpack_ptx``; results are written before the last input is read."""
    return "=&r,=&r,r" + (",r,r" if asymmetric else "")
