"""How the Triton sampler is launched: pure functions of the shapes."""

from __future__ import annotations

from qserve.kernels.cost import Cost

BLOCK = 4096
"""Logits of a trip: 32 of each lane in four warps."""

NUM_WARPS = 4

SEARCH_PASSES = 30
"""Passes that find a threshold among the float32 weights from 2 ** -42 to 1, a bit a pass."""


def sample_cost(num_rows: int, vocabulary: int) -> Cost:
    """The work of one pass over the logits. Greedy rows take one, sampled rows three, top-k and
    top-p ``SEARCH_PASSES`` each; all but the first are served by a cache."""
    return Cost(num_bytes=4 * num_rows * vocabulary, flops=num_rows * vocabulary)
