"""One small GET without a client library: importing one would cost more than every request the command line makes."""

import asyncio
from typing import Final
from urllib.parse import urlsplit

TIMEOUT_S: Final = 2.0
MAX_ANSWER: Final = 1024 * 1024  # bytes


async def get(url: str, path: str, key: str = "") -> tuple[int, bytes]:
    """GET `path` of `url` with an optional bearer key: (status, body); (0, b"") when there is no answer."""
    parts = urlsplit(url)
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{authorization}Connection: close\r\n\r\n"
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(request.encode("ascii"))
                answer = b""
                while len(answer) < MAX_ANSWER and (more := await reader.read(65_536)):
                    answer += more
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body
