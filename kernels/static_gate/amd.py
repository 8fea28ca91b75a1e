"""Reads AMD machine code as LLVM prints it, with the resources it states at the end."""

from __future__ import annotations

import re

from qserve.kernels.static_gate.program import Instruction, Kind, Program

_INSTRUCTION = re.compile(r"\s+([a-z]\w+)\b(.*)")
_LABEL = re.compile(r"(\.LBB\w+):")
_BRANCH = re.compile(r"s_c?branch")
_JUMP_TARGET = re.compile(r"(\.LBB\w+)")
_MEMORY_LOAD = re.compile(r"(?:global|flat|buffer)_load_(\w+)")
_TENSOR_CORE = re.compile(r"v_s?mfma|v_wmma|v_swmmac|v_smfmac")
_WIDTHS = (
    (("dwordx4", "b128"), 16),
    (("dwordx3", "b96"), 12),
    (("dwordx2", "b64"), 8),
    (("short", "d16", "u16", "i16"), 2),
    (("byte", "u8", "i8"), 1),
)


def parse(assembly: str) -> Program:
    """The program that ``assembly`` lists; addresses are line numbers."""
    instructions: list[Instruction] = []
    loops: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(assembly.split(".section", 1)[0].splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (found := _INSTRUCTION.match(line)) and found[1] != "s_nop":
            instructions.append(_read(number, found[1], found[2]))
            target = _JUMP_TARGET.search(found[2]) if _BRANCH.match(found[1]) else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], number))
    return Program(tuple(instructions), tuple(loops))


def resource(assembly: str, name: str) -> int:
    """A number of the kernel's metadata, such as ``vgpr_count``; 0 where it is not stated."""
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    return int(found[1]) if found else 0


def resident_warps(assembly: str) -> int | None:
    """Waves that a compute unit of four SIMDs holds at a time, as LLVM estimates it."""
    found = re.search(r";\s*Occupancy:\s*(\d+)", assembly)
    return 4 * int(found[1]) if found else None


def _read(address: int, opcode: str, operands: str) -> Instruction:
    if _TENSOR_CORE.match(opcode):
        return Instruction(address, opcode.split("_")[1], Kind.TENSOR_CORE)
    if load := _MEMORY_LOAD.match(opcode):
        kind = Kind.COPY if re.search(r"\blds\b", operands) else Kind.LOAD
        return Instruction(address, opcode, kind, _num_bytes(load[1]))
    if opcode.startswith("ds_"):
        return Instruction(address, opcode, Kind.SHARED)
    if opcode.startswith("scratch_"):
        return Instruction(address, opcode, Kind.LOCAL)
    if opcode.startswith("v_cvt"):
        return Instruction(address, opcode, Kind.CONVERSION)
    is_arithmetic = opcode.startswith("v_") and not opcode.startswith("v_accvgpr")
    return Instruction(address, opcode, Kind.ARITHMETIC if is_arithmetic else Kind.OTHER)


def _num_bytes(suffix: str) -> int:
    return next((width for marks, width in _WIDTHS if any(m in suffix for m in marks)), 4)
