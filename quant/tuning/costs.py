"""What tuning takes, from the headers of the model alone."""

from __future__ import annotations

from qserve.quant.decoder import Decoder
from qserve.quant.options import TuneOptions
from qserve.quant.tuning.divergence import POSITIONS_AT_ONCE
from qserve.quant.tuning.session import (
    STEPS_BETWEEN_JUDGEMENTS,
    TARGETS_AT_ONCE,
    WINDOWS_AT_ONCE,
)
from qserve.quant.tuning.windows import MAX_HELD_BACK

FLOAT_BYTES = 4
BYTES_PER_SCALE = 28
"""Share, gradient, two moments, average, and the average at the best step and at this one."""

LEFT_BYTES = 64 << 20
"""Of what gradients leave between pieces that are in use, measured."""

LOGITS_AT_ONCE = 6
"""Tables of logits that a divergence has in memory, see `tuning/divergence.py`."""

COPIES_OF_A_BLOCK = 3
"""Of its weights in the graph: centred codes, scaled ones, and those in the type of products."""

BLOCK_PASSES, HEAD_PASSES = 5, 6
"""What a step is made of, in passes through the blocks (the float model's, one without a graph, one
with it, and its gradient, which is two) and in products with an output head."""


class TuningCosts:
    """Memory and arithmetic of tuning a model in windows of ``length`` tokens.

    num_scales: of all layers. parameters: numbers in the largest block and in all of them.
    """

    def __init__(
        self, decoder: Decoder, length: int, num_scales: int, parameters: tuple[int, int]
    ) -> None:
        config = decoder.config
        self._length = length
        vocabulary, self._hidden = int(config.vocab_size), int(config.hidden_size)
        self._head = vocabulary * self._hidden
        self._logits = LOGITS_AT_ONCE * POSITIONS_AT_ONCE * vocabulary
        self._num_blocks = decoder.num_blocks
        self._num_scales = num_scales
        self._block, self._blocks = parameters

    @property
    def memory_bytes(self) -> int:
        """Beside the process: what learns, and the more of judging and of learning."""
        window = self._length * self._hidden
        judging = 4 * MAX_HELD_BACK * window + 2 * self._head + self._logits
        received = (self._num_blocks * WINDOWS_AT_ONCE + TARGETS_AT_ONCE) * window
        learning = received + max(self._head + self._logits, COPIES_OF_A_BLOCK * self._block)
        moving = BYTES_PER_SCALE * self._num_scales
        return FLOAT_BYTES * max(judging, learning) + moving + LEFT_BYTES

    def seconds(self, limit: TuneOptions, speed: float) -> float:
        """How long it goes on at the most, at so many operations a second."""
        limits = []
        if limit.minutes is not None:
            limits.append(60 * limit.minutes)
        if limit.steps is not None:
            limits.append(self._operations(limit.steps) / speed)
        return min(limits)

    def _operations(self, steps: int) -> float:
        """Of so many steps and of what is judged in between."""
        learned = 2.0 * WINDOWS_AT_ONCE * self._length
        judged = 2.0 * MAX_HELD_BACK * self._length
        judgements = 2 + steps // STEPS_BETWEEN_JUDGEMENTS
        of_a_step = learned * (BLOCK_PASSES * self._blocks + HEAD_PASSES * self._head)
        return steps * of_a_step + judgements * judged * (self._blocks + 2 * self._head)
