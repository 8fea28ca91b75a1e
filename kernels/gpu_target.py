"""The facts about a GPU that launch rules depend on, read from the device or from a table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch


class Vendor(Enum):
    """Whose compiler back end makes the machine code."""

    NVIDIA = "cuda"
    AMD = "hip"


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """One GPU, as far as launch rules and rooflines care.

    name: ``sm_90`` or ``gfx942``, the notation of the static gate.
    num_cores: streaming multiprocessors (NVIDIA) or compute units (AMD).
    shared_bytes: the most shared memory one thread block can have.
    """

    name: str
    vendor: Vendor
    num_cores: int
    shared_bytes: int


_KIB = 1024
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
_AMD_SHARED_KIB = {"gfx950": 160}

TARGETS = {
    target.name: target
    for target in (
        GpuTarget("sm_80", Vendor.NVIDIA, 108, 163 * _KIB),  # A100
        GpuTarget("sm_86", Vendor.NVIDIA, 72, 99 * _KIB),  # A10
        GpuTarget("sm_89", Vendor.NVIDIA, 142, 99 * _KIB),  # L40S
        GpuTarget("sm_90", Vendor.NVIDIA, 132, 227 * _KIB),  # H100 SXM
        GpuTarget("sm_100", Vendor.NVIDIA, 148, 227 * _KIB),  # B200
        GpuTarget("sm_120", Vendor.NVIDIA, 170, 99 * _KIB),  # RTX 5090
        GpuTarget("gfx942", Vendor.AMD, 304, 64 * _KIB),  # MI300X
    )
}
"""The targets the static gate knows, each as its most common part."""


@cache
def gpu_target(device: torch.device) -> GpuTarget:
    """The target that ``device`` is. Raises ``ValueError`` for a device that is no GPU."""
    if device.type != "cuda":
        raise ValueError(f"{device} is not a GPU: launch rules are for CUDA and ROCm devices")
    properties = torch.cuda.get_device_properties(device)
    num_cores = properties.multi_processor_count
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        kib = _AMD_SHARED_KIB.get(name, 64)
        return GpuTarget(name, Vendor.AMD, num_cores, kib * _KIB)
    capability = properties.major * 10 + properties.minor
    kib = _SHARED_KIB.get(capability, 99)  # what every part since Ampere has at least
    return GpuTarget(f"sm_{capability}", Vendor.NVIDIA, num_cores, kib * _KIB)
