"""Text from tokens as they come: whole characters only, and cut at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
NUM_CONTEXT_TOKENS = 5  # of the prompt: enough for a decoder to see that text precedes
MAX_HELD_TOKENS = 16  # a character has at most 4 bytes, a token at least 1: beyond, it is garbage


class Detokenizer:
    """Turns the tokens of one sequence into text, so that the pieces joined are the whole text.

    A character whose bytes are spread over tokens is given once, with its last byte; one that never
    gets complete is dropped. Bytes that no continuation could repair come as U+FFFD.

    decode: token ids to text; must decode a run of tokens as it would inside a longer run, but for
        its first and last tokens.
    prompt_token_ids: what precedes; its last tokens are the context of the first piece, without
        which some decoders strip a leading space.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])
        self._num_read = len(self._window)  # tokens of the window whose text has been given
        self._num_chars_read = len(decode(self._window).rstrip(REPLACEMENT)) if self._window else 0

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._num_read
        if text.endswith(REPLACEMENT) and held <= MAX_HELD_TOKENS:
            return ""
        new_text = text[self._num_chars_read :]
        if new_text:
            self._slide()
        else:  # a token without text, such as a special one: thousands may follow each other
            del self._window[self._num_read :]
        return new_text

    def flush(self) -> str:
        """What is held at the end of the sequence, without the incomplete character."""
        text = self._decode(self._window).rstrip(REPLACEMENT)[self._num_chars_read :]
        if text:
            self._slide()
        return text

    def _slide(self) -> None:
        """Keep as context the tokens of the piece just given: decoding them again costs little."""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._num_chars_read = len(self._decode(self._window))


class StopStrings:
    """Passes text on until one of the stop strings is complete, and cuts there.

    Text that may turn out to be the start of a stop string is held back, and nothing else. Of
    several, the one complete first wins, and the longest of those. So the result does not depend on
    how the text is cut into pieces.

    include: the text passed on ends with the stop string, not before it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, check: bool = True) -> str:
        """The text that may be passed on now. ``check`` False lets everything through unseen."""
        text = self._held + text
        self._held = ""
        if not check or self.matched is not None:
            return text if self.matched is None else ""
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops]
        ends = [entry for entry in ends if entry[0] >= -entry[1]]
        if ends:
            end, _, self.matched = min(ends)
            return text[:end] if self._include else text[: end - len(self.matched)]
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, when nothing follows any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
