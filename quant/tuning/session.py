"""Tuning a packed checkpoint: group scales and norm weights learn from the float model.

The loss is the divergence KL(float || quantized) of the next-token distributions. The method is
Adam on shares (see ``State``) at a rate that does not depend on how long there is; what counts is a
running average of its states in which later ones weigh more (polynomial decay: Shamir & Zhang 2013,
arXiv 1212.1824). So a run that the clock stops after n steps is the beginning of every longer one,
and asking for n steps repeats it to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import torch

from qserve.quant.decoder import Decoder
from qserve.quant.evaluate import final_hidden
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.overwriting import overwrite_tensors
from qserve.quant.formats.writer import Writer
from qserve.quant.options import TuneOptions
from qserve.quant.progress import Phase, Progress, ProgressCallback
from qserve.quant.report import TuningReport
from qserve.quant.tuning.divergence import Divergence
from qserve.quant.tuning.tuned_decoder import State, TunedDecoder
from qserve.quant.tuning.windows import TuningWindows
from qserve.quant.windows import Windows

WINDOWS_AT_ONCE = 2
TARGETS_AT_ONCE = 4 * WINDOWS_AT_ONCE
"""Windows that the float model reads together: it is read from the disk every time."""

SCALE_RATE = 5e-4
NORM_RATE = 2e-4
"""Lower, since a number of a norm moves a column in all rows of several layers."""

WARM_UP_STEPS = 5
BETAS = (0.9, 0.99)
EPSILON = 1e-15
"""Far below any gradient: of a share it is the smaller, the more scales there are."""

AVERAGE_POWER = 8
"""How much later states weigh more in the average: step k weighs about ``(k / n)^8``."""

STEPS_BETWEEN_JUDGEMENTS = 20
PATIENCE = 3
"""Judgements in a row without an improvement that end the run."""


def tune(
    folder: Path,
    source: Checkpoint,
    windows: TuningWindows,
    options: TuneOptions,
    writer: Writer,
    progress: ProgressCallback,
) -> TuningReport:
    """Improve the packed checkpoint in ``folder``, which nobody else may have open, in place.

    Codes, zero points and everything else but group scales and norm weights keep their bytes. When
    nothing is better on what was held back, all of them do. source: the float model. writer: of the
    format of ``folder``. Raises ``CheckpointError`` for a damaged source.
    """
    clock = _Clock(options, progress)
    clock.report(0)
    session = _Session(Checkpoint(folder), source, windows)
    clock.note_ready()
    before = best = session.judge(0)
    clock.note_judgement()
    clock.report(0, best.kl)
    step, goes_on = 0, clock.allows(0)
    while goes_on:
        step += 1
        session.learn(step)
        goes_on = clock.allows(step)
        if not goes_on or step % STEPS_BETWEEN_JUDGEMENTS == 0:
            best = min(best, session.judge(step), key=lambda judgement: judgement.kl)
            goes_on = goes_on and step - best.step < PATIENCE * STEPS_BETWEEN_JUDGEMENTS
        clock.report(step, best.kl)
    overwrite_tensors(folder, session.stored(best, writer))
    return TuningReport(
        steps=step,
        kept_step=best.step,
        num_windows=step * WINDOWS_AT_ONCE,
        num_held_back=len(windows.held_back),
        kl_before=before.kl,
        kl_after=best.kl,
        arithmetic=str(session.arithmetic).removeprefix("torch."),
        seconds=clock.elapsed(),
    )


@dataclass(frozen=True, slots=True)
class _Judgement:
    """The mean divergence on what was held back, of a state after a number of steps."""

    step: int
    kl: float
    state: State = field(repr=False)


class _Session:
    """What is learned, and from what."""

    def __init__(self, packed: Checkpoint, source: Checkpoint, windows: TuningWindows) -> None:
        self.arithmetic = fast_arithmetic()
        self._tuned = TunedDecoder(packed, self.arithmetic)
        self._float = Decoder(source)
        self._windows = windows
        self._divergence = Divergence(self._float, self._tuned, self.arithmetic)
        self._expected = final_hidden(self._float, windows.held_back.token_ids, _nothing)
        self._average = self._tuned.unmoved()
        self._state = {n: share.clone().requires_grad_() for n, share in self._average.items()}
        scales = [share for name, share in self._state.items() if name not in packed]
        norms = [share for name, share in self._state.items() if name in packed]
        self._optimizer = torch.optim.Adam(
            [{"params": scales, "rate": SCALE_RATE}, {"params": norms, "rate": NORM_RATE}],
            betas=BETAS,
            eps=EPSILON,
        )
        self._lessons = self._lessons_in_turn()

    def learn(self, step: int) -> None:
        """Take the next windows, and the step that follows from them."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, step / WARM_UP_STEPS)
        self._optimizer.zero_grad()
        self._tuned.learn(*next(self._lessons), self._divergence, self._state)
        self._optimizer.step()
        weight = (AVERAGE_POWER + 1) / (AVERAGE_POWER + step)
        for name, share in self._state.items():
            self._average[name].lerp_(share.detach(), weight)

    def judge(self, step: int) -> _Judgement:
        """The average of the states so far, as it would be stored."""
        state = {name: share.clone() for name, share in self._average.items()} if step else {}
        self._tuned.state = state
        windows = self._windows.held_back
        hidden = final_hidden(self._tuned, windows.token_ids, _nothing)
        counts = windows.counts
        return _Judgement(
            step, self._divergence.mean(self._expected[counts], hidden[counts]), state
        )

    def stored(self, judgement: _Judgement, writer: Writer) -> dict[str, torch.Tensor]:
        """The tensors that the state of a judgement changes."""
        self._tuned.state = judgement.state
        return self._tuned.stored(writer)

    def _lessons_in_turn(self) -> Iterator[tuple[Windows, torch.Tensor]]:
        """The windows of one step after another, with the float model's final hidden states."""
        order = _shuffled(len(self._windows.learned))
        while True:
            windows = self._windows.learned[list(islice(order, TARGETS_AT_ONCE))]
            with torch.autocast("cpu", self.arithmetic, self.arithmetic is not torch.float32):
                targets = final_hidden(self._float, windows.token_ids, _nothing)
            yield from zip(
                windows.split(WINDOWS_AT_ONCE), targets.split(WINDOWS_AT_ONCE), strict=True
            )


class _Clock:
    """What ends a run: a number of steps, or the time that is left for another one."""

    def __init__(self, options: TuneOptions, progress: ProgressCallback) -> None:
        self._started = time.perf_counter()
        self._options = options
        self._progress = progress
        self._ready = self._learning = 0.0

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._started

    def note_ready(self) -> None:
        """The first judgement begins."""
        self._ready = self.elapsed()

    def note_judgement(self) -> None:
        """The first judgement is over, and learning begins."""
        self._learning = self.elapsed()

    def allows(self, steps: int) -> bool:
        """Whether there is time for another step and a judgement after ``steps``."""
        if self._options.steps is not None and steps >= self._options.steps:
            return False
        if self._options.minutes is None:
            return True
        judgement = self._learning - self._ready
        return self.elapsed() + self._pace(steps) + judgement <= 60 * self._options.minutes

    def report(self, steps: int, kl: float | None = None) -> None:
        """Tell the caller how far the run is: in steps if only they limit it, else in seconds.

        kl: the least so far on what was held back.
        """
        if self._options.minutes is not None:
            elapsed, total = self.elapsed(), 60 * self._options.minutes
            done, left = int(elapsed), total - elapsed
        elif steps:
            done, total = steps, self._options.steps or steps
            left = self._pace(steps) * (total - done)
        else:
            return  # without a pace nobody knows how long it takes
        self._progress(Progress(Phase.TUNE, done, max(int(total), done), max(left, 0.0), kl=kl))

    def _pace(self, steps: int) -> float:
        """Seconds of a step so far, with its share of the judgements."""
        return (self.elapsed() - self._learning) / steps if steps else 0.0


def fast_arithmetic() -> torch.dtype:
    """The type of products while learning: bfloat16 where the processor multiplies it."""
    abilities = torch.cpu.get_capabilities()
    is_fast = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if is_fast else torch.float32


def _shuffled(num_windows: int) -> Iterator[int]:
    """All windows in random order, again and again; the same whenever it is asked."""
    generator = torch.Generator().manual_seed(0)
    for _ in count():
        yield from torch.randperm(num_windows, generator=generator).tolist()


def _nothing() -> None:
    """No progress is told."""
