"""A request's body: of which type, how large, and within what time (S1-R4, D16b, faults 66)."""

import asyncio
import re
from typing import Final

from aiohttp import web

from ingress import render
from ingress.middleware import Visit
from ingress.protocol import Connection
from shared.wire import errors

#: `utf8` and a semicolon without a parameter are not as the RFC has them, and are sent.
_JSON_TYPE: Final = re.compile(
    r"application/json[ \t]*(;[ \t]*(charset=\"?(utf-?8|us-ascii)\"?[ \t]*;?[ \t]*)?)?\Z", re.IGNORECASE
)


def check_type(request: web.BaseRequest) -> None:
    """S1-R4; nothing is ever decompressed here (faults 46). Raises UnsupportedMedia."""
    given = request.headers.get("Content-Type", "")
    if given != render.JSON and not _JSON_TYPE.match(given):
        raise errors.UnsupportedMedia
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise errors.UnsupportedMedia


async def read(visit: Visit, limit: int, within: float) -> bytes:
    """The body, of at most `limit` bytes, complete `within` seconds. Raises TooLarge, ClientError."""
    request = visit.request
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(visit, limit)
    content = request.content
    if content.is_eof():  # it came with the head, as nearly all do
        body = content.read_nowait(-1)
        if len(body) > limit:
            raise _too_large(visit, limit)
        return body
    if "Expect" in request.headers and not visit.http10:  # RFC 9110 10.1.1: HTTP/1.0 knows none
        _expect(visit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(within):
            while part := await content.readany():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise _too_large(visit, limit)
    except TimeoutError as error:
        visit.keep = False
        raise errors.ClientError(f"The request body did not arrive within {within:g} s.") from error
    return b"".join(parts)


def _too_large(visit: Visit, limit: int) -> errors.TooLarge:
    visit.keep = False  # the rest of the body is not worth reading
    return errors.TooLarge(f"The request body is larger than {limit} bytes.")


def _expect(visit: Visit) -> None:
    """RFC 9110 10.1.1. Raises ClientError."""
    if visit.request.headers.get("Expect", "").lower() != "100-continue":
        visit.keep = False
        raise errors.ClientError("The only expectation served is: Expect: 100-continue.")
    connection(visit).write(render.CONTINUE)


def connection(visit: Visit) -> Connection:
    """The client's connection."""
    found = visit.request.protocol
    assert isinstance(found, Connection)
    return found
