"""What asyncio and the engine thread tell each other: frozen values that can cross processes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a request produces no more tokens; the values are the API's words."""

    STOP = "stop"  # an end-of-sequence token, a stop id, or (decided by the receiver) a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the client left, or the receiver found a stop string
    ERROR = "error"  # the engine could not go on with this request


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen; whoever builds this has validated the values.

    max_tokens: tokens to generate at most, at least 1; the context length may end the request
        earlier.
    temperature: below 1e-5 means greedy.
    top_p, top_k, min_p: 1.0, 0 and 0.0 are off.
    seed: makes the draws depend on the seed and the prompt only; None draws from fresh entropy.
    frequency_penalty, presence_penalty: subtracted for tokens of the output. repetition_penalty:
        divides or multiplies the logits of tokens of prompt and output; 1.0 is off.
    logit_bias: pairs of token id and the value added to its logit.
    stop_token_ids: tokens that end the request beside the model's own end-of-sequence tokens.
    ignore_eos: the model's end-of-sequence tokens do not end the request.
    min_tokens: end-of-sequence tokens and stop ids cannot be drawn before this many tokens.
    num_logprobs: None for none, 0 for the drawn token only, k for the k most likely tokens too.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Generate tokens after a prompt.

    request_id: unique among the unfinished requests; every output carries it.
    arrival_s: ``time.monotonic()`` at the front door.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_s: float


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Forget a request and free what it holds.

    No output of it follows; an unknown or finished id is ignored.
    """

    request_id: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-softmax of the raw logits at one generated position: before temperature, penalties, bias.

    logprob: of the drawn token, ``token_id``.
    top: the most likely tokens and their logprobs, highest first; as many as ``num_logprobs`` asked
        for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens that a request got in one step, in order.

    token_ids: includes the end-of-sequence or stop token that ended the request.
    logprobs: one entry for each token when they were asked for, else empty.
    finish_reason: set on the last message of a request.
    stop_token_id: the token of ``stop_token_ids`` that ended the request; None when the model's own
        end-of-sequence token did.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The engine gave up on a request, which is finished.

    message: for the client, without paths or traceback.
    """

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One look at the engine's load.

    kv_usage: share of the KV blocks in use, 0 to 1.
    num_preemptions, prompt_tokens, generation_tokens: totals since the start; a prompt counts once,
        when it is computed in full, however often preemption computes it again.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
