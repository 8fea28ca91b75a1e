"""The PTX that turns a register of four bytes into packed pairs of 16-bit floats, exactly.

`prmt` spreads bytes over halves; beside each it can put the exponent byte of 1024 (float16, 0x64)
or 128 (bfloat16, 0x43), which makes the byte the low bits of the mantissa. The bias then leaves by
an exact addition. Conversion instructions run at a quarter of the rate of these, or less.

Each function calls nothing of ours: Triton runs it while it compiles, and hashes no function below
it. Packed bfloat16 addition begins with sm_90, fused multiply-add with sm_80.
"""

from __future__ import annotations


def int8_ptx(bfloat16: bool) -> str:
    """Signed bytes $2 to pairs $0 and $1.

    float16: a byte with its sign bit flipped is q + 128, read as 1152 + q. bfloat16 has seven bits
    of mantissa: the sign bit falls on the lowest of the exponent, which makes it the choice between
    128 and 256 that has to be subtracted.
    """
    if bfloat16:
        lines = [
            ".reg .b32 even, odd, magic, minus",
            "mov.b32 magic, 0x43434343",
            "mov.b32 minus, 0xbf80bf80",
            "prmt.b32 even, $2, magic, 0x4140",
            "prmt.b32 odd, $2, magic, 0x4342",
            "and.b32 $0, even, 0xff7fff7f",
            "and.b32 $1, odd, 0xff7fff7f",
            "and.b32 even, even, 0xff80ff80",
            "and.b32 odd, odd, 0xff80ff80",
            "fma.rn.bf16x2 $0, even, minus, $0",
            "fma.rn.bf16x2 $1, odd, minus, $1",
        ]
    else:
        lines = [
            ".reg .b32 bytes, magic, bias",
            "xor.b32 bytes, $2, 0x80808080",
            "mov.b32 magic, 0x64646464",
            "mov.b32 bias, 0xe480e480",
            "prmt.b32 $0, bytes, magic, 0x4140",
            "prmt.b32 $1, bytes, magic, 0x4342",
            "add.rn.f16x2 $0, $0, bias",
            "add.rn.f16x2 $1, $1, bias",
        ]
    return "{ " + "; ".join(lines) + "; }"


def float8_ptx(bfloat16: bool) -> str:
    """Bits $2 of e4m3 numbers to pairs $0 and $1.

    Exponent and mantissa move to their places, which leaves the number too small by the difference
    of the exponents' biases: 2 ** 8 in float16, 2 ** 120 in bfloat16. NaN becomes a number.
    """
    shift, mask, factor, kind = 1, "0x3f803f80", "0x5c005c00", "f16x2"
    if bfloat16:
        shift, mask, factor, kind = 4, "0x07f007f0", "0x7b807b80", "bf16x2"
    lines = [".reg .b32 spread, moved, factor, zero", f"mov.b32 factor, {factor}"]
    lines += ["mov.b32 zero, 0x80008000"]
    for target, selector in (("$0", "0x1404"), ("$1", "0x3424")):
        lines += [
            f"prmt.b32 spread, $2, 0, {selector}",
            f"shr.b32 moved, spread, {shift}",
            f"and.b32 moved, moved, {mask}",
            "lop3.b32 moved, spread, 0x80008000, moved, 0xea",
            f"fma.rn.{kind} {target}, moved, factor, zero",
        ]
    return "{ " + "; ".join(lines) + "; }"


def int4_ptx(bfloat16: bool) -> str:
    """Low nibbles of the bytes $4 to pairs $0 and $1, high nibbles to pairs $2 and $3.

    float16 reads a high nibble without a shift as 1024 + 16 q.
    """
    magic = "0x43434343" if bfloat16 else "0x64646464"
    lines = [".reg .b32 spread, magic, one, bias, fraction, rest", f"mov.b32 magic, {magic}"]
    if bfloat16:
        lines += ["mov.b32 one, 0x3f803f80", "mov.b32 bias, 0xc300c300"]
    else:
        lines += ["mov.b32 bias, 0xe400e400"]
        lines += ["mov.b32 fraction, 0x2c002c00", "mov.b32 rest, 0xd400d400"]
    for low, high, selector in (("$0", "$2", "0x4140"), ("$1", "$3", "0x4342")):
        lines += [
            f"prmt.b32 spread, $4, magic, {selector}",
            f"and.b32 {low}, spread, 0xff0fff0f",
        ]
        if bfloat16:
            lines += [
                "shr.b32 spread, spread, 4",
                f"lop3.b32 {high}, spread, 0x000f000f, 0x43004300, 0xea",
                f"fma.rn.bf16x2 {low}, {low}, one, bias",
                f"fma.rn.bf16x2 {high}, {high}, one, bias",
            ]
        else:
            lines += [
                f"and.b32 {high}, spread, 0xfff0fff0",
                f"add.rn.f16x2 {low}, {low}, bias",
                f"fma.rn.f16x2 {high}, {high}, fraction, rest",
            ]
    return "{ " + "; ".join(lines) + "; }"
