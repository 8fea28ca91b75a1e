"""The work of one launch, for rooflines: what must be moved and what must be computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that cross the device memory at least once, and floating point operations."""

    num_bytes: int
    flops: int

    def bound_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The shortest time a device with these peaks can take, in seconds (the roofline)."""
        return max(self.num_bytes / bytes_per_s, self.flops / flops_per_s)
