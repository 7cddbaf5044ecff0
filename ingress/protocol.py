"""aiohttp's connection with our manners (DESIGN 8).

aiohttp answers what its parser refuses by itself, past every handler: in plain text, with the offending header echoed
and logged. Here those refusals have the error shape of everything else and carry nothing of the input. A head must be
complete in time, connections are bounded, a client that takes nothing is cut (Timers), what the parser takes without a
bound is refused before it (framing.py), and a body whose framing breaks half way tells its waiting handler (aiohttp
leaves it waiting).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, cast

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError, _ErrInfo
from msgspec import Struct

from ingress import kernel, quirks
from ingress.framing import BadFraming, Framing
from shared.wire import errors

#: How often stalled clients are looked for, at the least.
SWEEP_S: Final = 5.0
#: How long an unread body is read and thrown away, so that the client sees our answer instead of a reset.
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 4 * 1024 * 1024
#: Connections above the bound that are told so and lingered on; the others of a flood are closed at once.
MAX_TURNED_AWAY: Final = 128
#: What the transport may hold that the kernel does not take. Beyond it the bytes wait here: a chunk of 300 bytes that
#: waits in uvloop's transport costs 300 more, here 8. The kernel still has SEND_BUFFER (app.py) to send meanwhile.
HIGH_WATER: Final = 4096
LOW_WATER: Final = 1024
#: Pieces that wait are joined when there are so many.
MAX_PIECES: Final = 64

#: How HTTP/2 begins, on a port that does not speak it; the parser refuses every other use of the method, too.
_H2_PREFACE: Final = b"PRI * HTTP/2.0\r\n"
#: One field's line; a head as a whole is bounded by framing.MAX_HEAD.
MAX_FIELD: Final = 16_384

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Timers(Struct, frozen=True, kw_only=True):
    """How long a client may take, in seconds (CLIENT_*_MS)."""

    head: float  # from the first byte of a head, or the connection's start, to the head's end (faults 60)
    idle: float  # kept alive without a request
    stalled: float  # taking nothing while bytes wait for it (faults 58, 59)


class Drained(Protocol):
    """Who wants to know that the client took bytes."""

    def drained(self) -> None:
        """The transport is below its low-water mark again."""


class Reply(web.StreamResponse):
    """A response that is already bytes: aiohttp's own assembles, checks and copies headers for 20 us a request."""

    def __init__(self, status: int, data: bytes, body: bytes = b"", *, keep: bool, linger: bool = False) -> None:
        # What aiohttp's RequestHandler looks at, and no more: its base constructor makes what a Reply never uses.
        self._status = status
        self.data = data
        self._more = body
        self._keep_alive = keep
        self._linger = linger  # the rest of what the client sends is thrown away before the connection closes
        self._request: web.BaseRequest | None = None

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write everything. Raises ConnectionResetError when the client is gone."""
        self._request = request
        connection = request.protocol
        assert isinstance(connection, Connection)
        if self.data:
            connection.write(self.data)
        if self._more:
            connection.write(self._more)

    async def write_eof(self, data: bytes = b"") -> None:
        """Wait until the client has taken enough for the next request to be read."""
        assert self._request is not None
        assert not data
        if self._request.protocol.writing_paused:
            await self._request.writer.drain()
        if self._linger:
            connection = self._request.protocol
            assert isinstance(connection, Connection)
            await connection.linger()


class Connection(RequestHandler):
    """One client connection."""

    __slots__ = (
        "_body", "_discard", "_discarded", "_framing", "_head_timer", "_pieces", "_progress",
        "_progress_at", "_server", "listener", "since", "waiting", "written",
    )  # fmt: skip

    def __init__(self, server: "Server", **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._body: StreamReader = EMPTY_PAYLOAD  # of the newest request
        self._discard = False
        self._discarded = 0
        self._framing = Framing()
        self._head_timer: asyncio.TimerHandle | None = None
        self.listener: Drained | None = None
        self.written = 0  # bytes given to us
        self.waiting = 0  # of those, not yet given to the transport, which is full
        self._pieces: list[bytes] = []
        self.since = 0.0  # the earliest moment the next request can have come; 0: it waited behind another of its own
        self._progress = 0
        self._progress_at = 0.0

    def write(self, data: bytes) -> None:
        """Give bytes to the transport, or keep them until it has room. Raises ConnectionResetError when it is gone."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self.written += len(data)
        if not self.writing_paused:
            transport.write(data)
            return
        self.waiting += len(data)
        self._pieces.append(data)
        if len(self._pieces) >= MAX_PIECES:
            self._pieces = [b"".join(self._pieces)]

    def untaken(self) -> int:
        """Bytes the kernel has not taken for the client."""
        transport = self.transport
        return self.waiting + (transport.get_write_buffer_size() if transport is not None else 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the header timer; refuse at once above the bound."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is one, but does not say so
        if self._server.full():
            self._discard = self._force_close = True
            self.transport = transport
            self._server.turn_away(transport)
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)
        self._head_timer = self._loop.call_later(self._server.timers.head, self._late)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timer; aiohttp cancels the handler, which is how an exchange learns of it."""
        self._stop_head_timer()
        if self.transport is not None:
            self._server.turned_away.discard(self.transport)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; while nothing is being handled, a head is incomplete and the clock runs."""
        if self._discard:
            self._throw_away(data)
            return
        try:
            whole = bool(data) and self._framing.feed(data)  # aiohttp calls with b"" to go on with what it kept back
        except BadFraming as error:
            self._break_off(error)
            return
        if self._current_request is None:
            self.since = self._server.read(self._loop.time())
            if whole and self._server.crowded() and self._turned_away(data):
                return
        super().data_received(data)
        if self._messages:
            self._parsed(data)
        elif self._head_timer is None and self._waiter is not None and data:
            self._head_timer = self._loop.call_later(self._server.timers.head, self._late)

    def _parsed(self, data: bytes) -> None:
        """A request, or what could not be one, waits to be handled."""
        if self._head_timer is not None:
            self._stop_head_timer()
        message, body = self._messages[-1]
        if isinstance(message, _ErrInfo):
            if data.startswith(b"PRI ") and not data.startswith(_H2_PREFACE):
                never = errors.MethodNotAllowed()
                self._messages[-1] = (_ErrInfo(status=never.status, exc=never, message=""), EMPTY_PAYLOAD)
            self._tell_waiting()
        else:
            self._body = body

    def _turned_away(self, data: bytes) -> bool:
        """Whether this one request was refused without being parsed. Never before another one's answer."""
        if self._waiter is None or self._waiter.done() or self._messages or self.writing_paused:
            return False
        answer = self._server.answer_unparsed(data)
        if not answer:
            return False
        self.write(answer)
        self._next_keepalive_close_time = self._loop.time() + self._server.timers.idle
        if self._head_timer is not None:  # the connection's first: aiohttp has no timer for it yet
            self._head_timer.cancel()
            self._head_timer = self._loop.call_later(self._server.timers.head, self._late)
        return True

    def _throw_away(self, data: bytes) -> None:
        self._discarded += len(data)
        if self._discarded > LINGER_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def _break_off(self, error: BadFraming) -> None:
        """Refuse what the parser would have taken; whatever else comes is not read."""
        self._discard = True
        self._stop_head_timer()
        if self._tell_waiting():
            return
        refusal = BadHttpMessage("Too many headers" if error.head else "bad framing")
        self._messages.append((_ErrInfo(status=400, exc=refusal, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _tell_waiting(self) -> bool:
        """Let the request whose body will not be complete fail. Whether there is one."""
        if self._body.is_eof():
            return False
        self._body.set_exception(RequestPayloadError("bad framing"))
        return True

    async def start(self) -> None:
        """Aiohttp's loop over the requests of this connection. What fails in it outside a handler ends the connection;
        by itself it would stay open for ever, with no timer on it."""
        try:
            await super().start()
        finally:
            if self.transport is not None:
                self.transport.close()

    async def linger(self) -> None:
        """Say that no more comes, and read what the client still sends: closing at once would reset the connection and
        may take our answer with it (RFC 9112 9.6)."""
        self._discard = True
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
        await asyncio.sleep(LINGER_S)  # ends sooner when the client closes: aiohttp cancels the handler
        self.force_close()

    def eof_received(self) -> None:
        """The client sends no more. To a stream that can no longer be written to its end (the transport closes now)
        nothing is owed: waiting for a client that may never read would keep its upstream open."""
        if self.listener is not None and self.transport is not None:
            self.transport.abort()

    def resume_writing(self) -> None:
        """The client took bytes."""
        super().resume_writing()
        if self._pieces and self.transport is not None:
            data = b"".join(self._pieces)
            self._pieces.clear()
            self.waiting = 0
            self.transport.write(data)
        if self.listener is not None:
            self.listener.drained()

    def stalled(self, now: float) -> bool:
        """Whether the client took nothing for so long that it is cut, while bytes were waiting for it.

        What the kernel has sent and the other side has confirmed counts too: the kernel asks us for more only when a
        third of its buffer is free, which a slow reader of 1 KiB/s takes a minute for.
        """
        untaken = self.untaken()
        progress = self.written - untaken - (kernel.unconfirmed(self.transport) if untaken else 0)
        if untaken == 0 or progress != self._progress:
            self._progress, self._progress_at = progress, now
            return False
        return now - self._progress_at >= self._server.timers.stalled

    def busy(self) -> bool:
        """Whether a request is being answered, or bytes of an answer wait for the client."""
        return self._request_in_progress or self.untaken() > 0

    def idle_for(self) -> float:
        """Seconds since its last answer; 0.0 while there is anything to do."""
        waits = self._waiter is not None and not self._waiter.done() and not self._messages
        if not waits or self._head_timer is not None or self.busy():
            return 0.0
        return self._loop.time() - (self._next_keepalive_close_time - self._server.timers.idle)

    def has_unread(self) -> bool:
        """Whether bytes have come that the loop has not read yet."""
        return kernel.has_unread(self.transport)

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - aiohttp's signature
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Refuse in our shape. `message` holds the client's bytes: neither shown nor logged."""
        if self.listener is not None:  # an answer has begun: all that is left is to cut it
            raise ConnectionResetError("failed while streaming")
        if isinstance(exc, ConnectionError):  # the client left between two steps: nobody's fault, nobody to tell
            raise exc
        return self._server.refuse(status, exc)

    def log_exception(self, *args: Any, **more: Any) -> None:
        """What aiohttp's loop did not expect. Its words may quote the client."""
        error = more.get("exc_info")
        if isinstance(error, RequestPayloadError):  # a body nobody waited for: the connection closes, and that is all
            return
        self.logger.error(str(args[0]) if args else "", exc_info=quirks.masked(error))

    def _late(self) -> None:
        self._head_timer = None
        if self._current_request is None and not self._messages:
            self.force_close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Server(web.Server):
    """Makes connections, bounds them, sweeps the stalled ones."""

    def __init__(
        self, handler: Handler, *, refuse: Callable[[errors.HotpathError], Reply], read: Callable[[float], float],
        crowded: Callable[[], bool], answer_unparsed: Callable[[bytes], bytes], max_connections: int, timers: Timers,
        log: logging.Logger,
    ) -> None:  # fmt: skip
        super().__init__(handler, request_factory=quirks.make_request, handler_cancellation=True)
        self.timers = timers
        self._refuse = refuse
        self.read = read  # Queue.read
        self.crowded = crowded
        self.answer_unparsed = answer_unparsed
        self.turned_away: set[asyncio.Transport] = set()
        self._sweep_s = min(SWEEP_S, timers.stalled / 4)
        self._max = max_connections
        self._most_turned_away = max(1, min(MAX_TURNED_AWAY, max_connections // 3))
        self._log = log
        self._sweeper = self._loop.call_later(self._sweep_s, self._sweep)

    def __call__(self) -> Connection:
        """The protocol factory."""
        return Connection(
            self, loop=self._loop, access_log=None, auto_decompress=False, keepalive_timeout=self.timers.idle,
            lingering_time=LINGER_S, max_field_size=MAX_FIELD, tcp_keepalive=True, logger=self._log,
        )  # fmt: skip

    def full(self) -> bool:
        """Whether one more connection is too many."""
        return len(self._connections) >= self._max

    def turn_away(self, transport: asyncio.Transport) -> None:
        """Tell a connection above the bound so. A close with its request unread would be a reset, so the end waits a
        moment, for as many as that is cheap for."""
        transport.write(self._refuse(errors.Overloaded()).data)
        if len(self.turned_away) >= self._most_turned_away:
            transport.close()
            return
        transport.write_eof()
        self.turned_away.add(transport)
        self._loop.call_later(LINGER_S, transport.close)

    def refuse(self, status: int, exc: BaseException | None) -> Reply:
        """The answer to what aiohttp refused, or to a handler that failed."""
        if status >= 500:
            self._log.error("handler failed", exc_info=quirks.masked(exc))
            return self._refuse(errors.HotpathError())
        if status == errors.MethodNotAllowed.status:
            return self._refuse(errors.MethodNotAllowed())
        if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
            return self._refuse(errors.HeadersTooLarge())
        return self._refuse(errors.ClientError("The request is not valid HTTP/1.1.", param=None))

    def _sweep(self) -> None:
        now = self._loop.time()
        for connection, transport in list(self._connections.items()):
            if isinstance(connection, Connection) and connection.stalled(now):
                kernel.reset(transport)
        self._sweeper = self._loop.call_later(self._sweep_s, self._sweep)

    def busy(self) -> bool:
        """Whether any client waits for an answer or a part of one."""
        return any(isinstance(one, Connection) and one.busy() for one in self._connections)

    def close_idle(self, seconds: float) -> None:
        """Close the connections without a request for so long."""
        for one in list(self._connections):
            if isinstance(one, Connection) and one.idle_for() >= seconds and not one.has_unread():
                one.force_close()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Close every connection."""
        self._sweeper.cancel()
        for transport in self.turned_away:
            transport.abort()
        await super().shutdown(timeout)
