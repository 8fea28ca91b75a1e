"""How the Triton norms are launched, all three of them: pure functions of the shapes."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.kernels.cost import Cost


@dataclass(frozen=True, slots=True)
class NormProblem:
    """Rows of ``width`` elements of ``itemsize`` bytes.

    has_residual: rows are added to another matrix first, which is written back.
    is_int8: the result is int8 with a scale a row.
    """

    num_rows: int
    width: int
    has_residual: bool = False
    is_int8: bool = False
    itemsize: int = 2


@dataclass(frozen=True, slots=True)
class NormLaunch:
    """A thread block for each row, with ``block`` columns: the width, padded to a power of two.

    It is a function of the width alone: a row is summed alike in every batch.
    """

    problem: NormProblem
    block: int
    num_warps: int
    grid: tuple[int]


def norm_launch(problem: NormProblem) -> NormLaunch:
    """The launch of ``problem``, alike on every target: 16 bytes a lane or a multiple."""
    block = max(256, 1 << (problem.width - 1).bit_length())
    num_warps = min(16, max(1, block // 512))
    return NormLaunch(problem, block, num_warps, (problem.num_rows,))


def norm_cost(problem: NormProblem) -> Cost:
    """The work of ``problem``: one pass over the rows. The weight stays in a cache."""
    read = problem.itemsize * (2 if problem.has_residual else 1)
    written = 1 if problem.is_int8 else problem.itemsize
    if problem.has_residual:
        written += problem.itemsize
    elements = problem.num_rows * problem.width
    scale_bytes = 4 * problem.num_rows if problem.is_int8 else 0
    return Cost(num_bytes=elements * (read + written) + scale_bytes, flops=4 * elements)
