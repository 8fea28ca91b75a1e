"""A request inside the engine: its tokens, and how far they have been computed."""

from __future__ import annotations

from array import array
from enum import Enum

from qserve.serve.messages import FinishReason, SamplingParams


class SequenceStatus(Enum):
    """WAITING -> RUNNING -> FINISHED; a preempted sequence is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The tokens of one request; the first ``num_computed`` have keys and values in the cache.

    Everything the scheduler does is to let ``num_computed`` catch up with ``num_tokens``: a prompt,
    a chunk of it, a decode step and a restart after preemption are the same case.

    token_ids: prompt and output. block_table: int32 ids of the KV blocks that hold the tokens, in
    order; it is an ``array`` so that a batch copies it without a loop.
    """

    __slots__ = (
        "block_table",
        "finish_reason",
        "num_computed",
        "num_prompt_tokens",
        "params",
        "request_id",
        "status",
        "token_ids",
    )

    def __init__(
        self, request_id: str, prompt_token_ids: tuple[int, ...], params: SamplingParams
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0
        self.block_table: array[int] = array("i")
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.value}, {self.num_computed} of "
            f"{self.num_tokens} tokens computed, {len(self.block_table)} blocks)"
        )
