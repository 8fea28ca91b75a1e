"""``POST /v1/completions``: prompts in, continuations out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.serve.bodies import read_object
from qserve.serve.generation import Generation, NoGeneration, TextDelta
from qserve.serve.logprobs import CompletionLogprobs
from qserve.serve.protocol import parse
from qserve.serve.protocol_completions import CompletionBody
from qserve.serve.refused_fields import refuse
from qserve.serve.replies import Collected, Reply, collect, usage
from qserve.serve.service import Service
from qserve.serve.streaming import EventStream, unless_disconnected

Prompts = Sequence[tuple[int, ...]]


class CompletionEndpoint:
    """The route, bound to a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Continue prompts. What can be refused is refused before a stream starts."""
        fields = await read_object(request, self._service.config.max_body_bytes)
        refuse(fields)
        body = parse(CompletionBody, fields)
        body.check()
        self._service.check_model(body.model)
        num_logprobs = self._service.check_logprobs(body.num_logprobs, "logprobs")
        prompts = [await self._encode(prompt, body) for prompt in body.prompt]
        reply = Reply.to("cmpl", request, fields, self._service.card)
        writer = CompletionWriter(self._service, body, reply, prompts)
        generation: Generation | NoGeneration = NoGeneration(len(prompts) * body.n)
        if body.max_tokens:
            generation = self._service.generate(prompts, body, num_logprobs)
        if body.stream:
            return EventStream(
                writer.events(generation),
                generation.close,
                self._service.config.sse_keep_alive_s,
            )
        try:
            collected = await unless_disconnected(collect(generation), request.receive)
        finally:
            generation.close()
        return JSONResponse(writer.whole(collected))

    async def _encode(self, prompt: str | list[int], body: CompletionBody) -> tuple[int, ...]:
        if isinstance(prompt, str):
            token_ids = await self._service.encode(prompt, body.add_special_tokens)
        else:
            token_ids = tuple(prompt)
            self._service.check_vocabulary(token_ids, "prompt")
        return self._service.fit(token_ids, body, "prompt")


class CompletionWriter:
    """Writes the response of one completion request."""

    def __init__(
        self, service: Service, body: CompletionBody, reply: Reply, prompts: Prompts
    ) -> None:
        self._service = service
        self._body = body
        self._reply = reply
        self._prompts = prompts
        self._num_prompt_tokens = sum(len(prompt) for prompt in prompts)

    def whole(self, collected: Collected) -> dict[str, Any]:
        """The response object."""
        choices = [
            self._choice(delta, self._echo(delta.index), self._logprobs_writer())
            for delta in collected.deltas
        ]
        for choice in choices:
            if self._body.return_token_ids:
                prompt = self._prompts[choice["index"] // self._body.n]
                choice["prompt_token_ids"] = list(prompt)
        return (
            self._reply.head("text_completion")
            | {"choices": choices, "system_fingerprint": self._reply.fingerprint}
            | {"usage": usage(self._num_prompt_tokens, collected.num_tokens)}
        )

    async def events(
        self, generation: Generation | NoGeneration
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The stream: the text of each choice, its end, and the usage if asked."""
        echoes = {index: self._echo(index) for index in range(generation.num_sequences)}
        logprobs = [self._logprobs_writer() for _ in range(generation.num_sequences)]
        async for delta in generation.deltas():
            told = delta.logprobs or (self._body.return_token_ids and delta.token_ids)
            if not (delta.text or told or delta.finish_reason is not None):
                continue
            choice = self._choice(delta, echoes.pop(delta.index, ""), logprobs[delta.index])
            event = self._reply.head("text_completion") | {"choices": [choice]}
            if delta.finish_reason is not None:
                event |= {"system_fingerprint": self._reply.fingerprint}
            if self._body.continuous_usage:
                event |= {"usage": usage(self._num_prompt_tokens, generation.num_tokens)}
            yield event
        if self._body.include_usage:
            yield (
                self._reply.head("text_completion")
                | {"choices": [], "usage": usage(self._num_prompt_tokens, generation.num_tokens)}
                | {"system_fingerprint": self._reply.fingerprint}
            )

    def _choice(self, delta: TextDelta, echo: str, logprobs: CompletionLogprobs) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": logprobs.write(delta.logprobs) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _logprobs_writer(self) -> CompletionLogprobs:
        return CompletionLogprobs(self._service.names(self._body))

    def _echo(self, index: int) -> str:
        """The text of the choice's prompt when the client wants it back, else nothing."""
        if not self._body.echo:
            return ""
        position = index // self._body.n
        given = self._body.prompt[position]
        if isinstance(given, str) and self._body.truncate_prompt_tokens is None:
            return given
        decode = self._service.tokenizer.decode
        return decode(self._prompts[position], self._body.skip_special_tokens)
