"""From the logits of one position to the next token of one request."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qserve.serve.errors import ServeError
from qserve.serve.messages import SamplingParams, TokenLogprobs

Row = NDArray[np.float32]

GREEDY_BELOW = 1e-5  # a temperature below this divides logits into infinities: argmax is its limit
NEAR = 10.0  # natural logarithm: what is further below the highest is 20,000 times less likely
STRETCH = 256
UINT64 = (1 << 64) - 1


class SamplingError(ServeError):
    """The logits of a position cannot be sampled from."""


class TokenSampler:
    """Draws the tokens of one request, with a random generator and token counts of its own.

    Nothing here is shared between requests, so a draw cannot depend on what else is in the batch.
    The steps and their order are those of vLLM's sampler, so that the same request gives the same
    distribution here and there.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Iterable[int], end_token_ids: Iterable[int]
    ) -> None:
        """end_token_ids: tokens that end the request, masked until ``params.min_tokens``."""
        self._params = params
        self._greedy = params.temperature < GREEDY_BELOW
        self._end_token_ids = np.array(sorted(set(end_token_ids)), dtype=np.int64)
        self._bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._counts: dict[int, int] = {}  # of the output
        self._num_output_tokens = 0
        self._seen = set(prompt_token_ids) if params.repetition_penalty != 1.0 else set()
        self._counting = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self._adjusting = self._counting or bool(params.logit_bias) or params.min_tokens > 0
        seed = None if params.seed is None else params.seed & UINT64
        self._random = None if self._greedy else np.random.default_rng(seed)

    def draw(self, logits: Row) -> tuple[int, TokenLogprobs | None]:
        """The next token, and its logprobs if they were asked for.

        logits: float32 ``[vocab_size]``, overwritten. Raises ``SamplingError`` when the most likely
        logit is not finite: the model overflowed.
        """
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise SamplingError(
                "The model's output is not a number for this request: it overflowed."
            )
        num_logprobs = self._params.num_logprobs
        logprobs = None if num_logprobs is None else log_softmax(logits)
        if self._adjusting:
            self._adjust(logits)
            best = int(logits.argmax())
        token = best if self._random is None else self._draw_from(logits, self._random)
        self._num_output_tokens += 1
        if self._counting:
            self._counts[token] = self._counts.get(token, 0) + 1
            self._seen.add(token)
        if logprobs is None or num_logprobs is None:
            return token, None
        top = tuple((int(i), float(logprobs[i])) for i in most_likely(logprobs, num_logprobs))
        return token, TokenLogprobs(token, float(logprobs[token]), top)

    def _adjust(self, logits: Row) -> None:
        """Apply what can change the most likely token: end mask, bias, penalties."""
        params = self._params
        if self._num_output_tokens < params.min_tokens:
            logits[self._end_token_ids] = -np.inf
        if self._bias.size:
            np.add.at(logits, self._bias_ids, self._bias)
        if params.repetition_penalty != 1.0:
            seen = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            values = logits[seen]
            penalty = np.float32(params.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            tokens = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(tokens))
            logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty

    def _draw_from(self, logits: Row, random: np.random.Generator) -> int:
        """Temperature, min-p, top-k, top-p, then one draw by inverting the distribution."""
        params = self._params
        scaled = logits  # in place: new arrays of this size cost more in page faults than in work
        scaled /= np.float32(params.temperature)
        scaled -= scaled.max()
        tokens: NDArray[np.int64] | None = None  # None: the whole vocabulary, in order
        if params.min_p > 0.0:
            tokens = np.flatnonzero(scaled >= np.log(params.min_p))
        if params.top_k > 0:
            kept = largest(scaled if tokens is None else scaled[tokens], params.top_k)
            tokens = kept if tokens is None else tokens[kept]
        if tokens is not None:
            scaled = scaled[tokens]
        weights = np.exp(scaled, out=scaled)
        if params.top_p < 1.0:
            kept = nucleus(weights, params.top_p)
            tokens = kept if tokens is None else tokens[kept]
            weights = weights[kept]
        position = invert(weights, random.random())
        return position if tokens is None else int(tokens[position])


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


def nucleus(weights: Row, top_p: float) -> NDArray[np.int64]:
    """Positions of the shortest run of ``weights``, largest first, that holds ``top_p`` of the sum.

    weights: the largest is 1. Never empty; of equal weights the first positions are taken. The
    small weights are sorted only if the large ones do not hold enough, see ``largest``.
    """
    wanted = top_p * weights.sum(dtype=np.float64)
    positions = np.flatnonzero(weights >= np.float32(np.exp(-NEAR)))
    if weights[positions].sum(dtype=np.float64) < wanted:
        positions = np.arange(weights.size)
    order = positions[np.argsort(-weights[positions], kind="stable")]
    mass = np.cumsum(weights[order], dtype=np.float64)
    count = int(np.searchsorted(mass, wanted)) + 1
    return np.sort(order[:count])


def invert(weights: Row, uniform: float) -> int:
    """The position where the running sum of ``weights`` passes ``uniform`` of the total.

    uniform: in [0, 1). One random number a token, whatever the vocabulary. A position of weight 0
    is never given. Sums of stretches come first, then the one stretch that is hit: a running sum
    over a whole vocabulary takes twenty times as long.
    """
    sums = np.add.reduceat(weights, np.arange(0, weights.size, STRETCH), dtype=np.float64)
    mass = np.cumsum(sums)
    target = min(uniform * mass[-1], np.nextafter(mass[-1], 0.0))
    index = int(np.searchsorted(mass, target, side="right"))
    before = mass[index - 1] if index else 0.0
    start = index * STRETCH
    inside = np.cumsum(weights[start : start + STRETCH], dtype=np.float64)
    offset = int(np.searchsorted(inside, target - before, side="right"))
    if offset == inside.size:  # the two sums differ in their last bit
        offset = int(np.flatnonzero(weights[start : start + STRETCH])[-1])
    return start + offset
