"""Which sequences get how many tokens in the next step: continuous batching with a token budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qserve.serve.block_manager import BlockManager
from qserve.serve.errors import BadRequest, ContextLengthExceeded
from qserve.serve.messages import FinishReason
from qserve.serve.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and a request may not exceed.

    max_num_seqs: sequences running at a time. max_num_batched_tokens: tokens in one step, at least
    ``max_num_seqs``, so that every running sequence can have its next token in every step.
    max_model_len: tokens of prompt and output of a sequence.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start .. end - 1`` of a sequence, computed in one step.

    samples: the chunk reaches the last known token, so the step yields the next one.
    """

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> bool:
        return self.end == self.sequence.num_tokens


class Scheduler:
    """First come, first served, over a pool of KV blocks.

    Running sequences come first, so a long prompt never holds up the next token of the others; what
    is left of the budget computes prompts, in chunks if need be. When the blocks run out, the
    sequence admitted last gives up its own and is computed again later, so the oldest always gets
    on and everybody's turn comes.
    """

    def __init__(self, limits: Limits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises what ``check`` raises."""
        self.check(sequence.num_prompt_tokens, sequence.params.max_tokens)
        self.waiting.append(sequence)

    def check(self, num_prompt: int, max_tokens: int) -> None:
        """Raise an error when a request of these sizes can never be computed.

        ``ContextLengthExceeded``: the prompt leaves no room for a token. ``BadRequest``: the prompt
        is empty, or the pool could not hold the request even alone.
        """
        limit = self.limits.max_model_len
        if num_prompt < 1:
            raise BadRequest("The prompt has no tokens: send at least one.", "prompt")
        if num_prompt >= limit:
            raise ContextLengthExceeded(
                f"The prompt has {num_prompt} tokens, which leaves no room for an answer in this "
                f"server's context of {limit} tokens: shorten it.",
                "prompt",
            )
        longest = min(num_prompt + max_tokens, limit)
        if self.blocks.num_blocks_for(longest) > self.blocks.num_blocks:
            raise BadRequest(
                f"The request may grow to {longest} tokens, but the server's KV cache holds only "
                f"{self.blocks.num_blocks * self.blocks.block_size}: lower max_tokens.",
                "max_tokens",
            )

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: at most one a sequence, their tokens within the budget.

        Every sequence that has a chunk has blocks for all tokens up to the chunk's end. The list is
        empty only when no sequence is waiting or running.
        """
        chunks, budget, preempted = self._continue_running()
        if not preempted:
            chunks += self._admit(budget)
        return chunks

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a waiting or running sequence out and free its blocks."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.block_table)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def _continue_running(self) -> tuple[list[Chunk], int, bool]:
        """Chunks for the running sequences, the budget left, and whether one was preempted.

        Victims come from the end of the list and chunks are granted from its front, so a victim
        never holds a chunk of this step.
        """
        chunks: list[Chunk] = []
        budget = self.limits.max_num_batched_tokens
        preempted = False
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            end = min(sequence.num_tokens, sequence.num_computed + budget)
            while not self.blocks.grow(sequence.block_table, end):
                preempted = True
                if self._preempt_last() is sequence:
                    return chunks, budget, preempted
            if end > sequence.num_computed:
                chunks.append(Chunk(sequence, sequence.num_computed, end))
                budget -= end - sequence.num_computed
            position += 1
        return chunks, budget, preempted

    def _preempt_last(self) -> Sequence:
        victim = self.running.pop()
        self.blocks.release(victim.block_table)
        victim.num_computed = 0
        victim.status = SequenceStatus.WAITING
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    def _admit(self, budget: int) -> list[Chunk]:
        """Chunks for sequences that start now, in the order they came.

        A sequence gets blocks for everything it knows, not just for its first chunk: two prompts
        that only fit one after the other must not start together and take turns preempting.
        """
        chunks: list[Chunk] = []
        while self.waiting and budget and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            needed = self.blocks.num_blocks_for(sequence.num_tokens)
            # Each running sequence may want a block soon; admitting into the last ones would only
            # lead to preempting again.
            if self.running and needed + len(self.running) > self.blocks.num_free:
                break
            if not self.blocks.grow(sequence.block_table, sequence.num_tokens):
                break
            self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            chunks.append(Chunk(sequence, 0, min(sequence.num_tokens, budget)))
            budget -= chunks[-1].num_tokens
        return chunks
