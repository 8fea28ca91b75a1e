"""What is known about a compiled kernel, the promises it breaks, and how fast it can be fed."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from qserve.kernels.static_gate.program import Counts
from qserve.kernels.static_gate.spec import KernelSpec


@dataclass(frozen=True, slots=True)
class Report:
    """A compiled kernel.

    local_bytes: the frame in local memory, where spilled registers go.
    resident_warps: warps that a core holds at a time; 0 when a thread block does not fit; None
        where it is not known.
    issue_share: see ``Promises``; None where it is not defined.
    loop: counts of the hot loop, or of everything where there is no loop.
    """

    kernel: str
    target: str
    tile: str
    registers: int
    local_bytes: int
    shared_bytes: int
    num_warps: int
    resident_warps: int | None
    issue_share: float | None
    whole: Counts
    loop: Counts


# The clock of the boost state in GHz and the bandwidth of the memory in GB/s of the part that
# `gpu_target.TARGETS` stands for.
_CLOCK_AND_BANDWIDTH = {
    "sm_80": (1.41, 2039.0),
    "sm_86": (1.695, 600.0),
    "sm_89": (2.52, 864.0),
    "sm_90": (1.755, 3350.0),
    "sm_100": (1.85, 8000.0),
    "sm_120": (2.41, 1792.0),
}
_ISSUED_PER_CYCLE = 4  # warp instructions, one for each quarter of a core


def issue_share(
    target: str, num_cores: int, num_instructions: int, num_warps: int, stream_bytes: int | None
) -> float | None:
    """Cycles to issue one trip of a loop over cycles in which memory delivers its bytes.

    Every instruction counts as one slot: a bound from below, since conversions and special
    functions take more. None for a target whose issue rate is not known (AMD).
    """
    if stream_bytes is None or target not in _CLOCK_AND_BANDWIDTH:
        return None
    clock, bandwidth = _CLOCK_AND_BANDWIDTH[target]
    issue_cycles = num_instructions * num_warps / _ISSUED_PER_CYCLE
    memory_cycles = stream_bytes * num_cores * clock / bandwidth
    return issue_cycles / memory_cycles


def broken_promises(report: Report, spec: KernelSpec) -> list[str]:
    """The promises of ``spec`` that ``report`` does not keep, in words; empty when all are kept."""
    promises, loop = spec.promises, report.loop
    found: list[str] = []
    if report.local_bytes or report.whole.num_local:
        found.append(
            f"spills: {report.local_bytes} bytes of local memory, "
            f"{report.whole.num_local} instructions on it"
        )
    if report.resident_warps == 0:
        found.append(f"does not fit a core: {report.shared_bytes} bytes of shared memory")
    if promises.tensor_core and not _has(loop, promises.tensor_core):
        found.append(f"no {promises.tensor_core} in the hot loop, but {loop.tensor_core or 'none'}")
    if promises.min_wide_share is not None and loop.wide_share < promises.min_wide_share:
        found.append(f"{loop.wide_share:.2f} of loads are wide, not {promises.min_wide_share}")
    issue, most = report.issue_share, promises.max_issue_share
    if most is not None and issue is not None and issue > most:
        found.append(f"issue share {issue:.2f} is above {most}")
    resident = report.resident_warps
    if promises.min_warps is not None and resident is not None and resident < promises.min_warps:
        found.append(f"{resident} warps fit a core, not {promises.min_warps}")
    if promises.no_conversions and loop.num_conversions:
        found.append(f"{loop.num_conversions} conversions in the hot loop")
    return found


def as_record(report: Report) -> dict[str, Any]:
    """``report`` as JSON takes it."""
    return asdict(report) | {"wide_share": report.loop.wide_share}


def _has(loop: Counts, pattern: str) -> bool:
    return any(re.fullmatch(pattern, opcode) for opcode in loop.tensor_core)
