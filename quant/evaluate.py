"""How much a quantized model differs from the float one it was made from.

A figure is comparable with another only when all of this is the same: the text, tokenized once by
the base model's tokenizer without special tokens; windows evenly spread over it; every position of
a window but its last predicts the next token, with no context from elsewhere; weights and
activations in float32, sums in float64. Only what a checkpoint was made to run with is rounded, as
engines do: the inputs of layers for quantized activations, and keys and values by stored scales.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qserve.quant.cached_decoder import with_stored_scales
from qserve.quant.decoder import Decoder, OutputHead
from qserve.quant.errors import CalibrationError, CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.progress import Pace, Phase, ProgressCallback
from qserve.quant.windows import spread_windows, tokenize

DEFAULT_NUM_WINDOWS = 48
DEFAULT_SEQ_LEN = 512

POSITIONS_AT_ONCE = 128
"""Positions whose logits are in memory at once: 25 MB for a vocabulary of 49152."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over windows, each window's value being the mean over its positions.

    perplexity, base_perplexity: e to the mean negative log-likelihood of the text.
    kl: mean divergence KL(base || model) of the next-token distributions, in nats.
    top1: share of positions where both models hold the same token most likely.
    ..._standard_error: over windows; NaN when there is only one.
    activations: what the inputs of the model's packed layers are rounded to, None for not at all.
    kv_cache: the stored scales by which its keys and values are rounded, in words; None likewise.
    Fields that need a base model are None without one.
    """

    num_windows: int
    seq_len: int
    perplexity: float
    base_perplexity: float | None
    kl: float | None
    kl_standard_error: float | None
    top1: float | None
    top1_standard_error: float | None
    activations: str | None
    kv_cache: str | None
    seconds: float


def evaluate(
    model: Checkpoint,
    base: Checkpoint | None,
    text: str,
    num_windows: int,
    seq_len: int,
    progress: ProgressCallback,
) -> Evaluation:
    """Judge a float or quantized checkpoint on a text, against a float one when it is given.

    Both models run block by block over all windows. A text too short for ``num_windows`` windows
    gives fewer, see the result. Raises ``CalibrationError`` when it is shorter than one window or
    the windows are longer than the context, ``CheckpointError`` when the models do not match.
    """
    started = time.perf_counter()
    decoders = [
        with_stored_scales(checkpoint) for checkpoint in (base, model) if checkpoint is not None
    ]
    vocabularies = {decoder.config.vocab_size for decoder in decoders}
    if len(vocabularies) > 1:
        raise CheckpointError(
            f"the models have vocabularies of {vocabularies} tokens: give the checkpoint that the "
            "quantized one was made from"
        )
    if seq_len < 2 or seq_len > min(d.config.max_position_embeddings for d in decoders):
        raise CalibrationError(
            f"windows of {seq_len} tokens: expected 2 to "
            f"{min(d.config.max_position_embeddings for d in decoders)}, the model's context"
        )
    token_ids = tokenize((base or model).folder, text)
    windows = spread_windows(token_ids, num_windows, seq_len)
    return replace(
        compare(decoders, windows, progress)[-1],
        activations=None if model.activations is None else model.activations.value,
        kv_cache=None if model.kv_cache is None else str(model.kv_cache),
        seconds=time.perf_counter() - started,
    )


def compare(
    decoders: Sequence[Decoder], windows: torch.Tensor, progress: ProgressCallback
) -> list[Evaluation]:
    """Judge every decoder but the first against the first, or one alone, on windows ``[S, T]``."""
    started = time.perf_counter()
    judged = range(1, len(decoders)) or range(1)
    num_steps = sum(d.num_blocks for d in decoders) + len(judged) * len(windows)
    report = Pace(progress, Phase.EVALUATE, num_steps)
    outputs = [final_hidden(decoder, windows, report.step) for decoder in decoders]
    evaluations = []
    for index in judged:
        pair = [(decoders[i].head(), outputs[i]) for i in sorted({0, index})]
        found = _summarize(_score(pair, windows, report), windows, has_base=len(pair) > 1)
        evaluations.append(replace(found, seconds=time.perf_counter() - started))
    return evaluations


def final_hidden(decoder: Decoder, windows: torch.Tensor, step: Callable[[], None]) -> torch.Tensor:
    """What the head of a model receives: ``[S, T, hidden_size]``. step: called after each block."""
    hidden = decoder.embed(windows)
    for index in range(decoder.num_blocks):
        decoder.block(index, windows.shape[1]).run_(hidden)
        step()
    norm = decoder.final_norm()
    for window in hidden:
        window.copy_(norm(window))
    return hidden


@dataclass(frozen=True, slots=True)
class _Scores:
    """Means of each window, float64 ``[S]``; of the model and of the base."""

    nll: torch.Tensor
    base_nll: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor


def _score(
    pair: Sequence[tuple[OutputHead, torch.Tensor]], windows: torch.Tensor, report: Pace
) -> _Scores:
    """Compare the last model with the first, by its head and what that receives."""
    buffers = [torch.empty(POSITIONS_AT_ONCE, len(head.weight)) for head, _ in pair]
    rows = []
    for index, window in enumerate(windows):
        sums = torch.zeros(4, dtype=torch.float64)
        targets = window[1:, None]
        for start in range(0, len(targets), POSITIONS_AT_ONCE):
            piece = slice(start, start + POSITIONS_AT_ONCE)
            log_probs = [
                _log_probs(output[index, :-1][piece], head, buffer)
                for (head, output), buffer in zip(pair, buffers, strict=True)
            ]
            if not all(bool(torch.isfinite(values).all()) for values in log_probs):
                raise CheckpointError(
                    f"infinite or NaN logits in window {index}: the checkpoint is damaged"
                )
            sums += _compare(log_probs[0], log_probs[-1], targets[piece])
        rows.append(sums / len(targets))
        report.step()
    return _Scores(*torch.stack(rows, dim=1))


def _log_probs(hidden: torch.Tensor, head: OutputHead, buffer: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` of hidden states ``[T, hidden_size]``, in the buffer."""
    logits = head.logits(hidden, out=buffer[: len(hidden)])
    return logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))


def _compare(base: torch.Tensor, model: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over positions, float64: model's and base's negative log-likelihood, KL, agreement."""
    nll = -model.gather(1, targets).double().sum()
    base_nll = -base.gather(1, targets).double().sum()
    agreement = (base.argmax(1) == model.argmax(1)).double().sum()
    kl = (base.exp() * (base - model)).sum(1).double().sum()
    return torch.stack([nll, base_nll, kl, agreement])


def _summarize(scores: _Scores, windows: torch.Tensor, has_base: bool) -> Evaluation:
    def standard_error(values: torch.Tensor) -> float:
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    return Evaluation(
        num_windows=windows.shape[0],
        seq_len=windows.shape[1],
        perplexity=math.exp(scores.nll.mean()),
        base_perplexity=math.exp(scores.base_nll.mean()) if has_base else None,
        kl=float(scores.kl.mean()) if has_base else None,
        kl_standard_error=standard_error(scores.kl) if has_base else None,
        top1=float(scores.agreement.mean()) if has_base else None,
        top1_standard_error=standard_error(scores.agreement) if has_base else None,
        activations=None,
        kv_cache=None,
        seconds=0.0,
    )
