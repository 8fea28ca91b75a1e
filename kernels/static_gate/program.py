"""Machine code as a list of instructions, whoever's it is: loops, and counts over a stretch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    """What an instruction is for."""

    TENSOR_CORE = auto()
    LOAD = auto()  # device memory to registers
    COPY = auto()  # device to shared memory, past the registers
    SHARED = auto()
    LOCAL = auto()  # spilled registers and indexed arrays
    CONVERSION = auto()  # between integers and floats
    ARITHMETIC = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. num_bytes: of a load or copy, for each lane."""

    address: int
    opcode: str
    kind: Kind
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions by address, and each loop as the addresses of its first and last one."""

    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """How much of what a stretch of code has.

    tensor_core: instructions by opcode. loads, copies: instructions by bytes a lane.
    """

    num_instructions: int
    tensor_core: dict[str, int]
    loads: dict[int, int]
    copies: dict[int, int]
    num_shared: int
    num_local: int
    num_conversions: int
    num_arithmetic: int

    @property
    def num_tensor_core(self) -> int:
        return sum(self.tensor_core.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that a lane loads and copies."""
        return _num_bytes(self.loads) + _num_bytes(self.copies)

    @property
    def wide_share(self) -> float:
        """Share of these bytes that comes at least 16 at a time; 0 where nothing is loaded."""
        wide = _num_bytes(self.loads, 16) + _num_bytes(self.copies, 16)
        return wide / self.num_bytes if self.num_bytes else 0.0


def count(instructions: Sequence[Instruction]) -> Counts:
    """The counts of ``instructions``."""
    kinds = Counter(instruction.kind for instruction in instructions)

    def tally(kind: Kind) -> Counter[int]:
        return Counter(i.num_bytes for i in instructions if i.kind is kind)

    return Counts(
        num_instructions=len(instructions),
        tensor_core=dict(Counter(i.opcode for i in instructions if i.kind is Kind.TENSOR_CORE)),
        loads=dict(tally(Kind.LOAD)),
        copies=dict(tally(Kind.COPY)),
        num_shared=kinds[Kind.SHARED],
        num_local=kinds[Kind.LOCAL],
        num_conversions=kinds[Kind.CONVERSION],
        num_arithmetic=kinds[Kind.ARITHMETIC] + kinds[Kind.CONVERSION],
    )


def hot_loop(program: Program) -> Counts | None:
    """The counts of the loop that does the work; None for a program without one.

    Of the loops that have no working loop inside, it is the one with most tensor core instructions,
    then most bytes loaded, then fewest instructions: the steady state, not a masked last trip.
    """
    bodies = {loop: count(_between(program, *loop)) for loop in set(program.loops)}
    uses_tensor_cores = any(body.num_tensor_core for body in bodies.values())
    working = {
        loop: body
        for loop, body in bodies.items()
        if body.num_tensor_core or (body.num_bytes and not uses_tensor_cores)
    }
    innermost = [
        body
        for loop, body in working.items()
        if not any(other != loop and _contains(loop, other) for other in working)
    ]
    return max(
        innermost,
        key=lambda body: (body.num_tensor_core, body.num_bytes, -body.num_instructions),
        default=None,
    )


def _between(program: Program, first: int, last: int) -> list[Instruction]:
    return [i for i in program.instructions if first <= i.address <= last]


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _num_bytes(tally: dict[int, int], at_least: int = 0) -> int:
    return sum(width * number for width, number in tally.items() if width >= at_least)
