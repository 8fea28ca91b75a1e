"""What a long run tells its caller while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class Phase(Enum):
    """The part of a run that is under way; the value reads well as a title."""

    CALIBRATION = "calibration text"
    MEASURE = "measuring layers"
    QUANTIZE = "quantizing"
    TUNE = "tuning"
    CACHE = "scales of keys and values"
    EVALUATE = "evaluating"


@dataclass(frozen=True, slots=True)
class Progress:
    """A step that has just been finished.

    done, total: finished and expected steps of this phase (decoder blocks when
        quantizing or finding scales; steps or seconds, whichever limits it, when tuning).
    error: relative output error of the block just quantized; None where there is none.
    seconds_left: estimate for this phase, from the pace so far.
    num_short_of_text: layers of the block that too few tokens go to, see ``LayerReport``.
    kl: when tuning, the divergence from the float model on what is held back; None before it is
        known.
    """

    phase: Phase
    done: int
    total: int
    seconds_left: float
    error: float | None = None
    num_short_of_text: int = 0
    kl: float | None = None


ProgressCallback: TypeAlias = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """A callback that shows nothing."""


class Pace:
    """Counts the finished steps of a phase and says how long the rest will take."""

    def __init__(self, progress: ProgressCallback, phase: Phase, total: int) -> None:
        self._progress = progress
        self._phase = phase
        self._total = total
        self._done = 0
        self._started = time.perf_counter()

    def step(self) -> None:
        """Tell that another step is finished."""
        self._done += 1
        pace = (time.perf_counter() - self._started) / self._done
        left = pace * (self._total - self._done)
        self._progress(Progress(self._phase, self._done, self._total, left))
