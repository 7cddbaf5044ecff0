"""A raw HTTP/1.1 exchange: exactly the bytes a test gives, and what came back, parsed no further than needed."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct


class Answer(Struct, frozen=True):
    """One response. `status` 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes = b""  # bytes after the first response

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


async def exchange(url: str, data: bytes, *, within: float = 5.0, half_close: bool = False) -> Answer:
    """Send, then read until the first response is whole (or the server closes). Raises TimeoutError."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(data)
        if half_close:
            writer.write_eof()
        return await asyncio.wait_for(_read(reader), within)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader) -> Answer:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answer(0, {}, b"")
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    length = int(headers.get("content-length", "0"))
    try:
        body = await reader.readexactly(length)
        rest = await asyncio.wait_for(reader.read(65536), 0.05)
    except (asyncio.IncompleteReadError, ConnectionError):
        body, rest = b"", b""
    except TimeoutError:
        rest = b""
    return Answer(int(first.split(" ")[1]), headers, body, rest)


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
