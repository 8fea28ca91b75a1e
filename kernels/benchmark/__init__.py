"""Every op on the shapes of a real model, timed beside what the machine could do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from qserve.kernels.backend import choose
from qserve.kernels.benchmark import products, rows, sequences
from qserve.kernels.benchmark.case import Case, ModelShapes, shapes_for
from qserve.kernels.machine_bounds import MachineBounds
from qserve.kernels.timing import time_calls

__all__ = ["CASES", "Measurement", "find_cases", "measure_case"]

CASES: dict[str, Callable[[ModelShapes], Iterator[Case]]] = {
    "codebook_matmul": products.codebook_cases,
    "dense_matmul": products.dense_cases,
    "expert_matmul": products.expert_cases,
    "float8_matmul": products.float8_cases,
    "gated_activation": rows.activation_cases,
    "head_norm": rows.head_norm_cases,
    "int4_matmul": products.int4_cases,
    "int8_matmul": products.int8_cases,
    "kv_store": sequences.store_cases,
    "layer_norm": partial(rows.norm_cases, "layer_norm"),
    "output_head": products.head_cases,
    "paged_attention": sequences.attention_cases,
    "rms_norm": partial(rows.norm_cases, "rms_norm"),
    "rms_norm_int8": partial(rows.norm_cases, "rms_norm_int8"),
    "sample": rows.sample_cases,
    "soft_cap": rows.soft_cap_cases,
}
"""The cases of every op in ``backend.OPS``."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """An op on one shape. Rates are those of the median.

    gb_s: bytes that have to be moved, in 10^9 a second. gmac_s: multiply-adds. share: the shortest
    time that the bounds of the machine allow, divided by the median; above 1 where operands come
    from a cache.
    """

    op: str
    shape: str
    backend: str
    p20_us: float
    p50_us: float
    p80_us: float
    gb_s: float
    gmac_s: float
    share: float


def find_cases(device: torch.device, ops: Collection[str] = (), shape: str = "") -> list[Case]:
    """The cases of the named ops, or of all, whose shape in words contains ``shape``.

    Raises ``ValueError`` for an op that there is none of.
    """
    if unknown := sorted(set(ops) - CASES.keys()):
        raise ValueError(f"no op is named {unknown[0]!r}: expected one of {', '.join(CASES)}")
    shapes = shapes_for(device)
    return [
        case
        for op, make in CASES.items()
        if not ops or op in ops
        for case in make(shapes)
        if shape in case.shape
    ]


def measure_case(
    case: Case, device: torch.device, bounds: MachineBounds, seconds: float
) -> Measurement:
    """Build the operands of a case, call the op for about ``seconds``, compare with the bounds."""
    workload = case.build(device)
    timing = time_calls(workload.call, seconds, device)
    backend = workload.backend or choose(case.op, device).backend
    shortest_s = bounds.shortest_s(workload.cost, is_int8=workload.is_int8)
    return Measurement(
        op=case.op,
        shape=case.shape,
        backend=backend.value,
        p20_us=1e6 * timing.p20_s,
        p50_us=1e6 * timing.p50_s,
        p80_us=1e6 * timing.p80_s,
        gb_s=workload.cost.num_bytes / timing.p50_s / 1e9,
        gmac_s=workload.cost.flops / 2 / timing.p50_s / 1e9,
        share=shortest_s / timing.p50_s,
    )
