"""``POST /v1/chat/completions``: a conversation in, a message out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.serve.bodies import read_object
from qserve.serve.errors import BadRequest
from qserve.serve.generation import Generation, TextDelta
from qserve.serve.logprobs import chat_logprobs
from qserve.serve.protocol import parse
from qserve.serve.protocol_chat import ChatBody
from qserve.serve.refused_fields import refuse
from qserve.serve.replies import Collected, Reply, collect, usage
from qserve.serve.service import Service
from qserve.serve.streaming import EventStream, unless_disconnected


class ChatEndpoint:
    """The route, bound to a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Answer a conversation. What can be refused is refused before a stream starts."""
        fields = await read_object(request, self._service.config.max_body_bytes)
        refuse(fields)
        body = parse(ChatBody, fields)
        body.check()
        prompt = await self.prompt(body)
        num_logprobs = self._service.check_logprobs(body.num_logprobs, "top_logprobs")
        reply = Reply.to("chatcmpl", request, fields, self._service.card)
        generation = self._service.generate([prompt], body, num_logprobs)
        writer = ChatWriter(self._service, body, reply, prompt)
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

    async def prompt(self, body: ChatBody) -> tuple[int, ...]:
        """The token ids of the rendered conversation. Raises ``BadRequest``."""
        service = self._service
        service.check_model(body.model)
        if body.chat_template is not None and not service.config.trust_request_chat_template:
            raise BadRequest(
                "chat_template is only taken from a request when the server was started with "
                "--trust-request-chat-template.",
                "chat_template",
            )
        messages = [message.for_template() for message in body.messages]
        text = await service.render(messages, body.chat_options())
        token_ids = await service.encode(text, body.add_special_tokens)
        return service.fit(token_ids, body, "messages")


class ChatWriter:
    """Writes the response of one chat request."""

    def __init__(
        self, service: Service, body: ChatBody, reply: Reply, prompt: tuple[int, ...]
    ) -> None:
        self._body = body
        self._reply = reply
        self._prompt = prompt
        self._names = service.names(body)

    def whole(self, collected: Collected) -> dict[str, Any]:
        """The response object."""
        choices = []
        for delta in collected.deltas:
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            message |= {"annotations": None, "audio": None, "function_call": None}
            message |= {"reasoning": None}
            choices.append(
                {"index": delta.index, "message": message}
                | self._logprobs(delta)
                | {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
                | self._token_ids(delta)
            )
        response = self._reply.head("chat.completion") | {"choices": choices}
        response |= {"service_tier": None, "system_fingerprint": self._reply.fingerprint}
        response |= {"usage": usage(len(self._prompt), collected.num_tokens)}
        if self._body.return_token_ids:
            response["prompt_token_ids"] = list(self._prompt)
        return response

    async def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
        """The stream: a role frame for each choice, its text, its end, and the usage if asked."""
        for index in range(generation.num_sequences):
            choice = {"index": index, "delta": {"role": "assistant", "content": ""}}
            yield self._chunk(choice | {"logprobs": None, "finish_reason": None}, 0)
        async for delta in generation.deltas():
            event = self._event(delta)
            if event is not None:
                yield self._chunk(event, generation.num_tokens)
        if self._body.include_usage:
            yield (
                self._reply.head("chat.completion.chunk")
                | {"choices": [], "usage": usage(len(self._prompt), generation.num_tokens)}
                | {"system_fingerprint": self._reply.fingerprint}
            )

    def _event(self, delta: TextDelta) -> dict[str, Any] | None:
        """The choice of a frame, None when there is nothing to tell."""
        ended = delta.finish_reason is not None
        told = delta.logprobs or (self._body.return_token_ids and delta.token_ids)
        if not (delta.text or ended or told):
            return None
        # An end without text has an empty delta, as OpenAI sends it.
        content = {} if ended and not delta.text else {"content": delta.text}
        choice = {"index": delta.index, "delta": content} | self._logprobs(delta)
        choice |= {"finish_reason": delta.finish_reason}
        if ended:
            choice |= {"stop_reason": delta.stop_reason}
        return choice | self._token_ids(delta)

    def _chunk(self, choice: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        chunk = self._reply.head("chat.completion.chunk") | {"choices": [choice]}
        if choice["finish_reason"] is not None:
            chunk |= {"system_fingerprint": self._reply.fingerprint}
        if self._body.continuous_usage:
            chunk |= {"usage": usage(len(self._prompt), num_tokens)}
        return chunk

    def _logprobs(self, delta: TextDelta) -> dict[str, Any]:
        return {"logprobs": chat_logprobs(self._names, delta.logprobs) if delta.logprobs else None}

    def _token_ids(self, delta: TextDelta) -> dict[str, Any]:
        return {"token_ids": list(delta.token_ids)} if self._body.return_token_ids else {}
