"""The kernels as they run: every kind of launch that the launch rules give on a target."""

from __future__ import annotations

from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.static_gate.catalogue.attention import attention_kernels
from qserve.kernels.static_gate.catalogue.byte_matmul import byte_kernels
from qserve.kernels.static_gate.catalogue.head import head_kernels
from qserve.kernels.static_gate.catalogue.matmul import matmul_kernels
from qserve.kernels.static_gate.catalogue.rows import row_kernels
from qserve.kernels.static_gate.spec import KernelSpec

FAMILIES = {
    "matmul": matmul_kernels,
    "matmul8": byte_kernels,
    "head": head_kernels,
    "attention": attention_kernels,
    "rows": row_kernels,
}
"""What the launch rules launch on a target, by the page of docs/reference that shows it."""


def production_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules launch on ``target``."""
    return [spec for kernels in FAMILIES.values() for spec in kernels(target)]
