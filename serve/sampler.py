"""From the logits of a step to the next token of every request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from qserve.kernels.sample import GREEDY_BELOW, SamplingBatch, TokenAdjustments, sample_tokens
from qserve.serve.errors import ServeError
from qserve.serve.messages import SamplingParams, TokenLogprobs
from qserve.serve.token_adjustments import RequestAdjustments

Row = NDArray[np.float32]

NEAR = 10.0  # natural logarithm: what is further below the highest is 20,000 times less likely
UINT64 = (1 << 64) - 1
NUM_SETTINGS = 6
NO_TOKEN = -1  # of a row that cannot be sampled from


class SamplingError(ServeError):
    """The logits of a position cannot be sampled from."""


class TokenSampler:
    """What the draws of one request depend on: its settings, a random generator and token counts.

    Nothing here is shared between requests, and a row of ``sample_tokens`` does not depend on the
    others, so a draw cannot depend on what else is in the batch.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Iterable[int], end_token_ids: Iterable[int]
    ) -> None:
        """end_token_ids: tokens that end the request, forbidden until ``params.min_tokens``."""
        self.num_logprobs = params.num_logprobs
        self.top_k = params.top_k
        self.settings = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        self.adjustments = RequestAdjustments(params, prompt_token_ids, end_token_ids)
        self._tokens_until_ends = params.min_tokens
        seed = None if params.seed is None else params.seed & UINT64
        greedy = params.temperature < GREEDY_BELOW
        self._random = None if greedy else np.random.default_rng(seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the next draw is the largest logit as the model gives it, and nothing else is
        asked of the logits."""
        return self._random is None and self.num_logprobs is None and not len(self.adjustments)

    def next_uniform(self) -> float:
        """The random number of the next draw, in [0, 1)."""
        return 0.0 if self._random is None else self._random.random()

    def note(self, token: int) -> None:
        """Count a token that was drawn."""
        self.adjustments.count(token)
        if self._tokens_until_ends > 0:
            self._tokens_until_ends -= 1
            if not self._tokens_until_ends:
                self.adjustments.allow_ends()


Draw = tuple[int, TokenLogprobs | None] | SamplingError
"""A token, and its logprobs if they were asked for; or why there is none."""


class BatchSampler:
    """Draws for all requests of a step at once.

    What does not change from step to step is kept as long as the requests are the same.
    """

    def __init__(self) -> None:
        self._samplers: list[TokenSampler] = []
        self._batch = build_batch(())

    def draw(self, samplers: list[TokenSampler], logits: NDArray[np.float32]) -> list[Draw]:
        """The next token of each request, and its logprobs if they were asked for.

        logits: float32 ``[num_samplers, vocab_size]``, overwritten. A request has a
        ``SamplingError`` in place of a token when the most likely of its logits is not finite: the
        model overflowed.
        """
        with np.errstate(invalid="ignore"):  # of a row that overflowed: nobody sees its logprobs
            logprobs = [
                None if sampler.num_logprobs is None else log_softmax(row)
                for sampler, row in zip(samplers, logits, strict=True)
            ]
        tokens = sample_tokens(torch.from_numpy(logits), self._settings_of(samplers)).tolist()
        return [
            finish_draw(sampler, token, row)
            for sampler, token, row in zip(samplers, tokens, logprobs, strict=True)
        ]

    def _settings_of(self, samplers: list[TokenSampler]) -> SamplingBatch:
        """The settings of all requests for their next draws."""
        if samplers != self._samplers:
            self._samplers = samplers
            self._batch = build_batch(samplers)
        uniforms = self._batch.uniforms.numpy()
        for row, sampler in enumerate(samplers):
            uniforms[row] = sampler.next_uniform()
        adjustments = join_adjustments([sampler.adjustments for sampler in samplers])
        return self._batch if adjustments is None else replace(self._batch, adjustments=adjustments)


def build_batch(samplers: Sequence[TokenSampler]) -> SamplingBatch:
    """The settings of all requests; random numbers and adjustments are for each draw to fill in."""
    rows = [sampler.settings for sampler in samplers]
    settings = torch.tensor(rows).reshape(-1, NUM_SETTINGS).T.contiguous()
    temperature, top_p, min_p, repetition, frequency, presence = settings
    return SamplingBatch(
        temperature=temperature,
        top_k=torch.tensor([sampler.top_k for sampler in samplers], dtype=torch.int32),
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        uniforms=torch.zeros(len(samplers), dtype=torch.float64),
    )


def join_adjustments(rows: Sequence[RequestAdjustments]) -> TokenAdjustments | None:
    """The adjustments of all requests, one after the other; None when there is none."""
    sizes = [len(row) for row in rows]
    if not any(sizes):
        return None
    return TokenAdjustments(
        starts=torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)),
        token_ids=torch.from_numpy(np.concatenate([row.token_ids for row in rows])),
        biases=torch.from_numpy(np.concatenate([row.biases for row in rows])),
        counts=torch.from_numpy(np.concatenate([row.counts for row in rows])),
    )


def finish_draw(sampler: TokenSampler, token: int, logprobs: Row | None = None) -> Draw:
    """Note the drawn token, or ``NO_TOKEN``, and pick the logprobs that were asked for."""
    if token == NO_TOKEN:
        return SamplingError("The model's output is not a number for this request: it overflowed.")
    sampler.note(token)
    if logprobs is None or sampler.num_logprobs is None:
        return token, None
    best = most_likely(logprobs, sampler.num_logprobs)
    top = tuple((int(i), float(logprobs[i])) for i in best)
    return token, TokenLogprobs(token, float(logprobs[token]), top)


def log_softmax(logits: Row) -> Row:
    """``logits - log(sum(exp(logits)))``, the sum in double precision. float32 ``[vocab_size]``."""
    shifted: Row = logits - logits.max()
    total = np.log(np.exp(shifted).sum(dtype=np.float64))
    shifted -= np.float32(total)
    return shifted


def most_likely(logprobs: Row, count: int) -> NDArray[np.int64]:
    """The ``count`` most likely tokens, highest first; of equals the lowest id."""
    tokens = largest(logprobs, count)
    return tokens[np.argsort(-logprobs[tokens], kind="stable")][:count]


def largest(values: Row, count: int) -> NDArray[np.int64]:
    """Positions of the ``count`` largest values, in order; what equals the smallest of them stays.

    A few hundred of a vocabulary's log-probabilities lie near the highest. Looking only at those
    takes a tenth of the time; when they are too few, all are looked at.
    """
    count = min(count, values.size)
    if not count:
        return np.empty(0, dtype=np.int64)
    positions = np.flatnonzero(values >= values.max() - NEAR)
    if positions.size < count:
        positions = np.arange(values.size)
    near = values[positions]
    kept: NDArray[np.int64] = positions[near >= np.partition(near, -count)[-count]]
    return kept
