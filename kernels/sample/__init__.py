"""The next token of every row of a batch, drawn from its logits."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.rows import check_rows
from qserve.kernels.sample import cpu, reference
from qserve.kernels.sample.batch import (
    GREEDY_BELOW,
    NOT_SEEN,
    SamplingBatch,
    TokenAdjustments,
)

__all__ = ["GREEDY_BELOW", "NOT_SEEN", "SamplingBatch", "TokenAdjustments", "sample_tokens"]


def sample_tokens(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The token of each row, int64 ``[M]``; -1 for a row that cannot be sampled from.

    logits: ``[M, V]``, float32 on a CPU; may be overwritten. A row is treated in this order, which
    is that of vLLM and of transformers: biases, repetition penalty, frequency and presence
    penalties; if its temperature is below ``GREEDY_BELOW``, the largest logit (of equals the lowest
    id). Else division by the temperature; min-p: tokens less likely than ``min_p`` times the most
    likely go; top-k: the ``top_k`` most likely stay, and what equals the last of them; top-p: the
    shortest run of tokens, most likely first (of equals the lowest id), that holds ``top_p`` of
    what is left. The token is where the running sum of the weights of what is left, in the order of
    ids, passes ``uniform`` of their total; the sums are in double precision. A row cannot be
    sampled from when its largest logit is not finite or one is NaN, before or after adjustments. A
    row's token does not depend on the other rows. Raises ``ValueError`` for shapes and
    ``TypeError`` for dtypes that do not fit.
    """
    check_rows("logits", logits, logits.shape[-1])
    batch.check(logits)
    backend = choose("sample", logits.device).backend
    if backend is Backend.CPU:
        return cpu.sample_tokens(logits, batch)
    if backend is Backend.TRITON:
        tokens: torch.Tensor = load_kernel("sample").sample_tokens(logits, batch)
        return tokens
    return reference.sample_tokens(logits, batch)
