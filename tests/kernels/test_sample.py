"""Sampling of a batch: the rules by hand, the native kernel against the definition, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.sample import SamplingBatch, TokenAdjustments, reference, sample_tokens
from qserve.kernels.sample.batch import NOT_SEEN

Sample = Callable[[torch.Tensor, SamplingBatch], torch.Tensor]
EVERY_WAY = pytest.mark.parametrize(
    "sample", [sample_tokens, reference.sample_tokens], ids=["native", "reference"]
)
OFF: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def batch(uniforms: torch.Tensor, **settings: Any) -> SamplingBatch:
    """Rows with the same settings."""
    rows = uniforms.numel()
    vectors = {
        name: torch.full((rows,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in (OFF | settings).items()
    }
    return SamplingBatch(uniforms=uniforms.double(), adjustments=None, **vectors)


def adjusted(*entries: tuple[int, float, int]) -> TokenAdjustments:
    """Token, bias and count for a single row."""
    tokens, biases, counts = zip(*entries, strict=True)
    return TokenAdjustments(
        starts=torch.tensor([0, len(entries)], dtype=torch.int32),
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        biases=torch.tensor(biases, dtype=torch.float32),
        counts=torch.tensor(counts, dtype=torch.int32),
    )


def tokens_at(sample: Sample, logits: list[float], uniforms: list[float], **settings: Any) -> Any:
    rows = torch.tensor([logits] * len(uniforms))
    return sample(rows, batch(torch.tensor(uniforms, dtype=torch.float64), **settings)).tolist()


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


@EVERY_WAY
def test_the_token_is_where_the_running_sum_passes_the_uniform(sample: Sample) -> None:
    found = tokens_at(sample, LOGITS, [0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 1 - 2**-53])
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]


@EVERY_WAY
def test_temperature_sharpens(sample: Sample) -> None:
    # Squared: 1, 16, 4 and 9 of 30.
    found = tokens_at(sample, LOGITS, [0.03, 0.04, 0.56, 0.57, 0.69, 0.71], temperature=0.5)
    assert found == [0, 1, 1, 2, 2, 3]


@EVERY_WAY
def test_a_temperature_of_zero_takes_the_largest_and_of_equals_the_lowest(sample: Sample) -> None:
    assert tokens_at(sample, [1.0, 3.0, 3.0, 2.0], [0.9], temperature=0.0) == [1]
    assert tokens_at(sample, [1.0, 3.0, 3.0, 2.0], [0.9], temperature=1e-6) == [1]


@EVERY_WAY
def test_top_k_keeps_the_largest_and_what_equals_the_last(sample: Sample) -> None:
    assert tokens_at(sample, LOGITS, [0.0, 0.57, 0.58], top_k=2) == [1, 1, 3]  # 0.4 of 0.7
    assert tokens_at(sample, [1.0, 2.0, 2.0, 0.0], [0.0, 0.49, 0.51], top_k=1) == [1, 1, 2]
    assert tokens_at(sample, LOGITS, [0.0, 0.99], top_k=9) == [0, 3]


@EVERY_WAY
def test_min_p_drops_what_is_far_below_the_most_likely(sample: Sample) -> None:
    assert tokens_at(sample, LOGITS, [0.0, 0.57, 0.58, 0.99], min_p=0.6) == [1, 1, 3, 3]
    assert tokens_at(sample, LOGITS, [0.0, 0.99], min_p=1.0) == [1, 1]


@EVERY_WAY
def test_top_p_keeps_the_shortest_run_that_reaches_the_mass(sample: Sample) -> None:
    assert tokens_at(sample, LOGITS, [0.0, 0.57, 0.58, 0.99], top_p=0.65) == [1, 1, 3, 3]
    assert tokens_at(sample, LOGITS, [0.0, 0.99], top_p=0.0) == [1, 1]
    assert tokens_at(sample, [0.0] * 4, [0.0, 0.49, 0.51], top_p=0.5) == [0, 0, 1]


@EVERY_WAY
def test_top_p_is_of_what_top_k_leaves(sample: Sample) -> None:
    assert tokens_at(sample, LOGITS, [0.0, 0.99], top_k=2, top_p=0.55) == [1, 1]  # 0.4 of 0.7


@EVERY_WAY
def test_biases_and_penalties_apply_in_order(sample: Sample) -> None:
    settings = batch(
        torch.tensor([0.5]),
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    seen = adjusted((0, 1.0, 2), (1, 0.0, 0), (2, 0.5, NOT_SEEN))
    # 0: (3 + 1) / 2 - 2 * 0.25 - 0.5 = 1; 1: -1 * 2 = -2; 2: 0.25 + 0.5; 3 as it is.
    for third, expected in ((0.9, 0), (1.1, 3)):
        logits = torch.tensor([[3.0, -1.0, 0.25, third]])
        assert sample(logits, replace(settings, adjustments=seen)).tolist() == [expected]


@EVERY_WAY
def test_a_forbidden_token_is_not_drawn(sample: Sample) -> None:
    for uniform in (0.0, 0.5, 1 - 2**-53):
        settings = replace(
            batch(torch.tensor([uniform], dtype=torch.float64)),
            adjustments=adjusted((0, -math.inf, NOT_SEEN), (3, -math.inf, 1)),
        )
        assert sample(torch.tensor([[5.0, 1.0, 1.0, 9.0]]), settings).item() in (1, 2)


@EVERY_WAY
def test_a_row_that_overflowed_gives_no_token(sample: Sample) -> None:
    rows = torch.zeros(4, 700)
    rows[0, 650] = torch.nan
    rows[1, 3] = torch.inf
    rows[2] = -torch.inf
    for temperature in (0.0, 1.0):
        found = sample(rows.clone(), batch(torch.full((4,), 0.0), temperature=temperature))
        assert found.tolist() == [-1, -1, -1, 0]


FILTERS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 900},
    {"min_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.9999, "temperature": 4.0},
    {"temperature": 0.8, "min_p": 0.02, "top_k": 40, "top_p": 0.9},
)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("size", [1, 16, 255, 1027, 12000])
@pytest.mark.usefixtures("isa")
def test_the_native_draws_are_those_of_the_definition(
    size: int, settings: dict[str, float], generator: torch.Generator
) -> None:
    logits = torch.randn(12, size, generator=generator) * 3
    uniforms = torch.rand(12, generator=generator, dtype=torch.float64)
    settings_of_rows = batch(uniforms, **settings)
    expected = reference.sample_tokens(logits, settings_of_rows)
    found = sample_tokens(logits.clone(), settings_of_rows)
    # Sums of weights differ by 1e-6 of the total at most: rarely, a uniform falls in between.
    assert (found != expected).sum() <= (1 if size > 1000 else 0)


@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_alone_and_in_a_batch_of_32_draws_the_same(generator: torch.Generator) -> None:
    logits = torch.randn(32, 3000, generator=generator) * 3
    uniforms = torch.rand(32, generator=generator, dtype=torch.float64)
    for settings in FILTERS:
        native.set_num_threads(2)
        together = sample_tokens(logits.clone(), batch(uniforms, **settings))
        native.set_num_threads(1)
        for row in range(32):
            alone = batch(uniforms[row : row + 1], **settings)
            assert sample_tokens(logits[row : row + 1].clone(), alone) == together[row]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.95, "top_k": 50}])
def test_draws_follow_the_distribution(
    settings: dict[str, float], generator: torch.Generator
) -> None:
    """Chi-square with a fixed seed; the bound is the 99.9th percentile of its normal limit."""
    num_draws, size = 20000, 600
    logits = torch.randn(size, generator=generator) * 2
    uniforms = torch.rand(num_draws, generator=generator, dtype=torch.float64)
    found = sample_tokens(logits.expand(num_draws, size), batch(uniforms, **settings))
    one_row = batch(torch.zeros(1), **settings)
    scaled = logits / one_row.temperature
    weights = reference._weigh(scaled - scaled.max(), one_row, 0)
    expected = num_draws * weights / weights.sum()
    counts = torch.bincount(found, minlength=size).double()
    assert not counts[expected == 0].any()
    frequent = expected >= 5
    rest = expected[~frequent].sum(), counts[~frequent].sum()
    statistic = float(((counts - expected)[frequent] ** 2 / expected[frequent]).sum())
    if rest[0] > 0:
        statistic += float((rest[1] - rest[0]) ** 2 / rest[0])
    freedom = int(frequent.sum()) - (0 if rest[0] > 0 else 1)
    assert statistic <= freedom + 3.1 * math.sqrt(2 * freedom)


def test_a_logit_off_by_a_tenth_fails_the_statistics(generator: torch.Generator) -> None:
    logits = torch.tensor([0.0, 0.0])
    uniforms = torch.rand(20000, generator=generator, dtype=torch.float64)
    share = {
        shift: float(
            (sample_tokens((logits + torch.tensor([0.0, shift])).expand(20000, 2), batch(uniforms)))
            .double()
            .mean()
        )
        for shift in (0.0, 0.1)
    }
    deviation = 0.5 / math.sqrt(20000)
    assert abs(share[0.0] - 0.5) < 3.3 * deviation < abs(share[0.1] - 0.5)


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits, good = torch.zeros(2, 8), batch(torch.zeros(2))
    with pytest.raises(ValueError, match="expected"):
        sample_tokens(torch.zeros(3, 8), good)
    with pytest.raises(TypeError, match="float64"):
        sample_tokens(logits, replace(good, uniforms=torch.zeros(2)))
    with pytest.raises(TypeError, match="expected"):
        sample_tokens(logits.half(), good)
    outside = TokenAdjustments(
        starts=torch.tensor([0, 1, 2], dtype=torch.int32),
        token_ids=torch.tensor([3, 8], dtype=torch.int32),
        biases=torch.zeros(2),
        counts=torch.zeros(2, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="token 8"):
        sample_tokens(logits, replace(good, adjustments=outside))
    starts = torch.tensor([0, 3, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected"):
        sample_tokens(logits, replace(good, adjustments=replace(outside, starts=starts)))
    with pytest.raises(ValueError, match="expected"):
        replace(good, adjustments=replace(outside, starts=starts[:2]))
    with pytest.raises(TypeError, match="expected"):
        replace(outside, counts=torch.zeros(2))
