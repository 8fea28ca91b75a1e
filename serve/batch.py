"""Chunks of sequences as the tensors that one forward pass reads."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from qserve.serve.scheduler import Chunk, Limits


@dataclass(frozen=True, slots=True)
class Batch:
    """One ragged batch: decode rows and prefill chunks side by side, sequence after sequence.

    token_ids: int64 ``[num_tokens]``. positions: int32 ``[num_tokens]``, in their sequence.
    slot_mapping: int32 ``[num_tokens]``, where each token's keys and values go.
    block_tables: int32 ``[num_seqs, max_blocks]``; what lies behind a sequence's blocks is stale.
    context_lens: int32 ``[num_seqs]``, tokens in the cache after this step.
    cu_seqlens_q: int32 ``[num_seqs + 1]``, where each sequence's rows begin and end.
    sample_rows: int64 ``[num_samples]``, the rows whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    sample_rows: torch.Tensor


class BatchBuilder:
    """Writes batches into arrays that are allocated once; a batch is valid until the next one."""

    def __init__(self, limits: Limits, block_size: int) -> None:
        num_tokens, num_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        max_blocks = -(-limits.max_model_len // block_size)
        self._block_size = block_size
        self._token_ids = np.zeros(num_tokens, dtype=np.int64)
        self._positions = np.zeros(num_tokens, dtype=np.int32)
        self._slot_mapping = np.zeros(num_tokens, dtype=np.int32)
        self._block_tables = np.zeros((num_seqs, max_blocks), dtype=np.int32)
        self._context_lens = np.zeros(num_seqs, dtype=np.int32)
        self._cu_seqlens_q = np.zeros(num_seqs + 1, dtype=np.int32)
        self._sample_rows = np.zeros(num_seqs, dtype=np.int64)
        self._decode_batches: dict[int, Batch] = {}  # by the number of sequences

    def build(self, chunks: Items[Chunk]) -> Batch:
        """The batch of ``chunks``, in order."""
        num_tokens = num_samples = 0
        for index, chunk in enumerate(chunks):
            self._write(index, chunk, num_tokens)
            num_tokens += chunk.num_tokens
            self._cu_seqlens_q[index + 1] = num_tokens
            if chunk.samples:
                self._sample_rows[num_samples] = num_tokens - 1
                num_samples += 1
        num_seqs = len(chunks)
        if num_seqs == num_samples == num_tokens:  # decode, where making views takes a while
            if num_seqs not in self._decode_batches:
                self._decode_batches[num_seqs] = self._view(num_tokens, num_seqs, num_samples)
            return self._decode_batches[num_seqs]
        return self._view(num_tokens, num_seqs, num_samples)

    def _view(self, num_tokens: int, num_seqs: int, num_samples: int) -> Batch:
        """The first entries of every array."""
        return Batch(
            token_ids=torch.from_numpy(self._token_ids[:num_tokens]),
            positions=torch.from_numpy(self._positions[:num_tokens]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:num_tokens]),
            block_tables=torch.from_numpy(self._block_tables[:num_seqs]),
            context_lens=torch.from_numpy(self._context_lens[:num_seqs]),
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_seqs + 1]),
            sample_rows=torch.from_numpy(self._sample_rows[:num_samples]),
        )

    def _write(self, index: int, chunk: Chunk, row: int) -> None:
        """Write one sequence's rows, the first of which is ``row``."""
        table, size = chunk.sequence.block_table, self._block_size
        self._block_tables[index, : len(table)] = table
        self._context_lens[index] = chunk.end
        if chunk.num_tokens == 1:  # a decode row; the general case costs ten times as much
            position = chunk.start
            self._token_ids[row] = chunk.sequence.token_ids[position]
            self._positions[row] = position
            self._slot_mapping[row] = table[position // size] * size + position % size
            return
        rows = slice(row, row + chunk.num_tokens)
        positions = np.arange(chunk.start, chunk.end, dtype=np.int32)
        blocks = self._block_tables[index, positions // size]
        self._token_ids[rows] = chunk.sequence.token_ids[chunk.start : chunk.end]
        self._positions[rows] = positions
        self._slot_mapping[rows] = blocks * size + positions % size
