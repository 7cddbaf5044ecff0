"""One POST to a URL of the operator's: its own small HTTP/1.1, since aiohttp's client costs each start 0.2 s.

The name is resolved and its address checked before it is dialled, as an endpoint's is (faults 74); no redirects, and
nothing of the answer is read but its status.
"""

import asyncio
import contextlib
import ssl
from typing import Any, Final
from urllib.parse import urlsplit

from shared.core.addresses import allowed

POST_S: Final = 10.0
MAX_LINE: Final = 4096
#: Told to try again: too many requests, a timeout, or the receiver's own fault.
_AGAIN: Final = frozenset({408, 425, 429})


class WebhookFailed(Exception):
    """It was not taken; `again`: another try may help."""

    def __init__(self, text: str, *, again: bool) -> None:
        super().__init__(text)
        self.again = again


class Webhook:
    """`url` is http:// or https://, as the settings have checked; `private`: its address need not be public."""

    def __init__(self, url: str, *, private: bool) -> None:
        parts = urlsplit(url)
        self._private = private
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        host = f"[{self._host}]" if ":" in self._host else self._host
        default = self._port == (443 if self._tls else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._head = (
            f"POST {target} HTTP/1.1\r\nHost: {host}{'' if default else f':{self._port}'}\r\n"
            "Content-Type: application/json\r\nUser-Agent: hotpath\r\nConnection: close\r\nContent-Length: "
        ).encode()

    async def post(self, body: bytes) -> None:
        """Returns when it was taken (2xx). Raises WebhookFailed, which names no more of the URL than its host."""
        try:
            async with asyncio.timeout(POST_S):
                status = await self._post(body)
        except TimeoutError as error:
            raise WebhookFailed(f"{self._host}: no answer in {POST_S:.0f} s", again=True) from error
        except (OSError, ValueError) as error:  # ValueError: a line without an end
            raise WebhookFailed(f"{self._host}: {error}", again=True) from error
        if not 200 <= status < 300:
            raise WebhookFailed(f"{self._host}: status {status}", again=status >= 500 or status in _AGAIN)

    async def _post(self, body: bytes) -> int:
        reader, writer = await self._open(await self._addresses())
        try:
            writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
            await writer.drain()
            words = (await reader.readline()).split(None, 2)
        finally:
            writer.close()
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise WebhookFailed(f"{self._host}: no HTTP answer", again=True)
        return int(words[1])

    async def _addresses(self) -> list[str]:
        found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=1)
        addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
        usable = [each for each in addresses if allowed(each, private=self._private)]
        if not usable:
            raise WebhookFailed(f"{self._host}: its address is not allowed (ALERT_WEBHOOK_PRIVATE)", again=False)
        return usable

    async def _open(self, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first of them that takes it: `localhost` is often ::1 first, where nobody listens. Raises OSError."""
        more: dict[str, Any] = {}
        if self._tls:
            context = await asyncio.to_thread(ssl.create_default_context)  # reads the system's certificates
            more = {"ssl": context, "server_hostname": self._host}
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(address, self._port, limit=MAX_LINE, **more)
        return await asyncio.open_connection(addresses[-1], self._port, limit=MAX_LINE, **more)
