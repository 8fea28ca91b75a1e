"""Everything a client or an operator can be told about serving.

ServeError                     500  InternalServerError
├── BadRequest                 400  BadRequestError: a field of the request does not do
│   └── ContextLengthExceeded  400  the prompt leaves no room in the context
├── Unauthorized               401  AuthenticationError: no key, or a wrong one
├── NotFound                   404  NotFoundError: an unknown route
│   └── ModelNotFound          404  the model asked for is not the one served
├── Overloaded                 503  ServiceUnavailableError: the queue is full, come back later
├── EngineDead                 503  ServiceUnavailableError: the engine has stopped
└── StartupError               500  the server cannot start: model, memory or port
    └── KVCacheTooSmall        500  one request of full length does not fit

The app turns each into one JSON body from the four attributes; the command line prints the message.
"""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """Root of this folder. The message says what was given, what was expected and what to do.

    status: the HTTP status. type: the ``type`` of the OpenAI error object.
    param: the request field at fault.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @property
    def message(self) -> str:
        """The text for the client."""
        return str(self)


class BadRequest(ServeError):
    """A field of the request has a value that does not do."""

    status = 400
    type = "BadRequestError"


class ContextLengthExceeded(BadRequest):
    """The prompt is as long as the model's context or longer, so no token can follow it."""


class Unauthorized(ServeError):
    """The request carries no API key, or one that is not known."""

    status = 401
    type = "AuthenticationError"


class NotFound(ServeError):
    """There is nothing at this address."""

    status = 404
    type = "NotFoundError"


class ModelNotFound(NotFound):
    """The model named in the request is not served here."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.", "model")


class Overloaded(ServeError):
    """The queue is full; the client may try again after ``retry_after_s`` seconds."""

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(ServeError):
    """The engine thread has ended, so no request can be answered any more."""

    status = 503
    type = "ServiceUnavailableError"


class StartupError(ServeError):
    """The server cannot start with this model on this machine."""


class KVCacheTooSmall(StartupError):
    """The KV cache cannot hold one request of the full context length."""
