"""The body of a request: bounded, declared as JSON, an object."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from qserve.serve.errors import BadRequest, ServeError
from qserve.serve.protocol import cut

MEDIA_TYPE = "application/json"


class BodyTooLarge(ServeError):
    """The request body is over the server's limit."""

    status = 413
    type = "RequestEntityTooLarge"


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object of a request, without its null fields: null is the same as not given.

    Raises ``BadRequest`` for another media type, for what is not JSON or not an object, and
    ``BodyTooLarge``, the latter before more than ``max_bytes`` are held.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise BadRequest(
            f"The content type is {cut(media_type) or 'missing'}: expected {MEDIA_TYPE}."
        )
    try:
        body = from_json(await _read(request, max_bytes), allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"The request body is not valid JSON: {cut(str(error))}.") from None
    if not isinstance(body, dict):
        raise BadRequest(
            f"The request body is a JSON {_kind(body)}: expected an object with the fields of the "
            "request."
        )
    return {name: value for name, value in body.items() if value is not None}


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is larger than {max_bytes} bytes: send less, or start the server with "
        "a higher --max-body-bytes."
    )


def _kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
