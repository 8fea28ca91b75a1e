"""Chunks become the right rows, slots and tables."""

from __future__ import annotations

from array import array

import pytest

from qserve.serve.batch import Batch, BatchBuilder
from qserve.serve.messages import SamplingParams
from qserve.serve.scheduler import Chunk, Limits
from qserve.serve.sequence import Sequence


@pytest.fixture
def builder() -> BatchBuilder:
    return BatchBuilder(Limits(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=16), 4)


def make_sequence(tokens: range, blocks: list[int]) -> Sequence:
    sequence = Sequence("a", tuple(tokens), SamplingParams(max_tokens=1))
    sequence.block_table = array("i", blocks)
    return sequence


def lists(batch: Batch) -> dict[str, list[int]]:
    names = ("token_ids", "positions", "slot_mapping", "context_lens", "cu_seqlens_q")
    return {name: getattr(batch, name).tolist() for name in (*names, "sample_rows")}


def test_a_prompt_and_a_decode_row_lie_side_by_side(builder: BatchBuilder) -> None:
    prompt = make_sequence(range(100, 106), [7, 2])
    decode = make_sequence(range(200, 206), [1, 9])
    batch = builder.build([Chunk(prompt, 0, 6), Chunk(decode, 5, 6)])
    assert lists(batch) == {
        "token_ids": [100, 101, 102, 103, 104, 105, 205],
        "positions": [0, 1, 2, 3, 4, 5, 5],
        "slot_mapping": [28, 29, 30, 31, 8, 9, 37],
        "context_lens": [6, 6],
        "cu_seqlens_q": [0, 6, 7],
        "sample_rows": [5, 6],
    }
    assert batch.block_tables.shape == (2, 4)
    assert batch.block_tables[:, :2].tolist() == [[7, 2], [1, 9]]


def test_a_chunk_in_the_middle_of_a_prompt_is_not_sampled(builder: BatchBuilder) -> None:
    prompt = make_sequence(range(12), [3, 0, 1])
    batch = builder.build([Chunk(prompt, 3, 9)])
    assert lists(batch) == {
        "token_ids": [3, 4, 5, 6, 7, 8],
        "positions": [3, 4, 5, 6, 7, 8],
        "slot_mapping": [15, 0, 1, 2, 3, 4],
        "context_lens": [9],
        "cu_seqlens_q": [0, 6],
        "sample_rows": [],
    }


def test_a_chunk_of_one_row_is_like_a_longer_one(builder: BatchBuilder) -> None:
    prompt = make_sequence(range(12), [3, 0, 1])
    rows = [lists(builder.build([Chunk(prompt, i, i + 1)])) for i in range(12)]
    whole = lists(builder.build([Chunk(prompt, 0, 12)]))
    for name in ("token_ids", "positions", "slot_mapping"):
        assert [row[name][0] for row in rows] == whole[name]


def test_a_smaller_batch_shows_nothing_of_the_one_before(builder: BatchBuilder) -> None:
    builder.build([Chunk(make_sequence(range(9), [1, 2, 3]), 0, 9)])
    batch = builder.build([Chunk(make_sequence(range(50, 52), [4]), 1, 2)])
    assert lists(batch) == {
        "token_ids": [51],
        "positions": [1],
        "slot_mapping": [17],
        "context_lens": [2],
        "cu_seqlens_q": [0, 1],
        "sample_rows": [0],
    }


def test_every_index_tensor_has_the_type_the_kernels_read(builder: BatchBuilder) -> None:
    batch = builder.build([Chunk(make_sequence(range(3), [0]), 0, 3)])
    types = {name: str(getattr(batch, name).dtype) for name in Batch.__dataclass_fields__}
    assert types == {
        "token_ids": "torch.int64",
        "positions": "torch.int32",
        "slot_mapping": "torch.int32",
        "block_tables": "torch.int32",
        "context_lens": "torch.int32",
        "cu_seqlens_q": "torch.int32",
        "sample_rows": "torch.int64",
    }
