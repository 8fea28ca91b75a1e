"""The engine: requests in, tokens out, one step at a time, in one thread and without asyncio."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.block_manager import BlockManager
from qserve.serve.config import EngineConfig
from qserve.serve.errors import BadRequest, ServeError
from qserve.serve.messages import (
    AddRequest,
    EngineStats,
    FinishReason,
    NewTokens,
    RequestFailed,
    TokenLogprobs,
)
from qserve.serve.model_runner import ModelRunner, read_eos_token_ids
from qserve.serve.sampler import (
    BatchSampler,
    Draw,
    SamplingError,
    TokenSampler,
    finish_draw,
)
from qserve.serve.scheduler import Chunk, Scheduler
from qserve.serve.sequence import Sequence

logger = logging.getLogger(__name__)

Output = NewTokens | RequestFailed


class Runner(Protocol):
    """What the engine needs of a model and its cache."""

    vocab_size: int

    def run(self, chunks: Items[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks and store their keys and values.

        Returns logits ``[num_sampling_chunks, vocab_size]``, a row for each chunk that samples, in
        order; the caller may overwrite them until the next call.
        """

    def run_greedy(self, chunks: Items[Chunk]) -> list[int]:
        """Compute the chunks and store their keys and values.

        Returns the token with the largest logit, of equals the first, of each chunk that samples;
        ``NO_TOKEN`` where that logit is not finite.
        """


class Engine:
    """Holds the unfinished requests and brings all of them forward with every ``step()``.

    eos_token_ids: the model's end-of-sequence tokens, which end every request that does not ignore
    them.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, eos_token_ids: frozenset[int]) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}
        self._samplers: dict[str, TokenSampler] = {}
        self._batch_sampler = BatchSampler()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    @classmethod
    def from_checkpoint(
        cls, folder: Path, config: EngineConfig, eos_token_ids: frozenset[int] | None = None
    ) -> Engine:
        """An engine for the model in ``folder``.

        eos_token_ids: None takes those of the checkpoint's configs. Raises ``CheckpointError`` for
        a model that cannot be served, ``KVCacheTooSmall`` when memory does not suffice.
        """
        checkpoint = Checkpoint(folder)
        runner = ModelRunner(checkpoint, config)
        blocks = BlockManager(runner.plan.num_blocks, runner.plan.block_size)
        if eos_token_ids is None:
            eos_token_ids = read_eos_token_ids(checkpoint)
        return cls(runner, Scheduler(runner.limits, blocks), eos_token_ids)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output a request may reach."""
        return self._scheduler.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._runner.vocab_size

    def check(self, request: AddRequest) -> None:
        """Raise ``BadRequest`` when a request can never be computed.

        Reads only what never changes, so any thread may ask.
        """
        params = request.params
        self._check_vocabulary("prompt", request.prompt_token_ids)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_vocabulary("logit_bias", [token for token, _ in params.logit_bias])
        self._scheduler.check(len(request.prompt_token_ids), params.max_tokens)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises ``BadRequest`` when it can never be computed."""
        request_id, params = request.request_id, request.params
        if request_id in self._sequences:
            raise BadRequest(f"The request id {request_id!r} is in use: choose another.")
        self.check(request)
        sequence = Sequence(request_id, request.prompt_token_ids, params)
        self._scheduler.add(sequence)
        ends = self._eos_token_ids.union(params.stop_token_ids)
        self._sequences[request_id] = sequence
        self._samplers[request_id] = TokenSampler(params, request.prompt_token_ids, ends)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; an unknown or finished one is ignored."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence, FinishReason.ABORT)

    def has_work(self) -> bool:
        """Whether a ``step()`` would do anything."""
        return bool(self._sequences)

    def step(self) -> list[Output]:
        """One token for every running request, or a piece of its prompt, in one forward pass.

        Returns the new tokens. When the forward pass fails, the requests in it fail, and only they.
        """
        if not self._sequences:
            return []
        chunks = self._scheduler.schedule()
        assert chunks, "unfinished requests, but none is scheduled"
        samplers = [self._samplers[c.sequence.request_id] for c in chunks if c.samples]
        try:
            draw = self._compute(chunks, samplers)
        except Exception as error:
            logger.exception("a step with %d requests failed", len(chunks))
            return [self._fail(chunk.sequence, error) for chunk in chunks]
        sequences = [chunk.sequence for chunk in advance(chunks)]
        return self._sample(sequences, draw) if sequences else []

    def fail_all(self, error: Exception) -> list[Output]:
        """Give up on every unfinished request."""
        return [self._fail(sequence, error) for sequence in list(self._sequences.values())]

    def stats(self) -> EngineStats:
        """Load now, totals since the start."""
        blocks = self._scheduler.blocks
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_usage=1.0 - blocks.num_free / blocks.num_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generation_tokens,
        )

    def _compute(
        self, chunks: Items[Chunk], samplers: list[TokenSampler]
    ) -> Callable[[], list[Draw]]:
        """Run the model; returns what draws the next tokens, in the order of ``samplers``."""
        if samplers and all(sampler.is_greedy for sampler in samplers):
            tokens = self._runner.run_greedy(chunks)
            return lambda: [*map(finish_draw, samplers, tokens)]
        return partial(self._batch_sampler.draw, samplers, self._runner.run(chunks))

    def _sample(self, sequences: Items[Sequence], draw: Callable[[], list[Draw]]) -> list[Output]:
        """Draw the next token of each sequence."""
        try:
            draws = draw()
        except Exception as error:
            logger.exception("sampling failed for %d requests", len(sequences))
            return [self._fail(sequence, error) for sequence in sequences]
        return [
            self._fail(sequence, drawn)
            if isinstance(drawn, SamplingError)
            else self._extend(sequence, *drawn)
            for sequence, drawn in zip(sequences, draws, strict=True)
        ]

    def _extend(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> NewTokens:
        """Append a token to a sequence and finish the request if that was its last."""
        if not sequence.num_output_tokens:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        self._num_generation_tokens += 1
        sequence.token_ids.append(token)
        reason, stop_token_id = self._end(sequence, token)
        if reason:
            self._finish(sequence, reason)
        kept: tuple[TokenLogprobs, ...] = () if logprobs is None else (logprobs,)
        return NewTokens(sequence.request_id, (token,), kept, reason, stop_token_id)

    def _end(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = sequence.params
        if token in self._eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP, None
        if token in params.stop_token_ids:
            return FinishReason.STOP, token
        out_of_tokens = sequence.num_output_tokens >= params.max_tokens
        if out_of_tokens or sequence.num_tokens >= self.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.finish(sequence, reason)
        del self._sequences[sequence.request_id]
        del self._samplers[sequence.request_id]

    def _fail(self, sequence: Sequence, error: Exception) -> RequestFailed:
        self._finish(sequence, FinishReason.ERROR)
        message = (
            str(error)
            if isinstance(error, ServeError)
            else f"The engine could not compute this request ({type(error).__name__})."
        )
        return RequestFailed(sequence.request_id, message)

    def _check_vocabulary(self, param: str, token_ids: Items[int]) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            raise BadRequest(
                f"{param} holds a token id outside the vocabulary: expected 0 to "
                f"{self.vocab_size - 1}.",
                param,
            )


def advance(chunks: Items[Chunk]) -> list[Chunk]:
    """Note that the chunks are computed. Returns those that now yield a token, in order."""
    sampling = [chunk for chunk in chunks if chunk.samples]
    for chunk in chunks:
        chunk.sequence.num_computed = chunk.end
    return sampling
