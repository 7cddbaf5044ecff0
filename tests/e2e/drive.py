"""A plain HTTP client for the end-to-end tests: it keeps every byte, leaves when told to, and knows a terminal."""

import asyncio
import json
import math
import time
from typing import Any

import aiohttp
from msgspec import Struct

NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_read=60)


class Seen(Struct, kw_only=True):
    """What one client saw."""

    status: int = 0  # 0: it left before there was one
    headers: dict[str, str] = {}
    body: bytes = b""
    left: bool = False  # the client went away on purpose
    broken: bool = False  # the connection ended before the body did
    took: float = 0.0  # seconds until it was over
    first: float = math.inf  # seconds until the first event of a stream had come

    @property
    def rid(self) -> str:
        """Our request id; empty when no headers came."""
        return self.headers.get("x-br-request-id", "")

    @property
    def streamed(self) -> bool:
        """Whether the answer is an event stream."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[bytes]:
        """The payloads of the `data:` lines; comments are skipped."""
        return [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]

    @property
    def ended_well(self) -> bool:
        """A 200 that was read to its good end."""
        if self.status != 200 or self.left or self.broken:
            return False
        return self.body.endswith(b"data: [DONE]\n\n") if self.streamed else True

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a failed answer, in the body or in the stream; {} when there is none."""
        for text in self.events[-1:] if self.streamed else [self.body]:
            if text.startswith(b'{"error"'):
                found: dict[str, Any] = json.loads(text)["error"]
                return found
        return {}

    @property
    def terminals(self) -> int:
        """How many ends the stream has: [DONE] or an error event (I4: exactly one)."""
        return sum(1 for text in self.events if text.startswith((b"[DONE]", b'{"error"')))

    @property
    def text(self) -> str:
        """The answer's text."""
        if not self.streamed:
            return "".join(choice["message"]["content"] or "" for choice in json.loads(self.body)["choices"])
        chunks = [json.loads(text) for text in self.events if text.startswith(b'{"id"')]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Client:
    """One tenant's client against a base URL (without /v1)."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._key = key

    async def chat(
        self,
        prompt: str,
        *,
        model: str = "sim-fast",
        headers: dict[str, str] | None = None,
        leave_after: float | None = None,
        leave_at: int | None = None,
        **body: Any,
    ) -> Seen:
        """Ask. Leaves `leave_after` seconds after sending, or once `leave_at` bytes of the body were read."""
        seen = Seen()
        began = time.monotonic()
        asked = self._ask(seen, {"model": model, "messages": [{"role": "user", "content": prompt}], **body},
                          headers or {}, leave_at, began)  # fmt: skip
        try:
            await asyncio.wait_for(asked, leave_after)
        except TimeoutError:
            seen.left = True
        except aiohttp.ClientError:
            seen.broken = True
        seen.took = time.monotonic() - began
        return seen

    async def _ask(
        self, seen: Seen, body: dict[str, Any], headers: dict[str, str], leave_at: int | None, began: float
    ) -> None:
        sent = {"Authorization": f"Bearer {self._key}", **headers}
        async with self._session.post(self._url, json=body, headers=sent, timeout=NO_LIMIT) as answer:
            seen.status = answer.status
            seen.headers = {name.lower(): value for name, value in answer.headers.items()}
            async for piece in answer.content.iter_any():
                seen.body += piece
                if seen.first == math.inf and b"data: " in seen.body:
                    seen.first = time.monotonic() - began
                if leave_at is not None and len(seen.body) >= leave_at:
                    seen.left = True
                    answer.close()
                    return


def session() -> aiohttp.ClientSession:
    """No bound on connections: a load test decides that itself."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
