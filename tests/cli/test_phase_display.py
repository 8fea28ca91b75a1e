"""What is said beside a step of a long run."""

from __future__ import annotations

from qserve.cli.phase_display import describe_step
from qserve.quant.progress import Phase, Progress


def test_a_step_says_its_error_what_saw_little_text_and_the_time_left() -> None:
    assert describe_step(Progress(Phase.EVALUATE, 1, 4, 6.0)) == "6.0 s left"
    step = Progress(Phase.QUANTIZE, 1, 4, 6.0, error=0.0123, num_short_of_text=3)
    assert describe_step(step) == "error 1.23e-02, 3 layers short of text, 6.0 s left"
    tuned = Progress(Phase.TUNE, 20, 60, 40.0, kl=0.05938)
    assert describe_step(tuned) == "KL 0.0594 on held-back text, 40.0 s left"
