"""From the logits of one position to the next token of one request."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qserve.serve.errors import ServeError
from qserve.serve.messages import SamplingParams, TokenLogprobs

Row = NDArray[np.float32]

GREEDY_BELOW = 1e-5  # a temperature below this divides logits into infinities: argmax is its limit
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
        scaled = logits / np.float32(params.temperature)
        scaled -= scaled.max()
        tokens: NDArray[np.int64] | None = None  # None: the whole vocabulary, in order
        if params.min_p > 0.0:
            tokens = np.flatnonzero(scaled >= np.log(params.min_p))
        if params.top_k > 0:
            tokens = keep_top_k(scaled, tokens, params.top_k)
        if tokens is not None:
            scaled = scaled[tokens]
        weights = np.exp(scaled)
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
    count = min(count, logprobs.size)
    if not count:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(logprobs, -count)[-count]
    tokens = np.flatnonzero(logprobs >= threshold)
    return tokens[np.argsort(-logprobs[tokens], kind="stable")][:count]


def keep_top_k(scaled: Row, tokens: NDArray[np.int64] | None, count: int) -> NDArray[np.int64]:
    """Those of ``tokens`` whose value is among the ``count`` largest; ties at the border stay."""
    values = scaled if tokens is None else scaled[tokens]
    if count < values.size:
        kept = np.flatnonzero(values >= np.partition(values, -count)[-count])
        return kept if tokens is None else tokens[kept]
    return np.arange(values.size) if tokens is None else tokens


def nucleus(weights: Row, top_p: float) -> NDArray[np.int64]:
    """Positions of the shortest run of ``weights``, largest first, that holds ``top_p`` of the sum.

    Never empty; of equal weights the first positions are taken. Only the weights are sorted, which
    is several times faster than sorting positions; those are found again by the smallest kept one.
    """
    ordered = np.sort(weights)[::-1]
    mass = np.cumsum(ordered, dtype=np.float64)
    last = min(int(np.searchsorted(mass, top_p * mass[-1])), weights.size - 1)
    candidates = np.flatnonzero(weights >= ordered[last])
    if candidates.size == last + 1:
        return candidates
    first = np.argsort(-weights[candidates], kind="stable")[: last + 1]
    return np.sort(candidates[first])


def invert(weights: Row, uniform: float) -> int:
    """The position where the running sum of ``weights`` passes ``uniform`` of the total.

    uniform: in [0, 1). One random number a token, whatever the vocabulary. A position of weight 0
    is never given.
    """
    mass = np.cumsum(weights, dtype=np.float64)
    target = min(uniform * mass[-1], np.nextafter(mass[-1], 0.0))
    return int(np.searchsorted(mass, target, side="right"))
