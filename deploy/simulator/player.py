"""Writes an answer to the socket, at its pace and with its fault, and enters in the bill what was written.

A token counts from the moment its bytes are handed to a transport that is not closing: a client that half-closes has
the transport closed by the event loop, which still flushes what it took; so what was counted is what the client can
read, and nothing is added afterwards. (A client that resets may have read less than the bill says.)
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
from aiohttp import web

from deploy.simulator import faults
from deploy.simulator.answer import DONE, Answer
from deploy.simulator.bill import Line
from deploy.simulator.faults import Fault

_BOM: Final = b"\xef\xbb\xbf"
_ENDS: Final = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}
_USAGE: Final = b'"choices":[],"usage":'
_NO_FAULT: Final = Fault()
_SERVER_ERROR: Final = {
    "error": {
        "message": "The server had an error while processing your request. Sorry about that!",
        "type": "server_error",
        "param": None,
        "code": None,
    }
}

#: An action returns whether it ended the answer.
_Action = Callable[[], Awaitable[bool]]


class ClientLeft(ConnectionResetError):
    """The client has closed; aiohttp ends the request quietly for this kind."""


def error_response(status: int, body: Any, headers: dict[str, str] | None = None) -> web.Response:
    """An error the way the real server words it; `body` None gives its plain server error."""
    if isinstance(body, str):
        return web.Response(status=status, text=body, headers=headers)
    shown = _SERVER_ERROR if body is None else body
    return web.Response(status=status, body=orjson.dumps(shown), content_type="application/json", headers=headers)


def replacement(request: web.Request, fault: Fault) -> web.Response:
    """What a fault answers instead of the model."""
    headers = dict(fault.headers)
    if fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    if fault.drop and request.transport is not None:
        request.transport.close()
    if fault.html:
        page = "<!doctype html><html><body><h1>Welcome</h1></body></html>"
        return web.Response(status=fault.status or 200, text=page, content_type="text/html", headers=headers)
    return error_response(fault.status or 200, fault.body, headers)


class Player:
    """One answer on its way out. `line` grows as bytes are written."""

    def __init__(self, request: web.Request, answer: Answer, line: Line, fault: Fault | None) -> None:
        self._request = request
        self._answer = answer
        self._line = line
        self._fault = fault or _NO_FAULT
        self._usage: dict[str, Any] | None = answer.usage()
        if self._fault.usage:
            self._usage = faults.bad_usage(self._fault.usage, answer.usage())
        self._response = web.StreamResponse(headers={"x-request-id": "req_" + answer.identity, **self._fault.headers})
        self._buffer: list[bytes] = []
        self._tokens = 0  # in the buffer
        self._events = 0  # in the buffer, of those that carry tokens

    async def play(self) -> web.StreamResponse:
        """Write the answer. Raises ClientLeft; is cancelled when the connection is gone."""
        fault, wanted = self._fault, self._answer.wanted
        if fault.delay_ms:
            await asyncio.sleep(fault.delay_ms / 1000)
        if wanted.stream:
            await self._stream()
        else:
            await self._whole()
        return self._response

    # ---- writing --------------------------------------------------------------------------------------------------

    async def _write(self, data: bytes, tokens: int) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientLeft
        self._line.output_tokens += tokens  # before the await: a cancellation while draining must not lose it
        await self._response.write(data)

    async def _send(self, data: bytes, tokens: int = 0) -> None:
        if not self._fault.slow_ms:
            await self._write(data, tokens)
            return
        for position in range(len(data)):
            last = position == len(data) - 1
            await self._write(data[position : position + 1], tokens if last else 0)
            await asyncio.sleep(self._fault.slow_ms / 1000)

    async def _flush(self) -> None:
        if self._buffer:
            data, tokens = b"".join(self._buffer), self._tokens
            self._buffer, self._tokens, self._events = [], 0, 0
            await self._send(data, tokens)

    async def _end(self, how: str) -> None:
        """End the connection the way a cut does; what was written before is flushed, except by a reset."""
        transport = self._request.transport
        if how == "clean" or transport is None:
            await self._response.write_eof()
        elif how == "reset":
            raw: Any = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()

    # ---- a stream -------------------------------------------------------------------------------------------------

    def _dress(self, event: bytes) -> bytes:
        """The event with the line ends, comments and data lines the fault wants."""
        fault = self._fault
        if fault.multiline:
            event = event.replace(b',"object"', b',\ndata: "object"', 1)
        if fault.comments:
            event = b": simulator\n" + event
        return event if fault.lines == "lf" else event.replace(b"\n", _ENDS[fault.lines])

    def _points(self) -> list[tuple[int, _Action]]:
        """What happens after how many events, in the order it happens when several fall together."""
        fault = self._fault
        known: list[tuple[int | None, _Action]] = [
            (fault.huge_after, self._huge),
            (fault.malformed_after, self._malformed),
            (fault.stall_after, self._stall),
            (fault.error_after, self._error),
            (fault.cut_after, self._cut),
        ]
        return [(after, action) for after, action in known if after is not None]

    async def _huge(self) -> bool:
        filler = b"x" * self._fault.huge_bytes
        await self._send(self._dress(b'data: {"id":"chatcmpl-huge","object":"%b"}\n\n' % filler))
        return False

    async def _malformed(self) -> bool:
        await self._send(self._fault.malformed.encode())
        return False

    async def _stall(self) -> bool:
        await asyncio.sleep(self._fault.stall_ms / 1000)
        return False

    async def _error(self) -> bool:
        error = _SERVER_ERROR if self._fault.error is None else self._fault.error
        await self._send(self._dress(b"data: %b\n\n" % orjson.dumps(error)))
        await self._response.write_eof()
        return True

    async def _cut(self) -> bool:
        await self._end(self._fault.cut)
        return True

    async def _strike(self, points: list[tuple[int, _Action]], written: int) -> bool:
        """Do what is due after `written` events; True when the answer has ended."""
        due = [point for point in points if point[0] == written]
        for point in due:
            points.remove(point)
            await self._flush()
            if await point[1]():
                return True
        return False

    async def _stream(self) -> None:
        fault, answer = self._fault, self._answer
        self._response.headers.setdefault("Content-Type", "text/event-stream; charset=utf-8")
        await self._response.prepare(self._request)
        if fault.bom:
            self._buffer.append(_BOM)
        if await self._chunks():
            return
        self._line.complete = not fault.no_finish
        self._line.usage_sent = answer.wanted.include_usage and not fault.usage and not fault.no_finish
        if not (fault.no_done or fault.no_finish):
            self._buffer.append(self._dress(DONE))
        await self._flush()
        await self._response.write_eof()

    async def _chunks(self) -> bool:
        """The chunks; True when a fault has ended the stream."""
        fault, answer, points = self._fault, self._answer, self._points()
        pace, burst = answer.wanted.pace_ms / 1000, answer.wanted.burst
        plain = not (fault.comments or fault.multiline or fault.lines != "lf")
        loop = asyncio.get_running_loop()
        start, written, roles = loop.time(), 0, len(answer.choices)
        for event, tokens in answer.events(self._usage):
            if roles:
                roles -= 1
            else:
                if points and await self._strike(points, written):
                    return True
                if fault.no_finish and not tokens:
                    return False
            if fault.usage_delay_ms and _USAGE in event:
                await self._flush()
                await asyncio.sleep(fault.usage_delay_ms / 1000)
            self._buffer.append(event if plain else self._dress(event))
            if tokens:
                self._tokens += tokens
                self._events += 1
                written += 1
                if self._events >= burst:
                    await self._flush()
                    await asyncio.sleep(start + written * pace - loop.time() if pace else 0)
        return False

    # ---- a whole answer -------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        fault = self._fault
        body = self._answer.whole(self._usage)
        if fault.error_after is not None:
            return orjson.dumps(_SERVER_ERROR if fault.error is None else fault.error)
        if fault.malformed_after is not None:
            body = body[: len(body) // 2]
        if fault.huge_after is not None:
            body += b" " * fault.huge_bytes
        return _BOM + body if fault.bom else body

    async def _whole(self) -> None:
        """Paced models think first; a stall is silence before the head; a cut sends half of the promised body."""
        fault, answer = self._fault, self._answer
        think = answer.wanted.pace_ms * answer.output_tokens / 1000
        if fault.stall_after is not None:
            think += fault.stall_ms / 1000
        if think:
            await asyncio.sleep(think)
        body = self._body()
        self._response.headers.setdefault("Content-Type", "application/json")
        self._response.content_length = len(body)
        await self._response.prepare(self._request)
        if fault.cut_after is not None:
            await self._send(body[: len(body) // 2])
            # "clean" has no meaning under a promised length
            await self._end("reset" if fault.cut == "reset" else "close")
            return
        await self._send(body, answer.output_tokens)
        self._line.complete = fault.error_after is None and fault.malformed_after is None
        self._line.usage_sent = self._line.complete and not fault.usage
        await self._response.write_eof()
