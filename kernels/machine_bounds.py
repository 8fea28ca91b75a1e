"""What a machine can do at best, measured: the bounds that kernels are judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qserve.kernels import native
from qserve.kernels.cost import Cost
from qserve.kernels.timing import time_calls

PROBE_BYTES = 256 << 20
"""Memory that is read: several times what the caches of a processor hold."""

PROBE_STEPS = 40_000
"""Rounds of a task of the native loops: about a millisecond each."""

GPU_PROBE_BYTES = 1 << 30
MATMUL_SIZE = 8192
SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class MachineBounds:
    """Rates in units of 10^9 a second, with all threads or the whole GPU.

    read_gb_s: bytes from memory. int8_gmac_s: multiply-adds of bytes, with the fastest
    instruction of the set in use. float_gmac_s: multiply-adds in float32 on a CPU, in float16 on a
    GPU.
    """

    read_gb_s: float
    int8_gmac_s: float
    float_gmac_s: float

    def shortest_s(self, cost: Cost, *, is_int8: bool) -> float:
        """The shortest time that work of this cost can take here, in seconds (the roofline)."""
        rate = self.int8_gmac_s if is_int8 else self.float_gmac_s
        return cost.bound_s(1e9 * self.read_gb_s, 2e9 * rate)


class ReadMeter:
    """Measures how fast this CPU reads memory, as often as it is asked; holds what is read."""

    def __init__(self) -> None:
        if native.available():
            self._read = native.extension().MachineProbe(PROBE_BYTES).read
        else:
            memory = torch.ones(PROBE_BYTES // 4, dtype=torch.int32)
            self._read = memory.amax

    def gb_s(self, seconds: float) -> float:
        """The median rate of ``seconds``, in 10^9 bytes a second."""
        return PROBE_BYTES / time_calls(lambda _: self._read(), seconds).p50_s / 1e9


def measure_bounds(device: torch.device, seconds: float | None = None) -> MachineBounds:
    """The bounds of ``device``, each measured for ``seconds`` (``SECONDS`` by default); medians.

    A CPU without our native kernels is measured with PyTorch's reductions and float32 products.
    """
    seconds = SECONDS if seconds is None else seconds
    if device.type == "cuda":
        return _measure_gpu(device, seconds)
    read_gb_s = ReadMeter().gb_s(seconds)
    if not native.available():
        size = MATMUL_SIZE // 16
        a, b = torch.randn(size, size), torch.randn(size, size)
        gmac_s = size**3 / time_calls(lambda _: a @ b, seconds).p50_s / 1e9
        return MachineBounds(read_gb_s, int8_gmac_s=gmac_s, float_gmac_s=gmac_s)
    probe = native.extension().MachineProbe(0)

    def products(multiply: str) -> float:
        call = getattr(probe, multiply)
        num_products = call(4)  # the count grows with the steps alone
        timing = time_calls(lambda _: call(PROBE_STEPS), seconds)
        return float(num_products * (PROBE_STEPS // 4) / timing.p50_s / 1e9)

    return MachineBounds(read_gb_s, products("multiply_bytes"), products("multiply_floats"))


def _measure_gpu(device: torch.device, seconds: float) -> MachineBounds:
    """Memory is copied, which reads and writes; products are PyTorch's own."""
    source = torch.ones(GPU_PROBE_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda _: target.copy_(source), seconds, device)
    size = (MATMUL_SIZE, MATMUL_SIZE)
    a, b = (torch.randn(size, device=device).half() for _ in range(2))
    floats = time_calls(lambda _: a @ b, seconds, device)
    codes = torch.ones(size, dtype=torch.int8, device=device)
    # Both operands [row, input]: the layout that the int8 instructions take.
    ints = time_calls(lambda _: torch._int_mm(codes, codes.T), seconds, device)
    return MachineBounds(
        read_gb_s=2 * source.nbytes / copy.p50_s / 1e9,
        int8_gmac_s=MATMUL_SIZE**3 / ints.p50_s / 1e9,
        float_gmac_s=MATMUL_SIZE**3 / floats.p50_s / 1e9,
    )
