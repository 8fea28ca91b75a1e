"""Each rule of sampling on a vocabulary that can be worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qserve.serve.messages import SamplingParams, TokenLogprobs
from qserve.serve.sampler import (
    BatchSampler,
    SamplingError,
    TokenSampler,
    largest,
    log_softmax,
    most_likely,
)

Row = NDArray[np.float32]


def row(*values: float) -> Row:
    return np.array(values, dtype=np.float32)


def sampler(
    prompt: tuple[int, ...] = (), ends: tuple[int, ...] = (), **params: Any
) -> TokenSampler:
    return TokenSampler(SamplingParams(**({"max_tokens": 100} | params)), prompt, ends)


def draw_row(one: TokenSampler, logits: Row) -> tuple[int, TokenLogprobs | None]:
    """The next token of a request alone; ``logits`` stay as they are."""
    (drawn,) = BatchSampler().draw([one], logits[None].copy())
    assert not isinstance(drawn, SamplingError)
    return drawn


def draw(one: TokenSampler, *logits: float) -> int:
    return draw_row(one, row(*logits))[0]


def frequencies(logits: Row, count: int = 4000, **params: Any) -> list[float]:
    """How often each token is drawn."""
    one = sampler(**({"seed": 1} | params))
    drawn = Counter(draw_row(one, logits)[0] for _ in range(count))
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
    expected = [draw_row(alone, logits)[0] for _ in range(20)]
    again, other = sampler(seed=42), sampler(seed=7)
    found = []
    for _ in range(20):
        draw_row(other, logits)
        found.append(draw_row(again, logits)[0])
    assert found == expected
    assert len(set(expected)) > 5


def test_seeds_of_either_sign_differ() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    draws = {seed: draw_once(seed, logits) for seed in (-1, 1, 0, 2**63 - 1, -(2**63))}
    assert len(set(draws.values())) == len(draws)


def draw_once(seed: int, logits: Row) -> int:
    return draw_row(sampler(seed=seed), logits)[0]


def test_without_a_seed_draws_are_not_repeated() -> None:
    logits = np.zeros(100000, dtype=np.float32)
    assert draw_row(sampler(), logits)[0] != draw_row(sampler(), logits)[0]


def test_logprobs_are_raw_and_of_the_drawn_token() -> None:
    probabilities = [0.1, 0.2, 0.3, 0.4]
    one = sampler(temperature=0.0, logit_bias=((0, 100.0),), num_logprobs=2)
    token, logprobs = draw_row(one, np.log(row(*probabilities)))
    assert logprobs is not None
    assert token == logprobs.token_id == 0
    assert logprobs.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in logprobs.top] == [3, 2]
    assert [value for _, value in logprobs.top] == pytest.approx([math.log(0.4), math.log(0.3)])


def test_a_greedy_token_has_exactly_the_highest_logprob() -> None:
    logits = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    _, logprobs = draw_row(sampler(temperature=0.0, num_logprobs=1), logits)
    assert logprobs is not None
    assert logprobs.top == ((logprobs.token_id, logprobs.logprob),)


def test_zero_logprobs_gives_the_drawn_token_only_and_none_gives_nothing() -> None:
    _, logprobs = draw_row(sampler(temperature=0.0, num_logprobs=0), row(0.0, 1.0))
    assert logprobs is not None
    assert logprobs.top == ()
    assert draw_row(sampler(temperature=0.0), row(0.0, 1.0))[1] is None


def test_probabilities_sum_to_one() -> None:
    logits = np.random.default_rng(2).normal(size=49152).astype(np.float32) * 5
    total = np.exp(log_softmax(logits).astype(np.float64)).sum()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_all_logprobs_may_be_asked_for() -> None:
    tokens = most_likely(row(0.5, 0.1, 0.9, 0.1), 10)
    assert tokens.tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_overflowed_are_an_error_of_that_request_alone(bad: float) -> None:
    samplers = [sampler(temperature=0.0, num_logprobs=1), sampler(seed=1)]
    overflowed, drawn = BatchSampler().draw(
        samplers, np.stack([row(1.0, bad, 2.0), row(9.0, -90.0, 0.0)])
    )
    assert isinstance(overflowed, SamplingError) and "not a number" in str(overflowed)
    assert drawn == (0, None)


def test_requests_of_every_kind_draw_together_what_they_draw_alone() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_k": 5, "frequency_penalty": 0.5, "logit_bias": ((3, 2.0), (3, 1.0))},
        {"seed": 3, "top_p": 0.8, "repetition_penalty": 1.5},
        {"temperature": 0.0, "min_tokens": 3, "num_logprobs": 2},
    ]
    logits = np.random.default_rng(5).normal(size=(8, len(kinds), 300)).astype(np.float32) * 3
    together = [sampler(prompt=(1, 2, 2), ends=(7,), **kind) for kind in kinds]
    alone = [sampler(prompt=(1, 2, 2), ends=(7,), **kind) for kind in kinds]
    batch_sampler = BatchSampler()
    for step in logits:
        expected = [draw_row(one, own) for one, own in zip(alone, step, strict=True)]
        assert batch_sampler.draw(together, step.copy()) == expected
    shuffled = [together[i] for i in (2, 0, 4)]  # other requests in the next step
    expected = [draw_row(alone[i], logits[0][i]) for i in (2, 0, 4)]
    assert batch_sampler.draw(shuffled, logits[0][[2, 0, 4]]) == expected


def test_counts_have_room_for_every_token_of_a_long_output() -> None:
    one = sampler(temperature=0.0, frequency_penalty=1.0)
    drawn = [draw(one, *([0.0] * 100)) for _ in range(200)]
    assert drawn == list(range(100)) * 2


def test_top_k_larger_than_what_is_left_keeps_it_all() -> None:
    assert largest(row(1.0, 2.0), 5).tolist() == [0, 1]
    assert frequencies(row(1.0, 2.0, -9.0), count=50, min_p=0.1, top_k=9)[2] == 0.0


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("count", [1, 7, 300, 999])
def test_the_largest_are_found_however_values_are_spread(spread: float, count: int) -> None:
    values = np.random.default_rng(3).normal(size=1000).astype(np.float32) * np.float32(spread)
    border = np.sort(values)[-count]
    assert largest(values, count).tolist() == np.flatnonzero(values >= border).tolist()
