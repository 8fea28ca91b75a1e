"""The Triton sampler draws the tokens that its definition draws."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from qserve.kernels.sample import kernel, reference
from qserve.kernels.sample.batch import NOT_SEEN, SamplingBatch, TokenAdjustments

VOCABULARY = 5000  # a trip of 4096 and a part of one
OFF: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def make_batch(uniforms: list[float], **settings: float | tuple[float, ...]) -> SamplingBatch:
    """A row for each of ``uniforms``. settings: a number for all rows, or one for each."""
    vectors: dict[str, Any] = {
        name: torch.tensor(value, dtype=torch.int32 if name == "top_k" else torch.float32)
        .expand(len(uniforms))
        .contiguous()
        for name, value in {**OFF, **settings}.items()
    }
    return SamplingBatch(uniforms=torch.tensor(uniforms, dtype=torch.float64), **vectors)


def make_logits(num_rows: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return spread * torch.randn(num_rows, VOCABULARY, generator=generator)


def draw_both(logits: torch.Tensor, batch: SamplingBatch) -> tuple[Any, Any]:
    """The tokens of the kernel and of the definition; rows lie apart for the kernel."""
    apart = torch.cat([logits, torch.full((logits.shape[0], 3), float("nan"))], 1)
    expected = reference.sample_tokens(logits.clone(), batch).tolist()
    return kernel.sample_tokens(apart[:, : logits.shape[1]], batch).tolist(), expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6},
        pytest.param({"top_k": 40}, marks=pytest.mark.slow),
        pytest.param({"top_k": 1}, marks=pytest.mark.slow),
        pytest.param({"top_p": 0.9}, marks=pytest.mark.slow),
        {"top_p": 0.0},
        {"min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_the_definition(settings: dict[str, float]) -> None:
    found, expected = draw_both(make_logits(2), make_batch([0.03, 1 - 2**-53], **settings))
    assert found == expected


@pytest.mark.slow
def test_settings_combine_and_differ_from_row_to_row() -> None:
    choices = ([0.1, 1.0, 3.0], [0, 2, 300], [1.0, 0.3, 0.99], [0.0, 0.3])
    rows = 2 * list(itertools.product(*choices))
    names = ("temperature", "top_k", "top_p", "min_p")
    # Not 0 itself: there the definition takes a token of 1e-41, which the integers of the kernel
    # count as none.
    uniforms = [(37 * i % len(rows) + 0.5) / len(rows) for i in range(len(rows))]
    batch = make_batch(uniforms, **dict(zip(names, zip(*rows, strict=True), strict=True)))
    found, expected = draw_both(make_logits(len(rows)), batch)
    assert found == expected


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 2), (1.0, 5)])
def test_of_equal_weights_the_first_are_kept(top_p: float, kept: int) -> None:
    logits = torch.full((5, VOCABULARY), -math.inf)
    places = [7, 100, 4095, 4096, 4999]
    logits[:, places] = 3.0
    found, expected = draw_both(logits, make_batch([i / 5 for i in range(5)], top_p=top_p))
    assert found == expected
    assert set(found) == set(places[:kept])


def test_of_equal_logits_the_lowest_id_is_the_largest() -> None:
    logits = make_logits(1)
    logits[0, [4100, 90, 4000]] = 50.0
    found, _ = draw_both(logits, make_batch([0.9], temperature=0.0))
    assert found == [90]


def test_biases_and_penalties_apply() -> None:
    logits = make_logits(2)
    best = logits.argmax(1)
    changes = TokenAdjustments(
        starts=torch.tensor([0, 2, 302]).int(),
        token_ids=torch.cat([best[:1], torch.tensor([11]), torch.arange(300) * 2]).int(),
        biases=torch.cat([torch.tensor([-math.inf, 30.0]), torch.linspace(-3, 3, 300)]),
        counts=torch.cat([torch.tensor([1, NOT_SEEN]), torch.arange(300) % 4 - 1]).int(),
    )
    settings = {"repetition_penalty": 1.3, "frequency_penalty": 0.25, "presence_penalty": 0.5}
    for temperature in (0.0, 1.0):
        batch = make_batch([0.5, 0.7], temperature=temperature, **settings)
        found, expected = draw_both(logits, replace(batch, adjustments=changes))
        assert found == expected
        assert found[0] == 11


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_overflowed_has_no_token(bad: float) -> None:
    logits = make_logits(2)
    logits[1, 4500] = bad
    found, expected = draw_both(logits, make_batch([0.5, 0.5]))
    assert found == expected
    assert found[1] == -1


def test_a_uniform_that_moves_past_a_token_draws_another() -> None:
    logits = make_logits(1, spread=0.01)
    found = [kernel.sample_tokens(logits, make_batch([0.5 + i / VOCABULARY])) for i in range(3)]
    assert len({int(token) for token in found}) == 3
