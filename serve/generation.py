"""Tokens of the engine to text for the client: detokenized, cut at stop strings, accounted."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from qserve.serve.bridge import Submission
from qserve.serve.detokenizer import Detokenizer, StopStrings
from qserve.serve.errors import ServeError
from qserve.serve.messages import FinishReason, NewTokens, TokenLogprobs
from qserve.serve.metrics import Metrics, SequenceTimes

# How an end is told to clients: OpenAI's enum has no word for an abort.
FINISH_WORDS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "stop",
}


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens become text.

    stops: strings that end the text. include_stop: what ended the text stays in it.
    min_tokens: stop strings do not count within so many tokens.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one sequence got in one step.

    index: of the sequence. text: may be empty while text is held back.
    finish_reason: ``stop`` or ``length`` on the last delta of a sequence.
    stop_reason: the stop string or stop id that ended it, None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextSequence:
    """The text of one sequence, growing.

    decode: token ids to text. prompt_token_ids: what precedes the first token.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int],
        rules: TextRules,
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt_token_ids)
        self._stops = StopStrings(rules.stops, rules.include_stop)
        self._rules = rules
        self.num_tokens = 0

    def read(self, index: int, new: NewTokens) -> TextDelta:
        """The delta that these tokens give; ``finish_reason`` is set when a stop string matched."""
        pieces = []
        hidden = new.finish_reason is FinishReason.STOP and not self._rules.include_stop
        for position, token_id in enumerate(new.token_ids, start=1):
            self.num_tokens += 1
            if hidden and position == len(new.token_ids):
                break  # the token that ended the sequence is not part of its text
            check = self.num_tokens > self._rules.min_tokens
            pieces.append(self._stops.feed(self._detokenizer.add(token_id), check))
            if self._stops.matched is not None:
                return self._delta(index, new, pieces, position)
        if new.finish_reason is not None:
            pieces.append(self._stops.feed(self._detokenizer.flush()))
            pieces.append(self._stops.flush())
        return self._delta(index, new, pieces, len(new.token_ids))

    def _delta(
        self, index: int, new: NewTokens, pieces: Sequence[str], num_tokens: int
    ) -> TextDelta:
        matched = self._stops.matched
        reason = FINISH_WORDS[new.finish_reason] if new.finish_reason is not None else None
        return TextDelta(
            index=index,
            text="".join(pieces),
            token_ids=new.token_ids[:num_tokens],
            logprobs=new.logprobs[:num_tokens],
            finish_reason="stop" if matched is not None else reason,
            stop_reason=matched if matched is not None else new.stop_token_id,
        )


class Generation:
    """The running sequences of one HTTP request, as text. Close it, however the request ends."""

    def __init__(
        self,
        submission: Submission,
        sequences: Sequence[TextSequence],
        times: Sequence[SequenceTimes],
        metrics: Metrics,
    ) -> None:
        self._submission = submission
        self._sequences = sequences
        self._times = times
        self._metrics = metrics
        self._unfinished = set(range(len(sequences)))
        self._end = "abort"  # of what is unfinished when this is closed

    @property
    def num_sequences(self) -> int:
        """How many texts are generated."""
        return len(self._sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, over all sequences, ends included."""
        return sum(sequence.num_tokens for sequence in self._sequences)

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The deltas of all sequences as they come; one with a finish reason for each.

        Raises ``ServeError`` when the engine gave up.
        """
        try:
            async for index, new in self._submission.outputs():
                if index in self._unfinished:  # else its stop string matched before this came
                    yield self._read(index, new)
        except ServeError:
            self._end = "error"
            raise

    def close(self) -> None:
        """Stop what is unfinished and free what it holds. Closing twice does nothing."""
        self._submission.abort()
        for index in self._unfinished:
            self._metrics.finish(self._times[index], self._end)
        self._unfinished.clear()

    def _read(self, index: int, new: NewTokens) -> TextDelta:
        delta = self._sequences[index].read(index, new)
        self._metrics.tokens(self._times[index], len(delta.token_ids), time.monotonic())
        if delta.finish_reason is not None:
            self._unfinished.discard(index)
            self._submission.abort(index)
            self._metrics.finish(self._times[index], delta.finish_reason)
        return delta


class NoGeneration:
    """Stands in for a ``Generation`` when no token was asked for: every text ends at once."""

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences
        self.num_tokens = 0

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """An end for each sequence."""
        for index in range(self.num_sequences):
            yield TextDelta(index, "", (), finish_reason=FINISH_WORDS[FinishReason.LENGTH])

    def close(self) -> None:
        """Nothing is held."""
