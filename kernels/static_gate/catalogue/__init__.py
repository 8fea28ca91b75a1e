"""The kernels as they run: every kind of launch that the launch rules give on a target."""

from __future__ import annotations

from qserve.kernels.gpu_target import GpuTarget
from qserve.kernels.static_gate.catalogue.attention import attention_kernels
from qserve.kernels.static_gate.catalogue.matmul import matmul_kernels
from qserve.kernels.static_gate.spec import KernelSpec


def production_kernels(target: GpuTarget) -> list[KernelSpec]:
    """What the launch rules launch on ``target``."""
    return [*matmul_kernels(target), *attention_kernels(target)]
