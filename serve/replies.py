"""What the responses of both completion endpoints have in common."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from qserve.serve.generation import Generation, NoGeneration, TextDelta
from qserve.serve.service import ModelCard

CALLER_ID = re.compile(r"[\x21-\x7e]{1,256}")  # what may stand in a header


@dataclass(frozen=True, slots=True)
class Reply:
    """What identifies a response; the same in all frames of a stream."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def to(cls, kind: str, request: Request, fields: Mapping[str, Any], card: ModelCard) -> Reply:
        """The reply to a request, whose id is the caller's ``request_id`` or the HTTP one's."""
        chosen = fields.get("request_id")
        if not isinstance(chosen, str) or not CALLER_ID.fullmatch(chosen):
            chosen = request.state.request_id
        return cls(f"{kind}-{chosen}", int(time.time()), card.names[0], card.fingerprint)

    def head(self, object_name: str) -> dict[str, Any]:
        """The first fields of every body and frame."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
        }


@dataclass(frozen=True, slots=True)
class Collected:
    """Everything a generation gave: one delta for each sequence, in order of their index."""

    deltas: list[TextDelta]
    num_tokens: int


async def collect(generation: Generation | NoGeneration) -> Collected:
    """Wait for all sequences to finish. Raises ``ServeError`` when the engine gave up."""
    parts: list[list[TextDelta]] = [[] for _ in range(generation.num_sequences)]
    async for delta in generation.deltas():
        parts[delta.index].append(delta)
    return Collected([_join(deltas) for deltas in parts], generation.num_tokens)


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, Any]:
    """The ``usage`` object."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _join(deltas: list[TextDelta]) -> TextDelta:
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )
