"""Reads NVIDIA machine code (SASS) as ``nvdisasm`` prints it, and how many warps fit a core."""

from __future__ import annotations

import re

from qserve.kernels.static_gate.program import Instruction, Kind, Program

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_[\w.]+):")
_JUMP_TARGET = re.compile(r"\((\.L_[\w.]+)\)")

_KINDS = (
    (re.compile(r"[HIQO]MMA|[HIQ]GMMA|UTC\w*MMA"), Kind.TENSOR_CORE),
    (re.compile(r"LDG"), Kind.LOAD),
    (re.compile(r"LDGSTS|UTMALDG|UBLKCP"), Kind.COPY),
    (re.compile(r"LDS|STS|LDSM|STSM|LDTM|STTM"), Kind.SHARED),
    (re.compile(r"LDL|STL"), Kind.LOCAL),
    (re.compile(r"I2FP?|F2IP?|I2I|F2F"), Kind.CONVERSION),
    (
        re.compile(
            r"U?(F(ADD2?|MUL2?|FMA2?|MNMX3?|SEL|SETP?)|H(ADD|MUL|FMA|MNMX|SET|SETP)2|IADD\w*|IMAD"
            r"|IMNMX|V\w+|ISETP|LEA|LOP3|SHF|SHL|SHR|PRMT|SEL|BMSK|POPC|FLO|SGXT|MUFU|F2FP|PLOP3"
            r"|MOV|IABS|P2R|R2P|R2UR|SHFL|USEL)"
        ),
        Kind.ARITHMETIC,
    ),
)
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_BULK_COPY = ("UTMALDG", "UBLKCP")

# Of a core: registers, shared bytes, warps and thread blocks it holds at a time.
_CORES = {
    80: (65536, 167936, 64, 32),
    86: (65536, 102400, 48, 16),
    89: (65536, 102400, 48, 24),
    90: (65536, 233472, 64, 32),
    100: (65536, 233472, 64, 32),
    120: (65536, 102400, 48, 24),
}
_RESERVED_SHARED = 1024  # that the system keeps of each thread block


def parse(sass: str) -> Program:
    """The program that ``sass`` lists. A loop is a jump back to a label."""
    instructions: list[Instruction] = []
    jumps: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.search(line):
            address, opcode = int(found[1], 16), found[2]
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            if opcode == "NOP":
                continue
            instructions.append(_read(address, opcode))
            if opcode.startswith("BRA") and (target := _JUMP_TARGET.search(found[3])):
                jumps.append((target[1], address))
    loops = tuple(
        (labels[label], address) for label, address in jumps if labels.get(label, address) < address
    )
    return Program(tuple(instructions), loops)


def resident_warps(capability: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Warps of a kernel with thread blocks of ``num_warps`` that a core holds at a time."""
    core_registers, core_shared, core_warps, core_blocks = _CORES[capability]
    per_warp = -(-registers * 32 // 256) * 256  # allocated by 256
    blocks = min(core_registers // per_warp // num_warps, core_warps // num_warps, core_blocks)
    if shared_bytes:
        blocks = min(blocks, core_shared // (shared_bytes + _RESERVED_SHARED))
    return blocks * num_warps


def _read(address: int, opcode: str) -> Instruction:
    base, *modifiers = opcode.split(".")
    kind = next((kind for pattern, kind in _KINDS if pattern.fullmatch(base)), Kind.OTHER)
    num_bytes = 0
    if kind in (Kind.LOAD, Kind.COPY):
        # A bulk copy moves a whole tile; 16 bytes a lane stands for it.
        default = 16 if base in _BULK_COPY else 4
        num_bytes = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), default)
    return Instruction(address, base, kind, num_bytes)
