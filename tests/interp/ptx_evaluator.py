"""Runs straight-line PTX on numpy arrays: the few instructions that unpacking codes takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

Words = np.ndarray
"""uint32 ``[n]``: one register in n threads."""

_PACKED = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}
_ARITHMETIC: dict[str, Callable[..., torch.Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}
_BITWISE: dict[str, Callable[..., Words]] = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
}
_INTEGER: dict[str, Callable[..., Words]] = {
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


def evaluate(assembly: str, num_outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """The registers ``$0 ...`` after ``assembly`` ran with ``inputs`` in the registers after them.

    Packed arithmetic is computed in float64 and rounded once, as the hardware rounds. Raises
    ``ValueError`` for an instruction it does not know.
    """
    registers = {f"${num_outputs + i}": words for i, words in enumerate(inputs)}

    def read(operand: str) -> Words:
        if operand in registers:
            return registers[operand]
        return np.full_like(inputs[0], int(operand, 0))

    for line in re.sub(r"[{}]", " ", assembly).split(";"):
        opcode, _, operands = line.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = _execute(opcode, [read(source) for source in sources])
    return [registers[f"${i}"] for i in range(num_outputs)]


def _execute(opcode: str, values: list[Words]) -> Words:
    name, *_, kind = opcode.split(".")
    if name == "lop3":
        return _lop3(*values)
    if name == "prmt":
        return _permute(*values)
    if kind in _PACKED and name in _ARITHMETIC:
        numbers = [_unpack(value, _PACKED[kind]) for value in values]
        return _pack(_ARITHMETIC[name](*numbers), _PACKED[kind])
    if kind == "b32" and name in _BITWISE:
        return _BITWISE[name](*values)
    if kind == "u32" and name in _INTEGER:
        return _INTEGER[name](*values)
    raise ValueError(f"the PTX evaluator does not know {opcode}")


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    # Bit i of the table is the result where the bits of a, b and c spell i.
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _permute(a: Words, b: Words, selector: Words) -> Words:
    # Each nibble of the selector picks one of the eight bytes of b and a; bit 3, which would repeat
    # a sign, is not used.
    if bool((selector & 0x8888).any()):
        raise ValueError("the PTX evaluator knows prmt without the repetition of signs")
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        shift = (selector >> 4 * i & 7).astype(np.uint64) * np.uint64(8)
        result |= (both >> shift & np.uint64(255)).astype(np.uint32) << 8 * i
    return result


def _unpack(words: Words, dtype: torch.dtype) -> torch.Tensor:
    halves = np.ascontiguousarray(words).view(np.int16)
    return torch.from_numpy(halves).view(dtype).double()


def _pack(numbers: torch.Tensor, dtype: torch.dtype) -> Words:
    words: Words = numbers.to(dtype).view(torch.int16).numpy().view(np.uint32)
    return words
