"""Each rule of sampling on a vocabulary that can be worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qserve.serve.messages import SamplingParams
from qserve.serve.sampler import (
    SamplingError,
    TokenSampler,
    invert,
    largest,
    log_softmax,
    most_likely,
    nucleus,
)

Row = NDArray[np.float32]


def row(*values: float) -> Row:
    return np.array(values, dtype=np.float32)


def sampler(
    prompt: tuple[int, ...] = (), ends: tuple[int, ...] = (), **params: Any
) -> TokenSampler:
    return TokenSampler(SamplingParams(**({"max_tokens": 100} | params)), prompt, ends)


def draw(one: TokenSampler, *logits: float) -> int:
    return one.draw(row(*logits))[0]


def frequencies(logits: Row, count: int = 4000, **params: Any) -> list[float]:
    """How often each token is drawn."""
    one = sampler(**({"seed": 1} | params))
    drawn = Counter(one.draw(logits.copy())[0] for _ in range(count))
    return [drawn[token] / count for token in range(logits.size)]


def test_greedy_takes_the_most_likely_and_of_equals_the_lowest_id() -> None:
    assert draw(sampler(temperature=0.0), 1.0, 3.0, 3.0, 2.0) == 1
    assert draw(sampler(temperature=1e-6), 1.0, 3.0, 3.0, 2.0) == 1


def test_draws_follow_the_softmax() -> None:
    probabilities = [0.1, 0.2, 0.3, 0.4]
    found = frequencies(np.log(row(*probabilities)))
    assert found == pytest.approx(probabilities, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    logits = np.log(row(0.2, 0.8))
    assert frequencies(logits, temperature=0.5)[1] == pytest.approx(0.64 / 0.68, abs=0.02)
    assert frequencies(logits, temperature=2.0)[1] == pytest.approx(2 / 3, abs=0.03)


def test_top_k_keeps_the_largest_and_ties_at_the_border() -> None:
    found = frequencies(row(1.0, 2.0, 2.0, 0.0), top_k=1)
    assert found[0] == found[3] == 0.0
    assert found[1] == pytest.approx(0.5, abs=0.03)


def test_min_p_drops_what_is_far_below_the_most_likely() -> None:
    found = frequencies(np.log(row(0.5, 0.3, 0.15, 0.05)), min_p=0.5)
    assert found == pytest.approx([0.625, 0.375, 0.0, 0.0], abs=0.03)


def test_top_p_keeps_the_shortest_prefix_that_reaches_the_mass() -> None:
    found = frequencies(np.log(row(0.15, 0.5, 0.05, 0.3)), top_p=0.75)
    assert found == pytest.approx([0.0, 0.625, 0.0, 0.375], abs=0.03)


def test_top_p_always_keeps_a_token() -> None:
    assert frequencies(np.log(row(0.4, 0.6)), count=50, top_p=1e-9) == [0.0, 1.0]
    assert frequencies(np.log(row(0.4, 0.6)), count=50, top_p=0.0) == [0.0, 1.0]


def test_top_p_applies_after_top_k() -> None:
    logits = np.log(row(0.4, 0.3, 0.2, 0.1))
    found = frequencies(logits, top_k=2, top_p=0.55)  # 0.4 of the 0.7 left is 57 %
    assert found == [1.0, 0.0, 0.0, 0.0]


def test_the_filters_together_agree_with_a_plain_definition() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=200).astype(np.float32) * 2
    scaled = logits.astype(np.float64) / 0.8
    kept = scaled >= scaled.max() + math.log(0.02)
    kept &= scaled >= np.sort(np.where(kept, scaled, -np.inf))[-40]
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= 0.9]] = 0.0
    weights /= weights.sum()
    found = frequencies(
        logits, count=20000, temperature=0.8, min_p=0.02, top_k=40, top_p=0.9, seed=3
    )
    assert {i for i, f in enumerate(found) if f} <= set(np.flatnonzero(weights).tolist())
    assert found == pytest.approx(weights.tolist(), abs=0.015)


def test_frequency_penalty_counts_the_output() -> None:
    one = sampler(prompt=(1,), temperature=0.0, frequency_penalty=0.4)
    drawn = [draw(one, 0.0, 1.0, 0.3) for _ in range(3)]
    assert drawn == [1, 1, 2]  # 1.0, then 0.6, then 0.2


def test_presence_penalty_does_not_grow() -> None:
    one = sampler(temperature=0.0, presence_penalty=0.4)
    assert [draw(one, 0.0, 1.0, 0.5) for _ in range(4)] == [1, 1, 1, 1]
    one = sampler(temperature=0.0, presence_penalty=0.6)
    assert [draw(one, 0.0, 1.0, 0.5) for _ in range(4)] == [1, 2, 1, 1]


def test_repetition_penalty_knows_the_prompt_and_both_signs() -> None:
    one = sampler(prompt=(1,), temperature=0.0, repetition_penalty=2.0)
    assert draw(one, 0.9, 1.0, 0.6) == 0
    assert draw(one, 0.9, 1.0, 0.6) == 2
    negative = sampler(prompt=(1,), temperature=0.0, repetition_penalty=2.0)
    assert draw(negative, -1.5, -1.0, -3.0) == 0  # -1.0 becomes -2.0


def test_logit_bias_can_force_and_forbid() -> None:
    forced = sampler(temperature=0.0, logit_bias=((2, 100.0),))
    assert draw(forced, 5.0, 4.0, -5.0) == 2
    forbidden = sampler(temperature=1.0, seed=0, logit_bias=((0, -100.0),))
    assert {draw(forbidden, 5.0, 4.0, 4.0) for _ in range(30)} == {1, 2}


def test_end_tokens_cannot_be_drawn_before_min_tokens() -> None:
    one = sampler(ends=(0, 3), temperature=0.0, min_tokens=2)
    assert [draw(one, 9.0, 2.0, 1.0, 8.0) for _ in range(3)] == [1, 1, 0]


def test_a_seed_gives_the_same_draws_whatever_else_is_drawn_between() -> None:
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    alone = sampler(seed=42)
    expected = [alone.draw(logits.copy())[0] for _ in range(20)]
    again, other = sampler(seed=42), sampler(seed=7)
    found = []
    for _ in range(20):
        other.draw(logits.copy())
        found.append(again.draw(logits.copy())[0])
    assert found == expected
    assert len(set(expected)) > 5


def test_seeds_of_either_sign_differ() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    draws = {seed: draw_once(seed, logits) for seed in (-1, 1, 0, 2**63 - 1, -(2**63))}
    assert len(set(draws.values())) == len(draws)


def draw_once(seed: int, logits: Row) -> int:
    return sampler(seed=seed).draw(logits.copy())[0]


def test_without_a_seed_draws_are_not_repeated() -> None:
    logits = np.zeros(100000, dtype=np.float32)
    assert sampler().draw(logits.copy())[0] != sampler().draw(logits.copy())[0]


def test_logprobs_are_raw_and_of_the_drawn_token() -> None:
    probabilities = [0.1, 0.2, 0.3, 0.4]
    one = sampler(temperature=0.0, logit_bias=((0, 100.0),), num_logprobs=2)
    token, logprobs = one.draw(np.log(row(*probabilities)))
    assert logprobs is not None
    assert token == logprobs.token_id == 0
    assert logprobs.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in logprobs.top] == [3, 2]
    assert [value for _, value in logprobs.top] == pytest.approx([math.log(0.4), math.log(0.3)])


def test_a_greedy_token_has_exactly_the_highest_logprob() -> None:
    logits = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    _, logprobs = sampler(temperature=0.0, num_logprobs=1).draw(logits)
    assert logprobs is not None
    assert logprobs.top == ((logprobs.token_id, logprobs.logprob),)


def test_zero_logprobs_gives_the_drawn_token_only_and_none_gives_nothing() -> None:
    _, logprobs = sampler(temperature=0.0, num_logprobs=0).draw(row(0.0, 1.0))
    assert logprobs is not None
    assert logprobs.top == ()
    assert sampler(temperature=0.0).draw(row(0.0, 1.0))[1] is None


def test_probabilities_sum_to_one() -> None:
    logits = np.random.default_rng(2).normal(size=49152).astype(np.float32) * 5
    total = np.exp(log_softmax(logits).astype(np.float64)).sum()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_all_logprobs_may_be_asked_for() -> None:
    tokens = most_likely(row(0.5, 0.1, 0.9, 0.1), 10)
    assert tokens.tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_overflowed_are_an_error(bad: float) -> None:
    with pytest.raises(SamplingError, match="not a number"):
        draw(sampler(temperature=0.0), 1.0, bad, 2.0)


def test_a_draw_at_the_edges_never_gives_a_weight_of_zero() -> None:
    weights = row(0.0, 1.0, 0.0, 1.0, 0.0)
    assert invert(weights, 0.0) == 1
    assert invert(weights, 0.5) == 3
    assert invert(weights, math.nextafter(1.0, 0.0)) == 3


def test_of_equal_weights_at_the_border_the_first_are_kept() -> None:
    assert nucleus(row(0.25, 0.25, 0.25, 0.25), 0.5).tolist() == [0, 1]
    assert nucleus(row(0.25, 0.5, 0.25), 0.75).tolist() == [0, 1]


def test_top_k_larger_than_what_is_left_keeps_it_all() -> None:
    assert largest(row(1.0, 2.0), 5).tolist() == [0, 1]
    assert frequencies(row(1.0, 2.0, -9.0), count=50, min_p=0.1, top_k=9)[2] == 0.0


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("count", [1, 7, 300, 999])
def test_the_largest_are_found_however_values_are_spread(spread: float, count: int) -> None:
    values = np.random.default_rng(3).normal(size=1000).astype(np.float32) * np.float32(spread)
    border = np.sort(values)[-count]
    assert largest(values, count).tolist() == np.flatnonzero(values >= border).tolist()


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999999])
def test_a_nucleus_is_found_however_weights_are_spread(spread: float, top_p: float) -> None:
    values = np.random.default_rng(4).normal(size=1000) * spread
    weights = np.exp(values - values.max()).astype(np.float32)
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    expected = np.sort(order[before < top_p * weights.sum(dtype=np.float64)])
    assert nucleus(weights, top_p).tolist() == expected.tolist()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_a_draw_lands_where_the_running_sum_says(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = rng.random(size).astype(np.float32) * (rng.random(size) < 0.5)
    weights[rng.integers(size)] = 1.0
    mass = np.cumsum(weights, dtype=np.float64)
    for uniform in (0.0, math.nextafter(1.0, 0.0), *rng.random(200)):
        position = invert(weights, float(uniform))
        assert weights[position] > 0.0
        assert mass[position] >= uniform * mass[-1] * (1 - 1e-12)
        assert mass[position] - weights[position] <= uniform * mass[-1] * (1 + 1e-12)
