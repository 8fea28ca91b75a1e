"""What the routes work with: the model's card, its tokenizer, the engine behind the bridge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from qserve.serve.admission import Admission
from qserve.serve.bridge import Bridge
from qserve.serve.chat_options import ChatOptions
from qserve.serve.errors import BadRequest, ContextLengthExceeded, ModelNotFound
from qserve.serve.generation import Generation, TextRules, TextSequence
from qserve.serve.logprobs import TokenNames
from qserve.serve.messages import AddRequest, SamplingParams
from qserve.serve.metrics import Metrics, SequenceTimes
from qserve.serve.protocol import SamplingBody
from qserve.serve.sampling_defaults import SamplingDefaults, nth_sample, sampling_params
from qserve.serve.server_config import ServerConfig

if TYPE_CHECKING:  # the libraries behind it take a second, in which the weights can be loaded
    from qserve.serve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The model as clients see it.

    names: all it answers to, the first is its own. root: where it came from.
    max_model_len: tokens of prompt and output a request may reach.
    vocab_size: of the model's output. fingerprint: changes when the answers may change.
    created: Unix time. extras: more facts for ``/v1/models``.
    """

    names: tuple[str, ...]
    root: str
    max_model_len: int
    vocab_size: int
    fingerprint: str
    created: int
    extras: dict[str, Any] = field(default_factory=dict)

    def describe(self, name: str) -> dict[str, Any]:
        """The entry of ``/v1/models`` under one of the names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "qserve",
            "root": self.root,
            "parent": None,
            "max_model_len": self.max_model_len,
            "permission": [],
            **self.extras,
        }


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of a running server. The event loop owns all of them."""

    config: ServerConfig
    card: ModelCard
    tokenizer: Tokenizer
    defaults: SamplingDefaults
    bridge: Bridge
    metrics: Metrics
    admission: Admission

    def check_model(self, name: str) -> None:
        """Raise ``ModelNotFound`` for a name that is not served; empty is the model itself."""
        if name and name not in self.card.names and not self.config.allow_any_model_name:
            raise ModelNotFound(name)

    def check_logprobs(self, asked: int | None, param: str) -> int | None:
        """The number of logprobs to compute; -1 is the whole vocabulary.

        Raises ``BadRequest`` when it is above the server's limit.
        """
        limit = self.config.max_logprobs
        if asked is None or limit == -1:
            return self.card.vocab_size if asked == -1 else asked
        if asked == -1 or asked > limit:
            raise BadRequest(
                f"{param} is {asked}, this server gives at most {limit}: ask for fewer, or start "
                "it with a higher --max-logprobs.",
                param,
            )
        return asked

    def check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        """Raise ``BadRequest`` for ids that the model does not know."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.card.vocab_size):
            raise BadRequest(
                f"{param} holds a token id outside the vocabulary: expected 0 to "
                f"{self.card.vocab_size - 1}.",
                param,
            )

    async def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The prompt text of a conversation. Raises ``BadRequest`` when the template refuses it."""
        return await asyncio.to_thread(self.tokenizer.render, messages, options)

    async def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text, computed beside the event loop: a long one takes its time."""
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def fit(self, token_ids: tuple[int, ...], body: SamplingBody, param: str) -> tuple[int, ...]:
        """The prompt as the request wants it truncated.

        Raises ``BadRequest`` for an empty prompt, ``ContextLengthExceeded`` for one that leaves no
        room for a token.
        """
        limit = self.card.max_model_len
        keep = body.truncate_prompt_tokens
        if keep is not None:
            keep = limit - 1 if keep == -1 else keep
            token_ids = token_ids[max(0, len(token_ids) - keep) :]
        if not token_ids:
            raise BadRequest("The prompt has no tokens: give at least one.", param)
        if len(token_ids) >= limit:
            raise ContextLengthExceeded(
                f"The prompt has {len(token_ids)} tokens, and this model's context holds {limit}, "
                "of which at least one is for the answer: shorten the prompt.",
                param,
            )
        return token_ids

    def names(self, body: SamplingBody) -> TokenNames:
        """How this request wants its tokens written."""
        return TokenNames(
            self.tokenizer.token_text,
            self.tokenizer.token_bytes,
            body.return_tokens_as_token_ids,
        )

    def generate(
        self, prompts: Sequence[tuple[int, ...]], body: SamplingBody, num_logprobs: int | None
    ) -> Generation:
        """Start ``n`` sequences for each prompt; sequence ``p * n + i`` is sample i of prompt p.

        Raises what ``Bridge.submit`` raises, and ``BadRequest`` for contradicting fields.
        """
        prefix, arrival_s = uuid4().hex, time.monotonic()
        requests = [
            AddRequest(f"{prefix}-{p * body.n + i}", prompt, nth_sample(params, i), arrival_s)
            for p, prompt in enumerate(prompts)
            for params in [self._params(prompt, body, num_logprobs)]
            for i in range(body.n)
        ]
        submission = self.bridge.submit(requests)
        times = [SequenceTimes(arrival_s, len(request.prompt_token_ids)) for request in requests]
        for request, clock in zip(requests, times, strict=True):
            self.metrics.request(clock, request.params.max_tokens, body.n)
        sequences = [self._text_sequence(request.prompt_token_ids, body) for request in requests]
        return Generation(submission, sequences, times, self.metrics)

    def _params(
        self, prompt: tuple[int, ...], body: SamplingBody, num_logprobs: int | None
    ) -> SamplingParams:
        room = self.card.max_model_len - len(prompt)
        return replace(sampling_params(body, self.defaults, room), num_logprobs=num_logprobs)

    def _text_sequence(self, prompt: tuple[int, ...], body: SamplingBody) -> TextSequence:
        def decode(token_ids: Sequence[int]) -> str:
            return self.tokenizer.decode(token_ids, body.skip_special_tokens)

        rules = TextRules(tuple(body.stop), body.include_stop_str_in_output, body.min_tokens)
        return TextSequence(decode, prompt, rules)
