"""How long calls take: percentiles of many, since whatever else the machine does only ever adds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_CALLS = 5
GPU_CALLS_AT_ONCE = 20
"""Calls between two looks at the clock on a GPU: enough that launches are queued ahead of it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the 20th, 50th and 80th percentile of ``num_calls``."""

    p20_s: float
    p50_s: float
    p80_s: float
    num_calls: int


def time_calls(
    call: Callable[[int], object], seconds: float, device: torch.device | None = None
) -> Timing:
    """The timing of ``call(number)``, called for about ``seconds`` and at least five times.

    The first call is not counted. device: a GPU that the call gives work to; what is measured is
    then the GPU's time, as a mean over some calls at a time.
    """
    if device is not None and device.type == "cuda":
        return summarize(_time_on_gpu(call, seconds, device))
    call(0)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < MIN_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call(len(samples))
        samples.append(time.perf_counter() - start)
    return summarize(samples)


def summarize(samples: list[float]) -> Timing:
    """The percentiles of ``samples``, each the sample at its rank. Raises ``ValueError`` when there
    are none."""
    if not samples:
        raise ValueError("no samples: nothing was measured")
    ordered = sorted(samples)
    last = len(ordered) - 1
    p20, p50, p80 = (ordered[round(share * last)] for share in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(ordered))


def _time_on_gpu(
    call: Callable[[int], object], seconds: float, device: torch.device
) -> list[float]:
    stream = torch.cuda.current_stream(device)
    call(0)  # compiles
    samples: list[float] = []
    end = time.perf_counter() + seconds
    number = 0
    while len(samples) < MIN_CALLS or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for _ in range(GPU_CALLS_AT_ONCE):
            call(number)
            number += 1
        stop.record(stream)
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / GPU_CALLS_AT_ONCE)
    return samples
