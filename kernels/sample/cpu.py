"""Native sampling: the rows of a batch over the threads."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension
from qserve.kernels.sample.batch import SamplingBatch


def sample_tokens(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The token of each row, -1 where there is none; adjusted logits are overwritten."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    changes = batch.adjustments
    adjusted = (0, 0, 0, 0, 0)
    if changes is not None:
        lists = (changes.starts, changes.token_ids, changes.biases, changes.counts)
        starts, token_ids, biases, counts = (entries.data_ptr() for entries in lists)
        adjusted = (starts, token_ids, biases, counts, changes.token_ids.shape[0])
    extension().sample_tokens(
        logits.data_ptr(),
        logits.stride()[0],
        logits.shape[0],
        logits.shape[1],
        batch.temperature.data_ptr(),
        batch.top_k.data_ptr(),
        batch.top_p.data_ptr(),
        batch.min_p.data_ptr(),
        batch.repetition_penalty.data_ptr(),
        batch.frequency_penalty.data_ptr(),
        batch.presence_penalty.data_ptr(),
        batch.uniforms.data_ptr(),
        *adjusted,
        tokens.data_ptr(),
    )
    return tokens
