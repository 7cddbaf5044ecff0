"""A raw HTTP/1.1 exchange: exactly the bytes a test gives, and what came back, parsed no further than needed."""

import asyncio
import contextlib
import json
import time
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

#: How long a connection that was answered is watched for more.
QUIET_S = 0.05


class Answer(Struct, frozen=True):
    """One response. `status` 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes = b""  # bytes after the first response
    closed: bool = False  # and then the server ended the connection, within QUIET_S
    took: float = 0.0  # seconds until the first response was whole

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


async def exchange(
    url: str, data: bytes, *, within: float = 5.0, half_close: bool = False, quiet: float = QUIET_S
) -> Answer:
    """Send, then read until the first response is whole (or the server closes). Raises TimeoutError."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        began = time.monotonic()
        writer.write(data)
        if half_close:
            writer.write_eof()
        return await asyncio.wait_for(read_answer(reader, began, quiet), within)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader, began: float, quiet: float = QUIET_S) -> Answer:
    """The next response on this connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answer(0, {}, b"", closed=True, took=time.monotonic() - began)
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    status = int(first.split(" ")[1])
    rest, closed, body = b"", False, b""
    try:
        if headers.get("transfer-encoding") == "chunked":
            body = await _chunked(reader)
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        took = time.monotonic() - began
        rest = await asyncio.wait_for(reader.read(65536), quiet)
        closed = not rest
    except (asyncio.IncompleteReadError, ConnectionError):
        took, closed = time.monotonic() - began, True
    except TimeoutError:
        pass
    return Answer(status, headers, body, rest, closed, took)


async def _chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


def post(
    key: str,
    body: bytes,
    *,
    path: str = "/v1/chat/completions",
    headers: tuple[bytes, ...] = (),
    kind: str = "application/json",
) -> bytes:
    """A well-formed POST with this body; further header lines as they stand."""
    lines = [
        f"POST {path} HTTP/1.1".encode(), b"Host: x", f"Authorization: Bearer {key}".encode(),
        f"Content-Type: {kind}".encode(), f"Content-Length: {len(body)}".encode(), *headers,
    ]  # fmt: skip
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
