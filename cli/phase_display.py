"""Progress of work that has phases: each has a display of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from qserve.cli.console import progress
from qserve.quant.quantities import format_seconds

if TYPE_CHECKING:
    from qserve.quant.progress import Phase, Progress


@contextmanager
def phase_display(
    phase: Phase, total: int, describe: Callable[[Progress], str]
) -> Iterator[Callable[[Progress], None]]:
    """A callback for the work. Its first phase is shown at once, a later one when it begins.

    total: of the first phase. describe: what to say beside a step.
    """
    with ExitStack() as shown:
        current, advance = phase, shown.enter_context(progress(phase.value, total))

        def follow(step: Progress) -> None:
            nonlocal current, advance
            if step.phase is not current:
                shown.close()
                current = step.phase
                advance = shown.enter_context(progress(current.value, step.total))
            advance(step.done, describe(step))

        yield follow


def describe_step(step: Progress) -> str:
    """What is worth knowing of a step that is done: the error of its block, its layers of experts
    that saw little text, what tuning has come to, the time left."""
    said = [] if step.error is None else [f"error {step.error:.2e}"]
    if step.kl is not None:
        said.append(f"KL {step.kl:.4f} on held-back text")
    if step.num_short_of_text:
        said.append(f"{step.num_short_of_text} layers short of text")
    return ", ".join([*said, f"{format_seconds(step.seconds_left)} left"])
