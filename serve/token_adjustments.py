"""Tokens of one request whose logits change before a draw: biases, penalties, end tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qserve.kernels.sample import NOT_SEEN
from qserve.serve.messages import SamplingParams


class RequestAdjustments:
    """Biases and counts by token, as arrays that grow with the output.

    The entries are those of ``TokenAdjustments`` for one row; nothing is added while no penalty
    needs it.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Iterable[int], end_token_ids: Iterable[int]
    ) -> None:
        """end_token_ids: tokens that end the request, forbidden until ``params.min_tokens``."""
        repeats = params.repetition_penalty != 1.0
        self._counting = (
            repeats or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        biases: dict[int, float] = {}
        for token, bias in params.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        forbidden = set(end_token_ids) if params.min_tokens > 0 else set()
        seen = set(prompt_token_ids) if repeats else set()
        tokens = sorted(forbidden | seen | set(biases))
        self._places = {token: place for place, token in enumerate(tokens)}
        self._size = len(tokens)
        self._token_ids = np.array(tokens, dtype=np.int32)
        self._biases = np.array([biases.get(token, 0.0) for token in tokens], dtype=np.float32)
        self._counts = np.array([0 if t in seen else NOT_SEEN for t in tokens], dtype=np.int32)
        self._forbidden = np.array([self._places[token] for token in forbidden], dtype=np.int64)
        self._allowed_biases = self._biases[self._forbidden]
        self._biases[self._forbidden] = -np.inf

    def __len__(self) -> int:
        """The number of entries."""
        return self._size

    @property
    def token_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The tokens of all entries."""
        return self._token_ids[: self._size]

    @property
    def biases(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """What is added to the logit of each."""
        return self._biases[: self._size]

    @property
    def counts(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """How often the output has each."""
        return self._counts[: self._size]

    def allow_ends(self) -> None:
        """Stop forbidding the end tokens."""
        self._biases[self._forbidden] = self._allowed_biases

    def count(self, token: int) -> None:
        """Note that the output has one more of a token."""
        if not self._counting:
            return
        place = self._places.get(token)
        if place is None:
            place = self._append(token)
        self._counts[place] = max(int(self._counts[place]), 0) + 1

    def _append(self, token: int) -> int:
        place = self._size
        if place == self._token_ids.size:  # twice the room
            room = max(place, 16)
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, np.int32)])
            self._biases = np.concatenate([self._biases, np.zeros(room, np.float32)])
            self._counts = np.concatenate([self._counts, np.full(room, NOT_SEEN, np.int32)])
        self._token_ids[place] = token
        self._places[token] = place
        self._size += 1
        return place
