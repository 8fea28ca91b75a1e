"""Log probabilities as the two completion endpoints write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qserve.serve.messages import TokenLogprobs

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot write


@dataclass(slots=True)
class TokenNames:
    """How tokens are written.

    text_of: the text of a token. bytes_of: its bytes. as_ids: write ``token_id:123`` instead.
    """

    text_of: Callable[[int], str]
    bytes_of: Callable[[int], bytes]
    as_ids: bool = False

    def name(self, token_id: int) -> str:
        """The token as a string."""
        return f"token_id:{token_id}" if self.as_ids else self.text_of(token_id)


def writable(logprob: float) -> float:
    """A number that JSON has: minus infinity, and what is no number at all, become ``LOWEST``."""
    return logprob if logprob > LOWEST else LOWEST


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice: one entry for each token."""

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": writable(logprob),
            "bytes": list(names.bytes_of(token_id)),
        }

    content = [
        describe(entry.token_id, entry.logprob)
        | {"top_logprobs": [describe(token_id, logprob) for token_id, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


@dataclass(slots=True)
class CompletionLogprobs:
    """Writes the ``logprobs`` objects of one text completion; the offsets go on between calls."""

    names: TokenNames
    offset: int = field(default=0)

    def write(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The object for the next tokens. ``top_logprobs`` always has the drawn token."""
        tokens, offsets, top = [], [], []
        for entry in entries:
            name = self.names.name(entry.token_id)
            tokens.append(name)
            offsets.append(self.offset)
            self.offset += len(name)
            best = {self.names.name(token): writable(logprob) for token, logprob in entry.top}
            top.append(best | {name: writable(entry.logprob)})
        return {
            "tokens": tokens,
            "token_logprobs": [writable(entry.logprob) for entry in entries],
            "top_logprobs": top,
            "text_offset": offsets,
        }
