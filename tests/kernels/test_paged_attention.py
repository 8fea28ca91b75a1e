"""Paged attention: native kernels of every instruction set against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.kv_cache import KvFormat, LayerCache
from qserve.kernels.kv_codes import encode
from qserve.kernels.paged_attention import Scoring, paged_attention, reference

# Scores are sums of head_dim products below ~30, exponentials are good to 2e-7, and a result is a
# mean of values of size 1: 1e-5 is some ten times what was ever seen, and a hundredth of what one
# wrong position out of 500 changes.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Batch:
    """Arguments of one call, and how it was made."""

    q: torch.Tensor
    kv: LayerCache
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    scoring: Scoring

    def attend(self) -> torch.Tensor:
        return paged_attention(
            self.q,
            self.kv,
            self.block_tables,
            self.context_lens,
            self.cu_seqlens_q,
            self.scoring,
        )

    def attend_by_definition(self) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan)
        reference.paged_attention(
            self.q,
            self.kv,
            self.block_tables,
            self.context_lens,
            self.cu_seqlens_q,
            self.scoring,
            out,
        )
        return out

    def row_alone(self, sequence: int, row: int) -> Batch:
        """The same row as a decode step: only the positions it sees, nothing beside it."""
        start, stop = self.cu_seqlens_q[sequence : sequence + 2].tolist()
        seen = int(self.context_lens[sequence]) - (stop - start) + row + 1
        return Batch(
            q=self.q[start + row : start + row + 1],
            kv=self.kv,
            block_tables=self.block_tables[sequence : sequence + 1],
            context_lens=torch.tensor([seen], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            scoring=self.scoring,
        )


MakeBatch = Callable[..., Batch]


@pytest.fixture
def make_batch(generator: torch.Generator) -> MakeBatch:
    """Makes a batch of (queries, context) pairs over shuffled blocks; what is unused holds NaN, or
    codes under a scale that is NaN."""

    def make(
        sequences: list[tuple[int, int]],
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 32,
        block_size: int = 16,
        format: KvFormat = KvFormat.FLOAT16,
        scoring: Scoring | None = None,
    ) -> Batch:
        num_heads, num_kv_heads = heads
        counts = [-(-context // block_size) for _, context in sequences]
        shape = (sum(counts) + 2, num_kv_heads, block_size, head_dim)
        order = torch.randperm(shape[0], generator=generator).int()
        tables = torch.full((len(sequences), max(counts)), -1, dtype=torch.int32)
        k, v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        first = 0
        for index, (_, context) in enumerate(sequences):
            blocks = order[first : first + counts[index]]
            first += counts[index]
            tables[index, : len(blocks)] = blocks
            for position in range(context):
                slot = (int(blocks[position // block_size]), slice(None), position % block_size)
                k[slot] = torch.randn(num_kv_heads, head_dim, generator=generator)
                v[slot] = torch.randn(num_kv_heads, head_dim, generator=generator)
        starts = torch.tensor([0, *(rows for rows, _ in sequences)]).cumsum(0).int()
        width = num_heads * head_dim
        qkv = torch.randn(int(starts[-1]), width + 24, generator=generator)
        keys, values = encode(k, format), encode(v, format)
        return Batch(
            q=qkv[:, :width],  # rows lie apart, as they do in qkv
            kv=LayerCache(
                keys.codes, values.codes, keys.scales, values.scales, keys.offsets, values.offsets
            ),
            block_tables=tables,
            context_lens=torch.tensor([context for _, context in sequences], dtype=torch.int32),
            cu_seqlens_q=starts,
            scoring=scoring or Scoring(head_dim**-0.5),
        )

    return make


# One query each, one position, either side of a block and of a split of 128, whole prompts, chunks
# of a longer one, a sequence that has no query in this step.
RAGGED = [(1, 1), (1, 16), (1, 17), (5, 5), (3, 130), (1, 129), (0, 4), (40, 300), (1, 260)]


@pytest.mark.parametrize("format", KvFormat)
@pytest.mark.usefixtures("isa")
def test_a_ragged_batch_agrees_with_the_definition(format: KvFormat, make_batch: MakeBatch) -> None:
    batch = make_batch(RAGGED, format=format)
    difference = batch.attend() - batch.attend_by_definition()
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (5, 1), (8, 2), (9, 3)], ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
@pytest.mark.usefixtures("isa")
def test_every_number_of_heads_and_block_size_agrees_with_the_definition(
    heads: tuple[int, int], block_size: int, make_batch: MakeBatch
) -> None:
    batch = make_batch([(1, 140), (9, 20)], heads, 64, block_size, KvFormat.INT8)
    difference = batch.attend() - batch.attend_by_definition()
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("format", KvFormat)
@pytest.mark.parametrize("head_dim", [2, 16, 20, 40, 64, 72, 80, 96, 128, 256, 320])
@pytest.mark.usefixtures("isa")
def test_every_head_width_agrees_with_the_definition(
    head_dim: int, format: KvFormat, make_batch: MakeBatch
) -> None:
    batch = make_batch([(1, 140), (9, 20)], (3, 1), head_dim, 16, format)
    difference = batch.attend() - batch.attend_by_definition()
    assert difference.abs().max() < TOLERANCE


SCORINGS = [
    Scoring(0.2, window=1),
    Scoring(0.2, window=33),
    Scoring(0.2, window=200),
    Scoring(0.2, soft_cap=2.0),
    Scoring(0.2, sinks=torch.tensor([-2.0, 0.5, 40.0, 3.0])),
    Scoring(0.2, 130, 5.0, torch.tensor([-2.0, 0.5, 4.0, 3.0])),
]


@pytest.mark.parametrize("format", [KvFormat.FLOAT16, KvFormat.INT4])
@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
@pytest.mark.usefixtures("isa")
def test_windows_soft_caps_and_sinks_agree_with_the_definition(
    scoring: Scoring, format: KvFormat, make_batch: MakeBatch
) -> None:
    batch = make_batch(RAGGED, format=format, scoring=scoring)
    difference = batch.attend() - batch.attend_by_definition()
    assert difference.abs().max() < TOLERANCE


@pytest.mark.usefixtures("isa")
def test_blocks_before_the_window_are_not_needed(make_batch: MakeBatch) -> None:
    batch = make_batch([(1, 300), (7, 290)], scoring=Scoring(0.2, window=40))
    expected = batch.attend()
    batch.block_tables[:, : (283 - 40) // 16] = -1
    assert torch.equal(batch.attend(), expected)


@pytest.mark.parametrize("format", KvFormat)
@pytest.mark.parametrize(("head_dim", "scoring"), [(32, None), (40, None), (64, SCORINGS[-1])])
@pytest.mark.usefixtures("isa")
def test_a_row_has_the_same_bits_alone_and_in_a_chunk(
    head_dim: int, scoring: Scoring | None, format: KvFormat, make_batch: MakeBatch
) -> None:
    sequences = [(1, 1), (5, 5), (3, 130), (0, 4), (40, 300)]
    batch = make_batch(sequences, head_dim=head_dim, format=format, scoring=scoring)
    together = batch.attend()
    for sequence, (rows, _) in enumerate(sequences):
        for row in range(rows):
            alone = batch.row_alone(sequence, row).attend()
            assert torch.equal(alone[0], together[int(batch.cu_seqlens_q[sequence]) + row])


@pytest.mark.parametrize("format", KvFormat)
@pytest.mark.usefixtures("isa")
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_32(
    format: KvFormat, make_batch: MakeBatch
) -> None:
    batch = make_batch([(1, 7 * i + 1) for i in range(32)], head_dim=64, format=format)
    together = batch.attend()
    for sequence in range(32):
        assert torch.equal(batch.row_alone(sequence, 0).attend()[0], together[sequence])


@pytest.mark.usefixtures("isa", "restored_threads")
def test_the_number_of_threads_does_not_change_a_bit(make_batch: MakeBatch) -> None:
    batch = make_batch([(1, 900), (1, 3), (70, 200)])
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(batch.attend())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("format", [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.usefixtures("isa")
def test_a_code_off_by_one_exceeds_the_tolerance(
    name: str, format: KvFormat, make_batch: MakeBatch
) -> None:
    batch = make_batch([(1, 20), (2, 20)], format=format)
    before = batch.attend()
    codes = getattr(batch.kv, name).view(torch.uint8)
    codes[int(batch.block_tables[1, 0]), 1, 5, 3] ^= 1
    change = (batch.attend() - before).abs()
    assert change[1:, 64:].max() > 3 * TOLERANCE  # heads 2 and 3 read KV head 1
    assert change[:1].max() == 0 and change[1:, :64].max() == 0


@pytest.mark.usefixtures("isa")
def test_one_position_too_few_exceeds_the_tolerance(make_batch: MakeBatch) -> None:
    batch = make_batch([(1, 500)])
    shorter = batch.row_alone(0, 0)
    shorter.context_lens.fill_(499)
    assert (batch.attend() - shorter.attend()).abs().max() > 100 * TOLERANCE


@pytest.mark.usefixtures("isa")
def test_large_scores_do_not_overflow(make_batch: MakeBatch) -> None:
    batch = make_batch([(1, 200), (6, 150)])
    batch.q.mul_(1000)
    result = batch.attend()
    assert result.isfinite().all()
    # Scores of some thousands carry errors of some 1e-4, and so do their exponentials.
    assert (result - batch.attend_by_definition()).abs().max() < 5e-3


@pytest.mark.parametrize("window", [None, 1, 20, 400])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_definition_is_that_of_torch(
    window: int | None, soft_cap: float | None, has_sinks: bool, make_batch: MakeBatch
) -> None:
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0]) if has_sinks else None
    batch = make_batch([(1, 40), (9, 30)], scoring=Scoring(0.25, window, soft_cap, sinks))
    found = batch.attend_by_definition().unflatten(1, (4, 32))
    for sequence, row, context in [(0, 0, 40), *((1, 1 + i, 22 + i) for i in range(9))]:
        blocks = batch.block_tables[sequence].clamp(min=0).long()
        first = 0 if window is None else max(0, context - window)
        for head in range(4):
            k, v = (
                cache[blocks, head // 2].flatten(0, 1)[first:context].double()
                for cache in (batch.kv.k, batch.kv.v)
            )
            scores = 0.25 * k @ batch.q[row].unflatten(0, (4, 32))[head].double()
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = scores.exp()
            total = weights.sum() + (0.0 if sinks is None else float(sinks[head].exp()))
            expected = weights / total @ v
            assert torch.allclose(found[row, head].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4])
def test_quantized_keys_and_values_change_the_result_by_their_rounding(
    format: KvFormat, make_batch: MakeBatch
) -> None:
    batch = make_batch([(1, 300)], head_dim=64, format=KvFormat.FLOAT32)
    keys, values = encode(batch.kv.k, format), encode(batch.kv.v, format)
    rounded = LayerCache(
        keys.codes, values.codes, keys.scales, values.scales, keys.offsets, values.offsets
    )
    exact = batch.attend_by_definition()
    error = (replace(batch, kv=rounded).attend_by_definition() - exact).norm() / exact.norm()
    # Errors of 300 values average out; keys add their share. One bit more or less is a factor of 2.
    bounds = {KvFormat.FLOAT8: 0.04, KvFormat.INT8: 0.012, KvFormat.INT4: 0.15}
    assert bounds[format] / 4 < float(error) < bounds[format]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"window": 0}, ValueError),
        ({"soft_cap": 0.0}, ValueError),
        ({"sinks": torch.zeros(4).half()}, TypeError),
        ({"sinks": torch.zeros(4, 1)}, ValueError),
        ({"sinks": torch.zeros(5)}, ValueError),
    ],
    ids=["window", "soft cap", "dtype of sinks", "shape of sinks", "number of sinks"],
)
def test_a_scoring_that_does_not_fit_is_refused(
    changes: dict[str, Any], error: type[Exception], make_batch: MakeBatch
) -> None:
    batch = make_batch([(1, 20)])
    with pytest.raises(error):
        replace(batch, scoring=Scoring(0.25, **changes)).attend()


def test_an_output_that_is_given_is_written_and_returned(make_batch: MakeBatch) -> None:
    batch = make_batch([(2, 9)])
    out = torch.zeros(2, 128)
    result = paged_attention(
        batch.q,
        batch.kv,
        batch.block_tables,
        batch.context_lens,
        batch.cu_seqlens_q,
        batch.scoring,
        out=out,
    )
    assert result is out and torch.equal(out, batch.attend())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_tables", [[0, 1], [2, 99]]),
        ("block_tables", [[0, 1], [2, -1]]),
        ("block_tables", [[0], [2]]),
        ("context_lens", [2, 20]),
        ("context_lens", [20, 200]),
        ("cu_seqlens_q", [0, 3, 2]),
        ("cu_seqlens_q", [0, 3, 5]),
        ("cu_seqlens_q", [1, 3, 4]),
        ("cu_seqlens_q", [0, 4]),
    ],
)
@pytest.mark.usefixtures("isa")
def test_a_batch_that_points_outside_is_refused(
    name: str, value: list[int], make_batch: MakeBatch
) -> None:
    batch = make_batch([(3, 20), (1, 20)])
    arguments = {field: getattr(batch, field) for field in Batch.__slots__}
    arguments[name] = torch.tensor(value, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block|cu_seqlens_q|positions"):
        Batch(**arguments).attend()


@pytest.mark.parametrize(
    ("name", "convert", "error"),
    [
        ("context_lens", lambda t: t.long(), TypeError),
        ("block_tables", lambda t: t.T.contiguous().T, ValueError),
        ("context_lens", lambda t: t[:, None], ValueError),
        ("q", lambda t: t.half(), TypeError),
        ("q", lambda t: t[:, :100], ValueError),
        ("q", lambda t: t[0], ValueError),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    name: str,
    convert: Callable[[torch.Tensor], torch.Tensor],
    error: type[Exception],
    make_batch: MakeBatch,
) -> None:
    batch = make_batch([(3, 20), (1, 20)])
    arguments = {field: getattr(batch, field) for field in Batch.__slots__}
    arguments[name] = convert(arguments[name])
    with pytest.raises(error):
        Batch(**arguments).attend()
