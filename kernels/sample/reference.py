"""The definition of sampling in plain PyTorch, row by row."""

from __future__ import annotations

import math

import torch

from qserve.kernels.sample.batch import GREEDY_BELOW, SamplingBatch, TokenAdjustments

NO_TOKEN = -1


def sample_tokens(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The token of each row, -1 where there is none."""
    tokens = [_sample(logits[row].float(), batch, row) for row in range(logits.shape[0])]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _sample(logits: torch.Tensor, batch: SamplingBatch, row: int) -> int:
    if not math.isfinite(float(logits.max())):  # the maximum of anything and NaN is NaN
        return NO_TOKEN
    if batch.adjustments is not None:
        logits = _adjust(logits, batch, batch.adjustments, row)
        if not math.isfinite(float(logits.max())):
            return NO_TOKEN
    temperature = batch.temperature[row]
    if temperature < GREEDY_BELOW:
        return int((logits == logits.max()).nonzero()[0])
    scaled = logits / temperature
    weights = _weigh(scaled - scaled.max(), batch, row)
    mass = weights.cumsum(0)
    total = float(mass[-1])
    target = min(float(batch.uniforms[row]) * total, math.nextafter(total, 0.0))
    return int((mass > target).nonzero()[0])


def _adjust(
    logits: torch.Tensor, batch: SamplingBatch, changes: TokenAdjustments, row: int
) -> torch.Tensor:
    entries = slice(int(changes.starts[row]), int(changes.starts[row + 1]))
    tokens, counts = changes.token_ids[entries].long(), changes.counts[entries]
    values = logits[tokens] + changes.biases[entries]
    penalty = batch.repetition_penalty[row]
    penalized = torch.where(values > 0, values / penalty, values * penalty)
    values = torch.where(counts >= 0, penalized, values)
    subtracted = batch.frequency_penalty[row] * counts + batch.presence_penalty[row]
    values = torch.where(counts > 0, values - subtracted, values)
    return logits.index_put((tokens,), values)


def _weigh(scaled: torch.Tensor, batch: SamplingBatch, row: int) -> torch.Tensor:
    """Weights float64 ``[V]``, zero for what min-p, top-k and top-p drop; ``scaled``: logits over
    the temperature, the largest 0."""
    min_p, top_k, top_p = float(batch.min_p[row]), int(batch.top_k[row]), float(batch.top_p[row])
    if min_p > 0.0:
        scaled = torch.where(scaled >= math.log(min_p), scaled, -math.inf)
    if 0 < top_k < scaled.numel():
        scaled = torch.where(scaled >= scaled.topk(top_k).values[-1], scaled, -math.inf)
    weights = scaled.double().exp()
    if top_p < 1.0:
        ordered, order = weights.sort(descending=True, stable=True)
        mass = ordered.cumsum(0)
        kept = int((mass < top_p * mass[-1]).sum()) + 1
        weights[order[kept:]] = 0.0
    return weights
