"""A small HTTP/1.1 client on httptools: POST a body, get the answer's bytes by callback; connections pooled per origin.

What it does not do: redirects, proxies (nothing is read from the environment), compression, cookies, pipelining.

When may a request be sent again by itself? Only when no server can have acted on it: the connection closed before the
kernel had taken all of it (`Lost.unsent`). A server that got the whole request may have answered into a connection
that broke, so a later failure belongs to the caller, who makes a further call under its own number (I7).
"""

import asyncio
import select
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final, Protocol, cast

import httptools
from msgspec import Struct

from shared.wire.errors import Overloaded, UpstreamError, UpstreamTimeout
from workers.provider.address import resolve, unreachable
from workers.provider.origin import Origin

#: Head of an answer: lines and bytes. Node refuses heads over 16 KiB; OpenAI sends some 40 lines, 3 KiB (faults 75).
MAX_HEADERS: Final = 128
MAX_HEAD_BYTES: Final = 32_768
#: Bytes on the wire that bring no body: chunk sizes, extensions, trailers between two pieces of body (faults 75, 143).
MAX_QUIET_BYTES: Final = 65_536
#: An idle connection is closed after this, sooner if the server says so: most servers wait for 60 to 75 s, and one that
#: closes earlier is noticed when it does.
KEEP_IDLE_S: Final = 15.0
MAX_IDLE: Final = 256
#: After the answer's own end (`[DONE]`) the HTTP message should end too: so long and so much are waited for.
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 65_536
#: Bytes of one read (uvloop's own bring up to 256,000): what one brings may have to wait in the channel of a client
#: that does not read, and of those there may be thousands.
READ_BYTES: Final = 8_192
#: What the kernel may hold of one answer (Linux doubles it). Left to itself it grows to tcp_rmem's maximum, 6 MiB and
#: more; thousands of stalled answers of that size put the machine's TCP memory under pressure, which everybody feels.
#: 128 KiB a round trip of 100 ms are 1.3 MB/s: 5,000 events a second.
RECEIVE_BUFFER: Final = 131_072


class Lost(Struct, frozen=True):
    """The connection ended before the answer did. `unsent`: no server has seen the whole request. `clean`: the peer
    closed it in order (all it wrote was read); else it was reset, or broke the protocol."""

    unsent: bool = False
    clean: bool = False
    malformed: bool = False


class Sink(Protocol):
    """Who receives one answer: on_head, on_body*, then on_end or on_lost. Called on the loop; must not raise."""

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers (names in lower case, the last of a repeated one)."""

    def on_body(self, data: bytes) -> None:
        """What one read brought."""

    def on_end(self) -> None:
        """The message is complete."""

    def on_lost(self, lost: Lost) -> None:
        """It will never be."""


class Connection(asyncio.BufferedProtocol):
    """One connection, one request at a time. States: idle (pooled), busy (has a sink), lingering, closed.

    All connections of a pool read into the pool's one buffer: what a read brought is parsed before the next one.
    """

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._loop = pool.loop
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)  # set in connection_made
        self._poll = select.poll()
        self._sink: Sink | None = None
        self._parser: Any = None
        self._headers: dict[str, str] = {}
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._quiet = 0  # wire bytes since the last body
        self._has_head = False
        self._answered = False  # a byte of the answer came
        self._complete = False
        self._reusable = False
        self._until_close = False  # neither length nor chunks: the close ends the body
        self._writing = False  # the kernel has not taken all of the request
        self._lingering = 0
        self._linger: asyncio.TimerHandle | None = None
        self.idle_since = 0.0
        self.keep_s = KEEP_IDLE_S
        self.fresh = True  # carries its first request
        self.closed = False

    # ---- for the exchange --------------------------------------------------------------------------------------------

    def send(self, request: bytes, sink: Sink) -> None:
        """Write the request; the answer goes to `sink`."""
        self._sink = sink
        self._parser = httptools.HttpResponseParser(self)
        self._headers = {}
        self._header_bytes = self._quiet = 0
        self._has_head = self._answered = self._complete = self._until_close = False
        self._transport.write(request)

    def pause(self, paused: bool) -> None:
        """Stop reading, or go on."""
        if not self.closed:
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def has_unread(self) -> bool:
        """Whether bytes (or its end) have come that the loop has not read yet."""
        return not self.closed and bool(self._poll.poll(0))

    def half_close(self) -> bool:
        """Say that we send no more, and go on reading; False when that is not possible (TLS)."""
        if self.closed or not self._transport.can_write_eof():
            return False
        self._reusable = False
        self._transport.write_eof()
        return True

    def release(self) -> None:
        """The sink needs no more: keep the connection if its message ends soon, else close it."""
        self._sink = None
        if self.closed:
            return
        self._transport.resume_reading()  # its last read may have filled the client's window
        if self._complete:
            self._park()
        elif self._has_head and not self._until_close:
            self._lingering = LINGER_BYTES
            self._linger = self._loop.call_later(LINGER_S, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once; the sink hears nothing."""
        self._sink = None
        if not self.closed:
            self._transport.abort()

    def usable(self, now: float) -> bool:
        """Whether an idle connection may carry a request: young enough, and nothing to be read from it (a close we have
        not yet been told of, or bytes that belong to nobody)."""
        if self._transport.is_closing() or now - self.idle_since > self.keep_s:
            return False
        return not self.closed and not self.has_unread()

    # ---- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Every byte the kernel has not taken is to be known (see `unsent`): the high-water mark is zero."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._poll.register(sock.fileno(), select.POLLIN)

    def pause_writing(self) -> None:
        """Something waits to be taken by the kernel."""
        self._writing = True

    def resume_writing(self) -> None:
        """All was taken."""
        self._writing = False

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Where the next read goes."""
        return self._pool.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Feed the parser (it copies what it hands on), then hand over what this read brought, in one piece."""
        if self._sink is None and not self._lingering:
            self.abort()  # bytes that belong to no request
            return
        self._answered = True
        self._quiet += nbytes
        try:
            self._parser.feed_data(self._pool.buffer[:nbytes])
        except httptools.HttpParserError:  # upgrades (101) are of this family too; so is what our callbacks raise
            self._break()
            return
        if self._lingering:
            self._lingering -= nbytes
            if self._complete:
                self._park()
            elif self._lingering <= 0:
                self.abort()
            return
        if self._body:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            self._quiet = 0
            if self._sink is not None:
                self._sink.on_body(body)
        elif self._quiet > MAX_QUIET_BYTES:
            self._break()
            return
        if self._complete and self._sink is not None:
            self._sink.on_end()

    def eof_received(self) -> bool:
        """The peer closed its side: so do we (False closes the transport, then `connection_lost` says it)."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, whoever wanted it."""
        self.closed = True
        if self._linger is not None:
            self._linger.cancel()
        self._pool.forget(self)
        sink, self._sink = self._sink, None
        if sink is None or self._complete:
            return
        if self._until_close and self._has_head and exc is None:
            sink.on_end()
        else:
            sink.on_lost(Lost(unsent=self._writing and not self._answered, clean=exc is None))

    # ---- httptools ---------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A second message on the same request is nobody's."""
        if self._complete:
            raise ValueError("more than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Headers and trailers, bounded; trailers are dropped."""
        self._header_bytes += len(name) + len(value) + 4
        if len(self._headers) >= MAX_HEADERS or self._header_bytes > MAX_HEAD_BYTES:
            raise ValueError("too many headers")
        if not self._has_head:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head."""
        status = self._parser.get_status_code()
        if status < 200:
            raise ValueError("an interim answer to no question")
        headers = self._headers
        self._has_head = True
        self._until_close = "content-length" not in headers and "chunked" not in headers.get("transfer-encoding", "")
        self._reusable = True
        if self._sink is not None:
            self._sink.on_head(status, headers)

    def on_body(self, data: bytes) -> None:
        """Collected until the read is through."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """The message ended where it said it would."""
        self._complete = True
        self._reusable = self._reusable and self._parser.should_keep_alive() and not self._until_close

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _park(self) -> None:
        """Back into the pool, if both sides want that."""
        self._lingering = 0
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._parser = None
        self._body.clear()
        if not self._reusable:
            self.abort()
            return
        self.fresh = False
        self.keep_s = _keep_alive(self._headers.get("keep-alive", ""))
        self.idle_since = self._loop.time()
        self._pool.park(self)

    def _break(self) -> None:
        """The peer does not speak HTTP as we do."""
        sink = self._sink
        body = b"".join(self._body)
        self._body.clear()
        self.abort()
        if sink is not None:
            if body:
                sink.on_body(body)
            sink.on_lost(Lost(malformed=True))


def _keep_alive(header: str) -> float:
    """Seconds an idle connection is kept: a second less than the server says."""
    name, _, value = header.partition("timeout=")
    digits = value.partition(",")[0].strip()
    if header and digits.isdigit() and len(digits) < 6 and not name.strip():
        return min(KEEP_IDLE_S * 4, max(0.0, int(digits) - 1.0))
    return KEEP_IDLE_S


class Pool:
    """The connections of one origin: idle ones newest first, at most MAX_IDLE; in all at most `limit`."""

    def __init__(
        self, origin: Origin, loop: asyncio.AbstractEventLoop, limit: int, tls: ssl.SSLContext | None = None
    ) -> None:
        self.origin = origin
        self.loop = loop
        self._limit = limit
        self._tls = (tls or ssl.create_default_context()) if origin.tls else None
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._dialling = 0
        self.buffer = memoryview(bytearray(READ_BYTES))

    def take(self) -> Connection | None:
        """An idle connection that may be used; those that may not are closed on the way."""
        now = self.loop.time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable(now):
                return connection
            connection.abort()
        return None

    async def dial(self, timeout_s: float) -> Connection:
        """A new connection. Raises UpstreamTimeout, UpstreamError (AddressRefused among them), Overloaded."""
        if len(self._open) + self._dialling >= self._limit:
            raise Overloaded("Too many connections to this provider.")
        self._dialling += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dial()
        except TimeoutError as exc:
            raise UpstreamTimeout("The provider did not accept a connection in time.") from exc
        finally:
            self._dialling -= 1

    async def _dial(self) -> Connection:
        origin = self.origin
        failure: Exception | None = None
        for address in await resolve(self.loop, origin.host, origin.port, private=origin.allow_private):
            try:
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self),
                    address,
                    origin.port,
                    ssl=self._tls,
                    server_hostname=origin.host if origin.tls else None,
                )
            except ssl.SSLError as exc:  # a wrong certificate is wrong at every address
                raise UpstreamError("The provider's TLS certificate or handshake was not accepted.") from exc
            except OSError as exc:
                failure = exc
                continue
            self._open.add(connection)
            return connection
        raise unreachable(failure, "The provider could not be reached.") from failure

    def park(self, connection: Connection) -> None:
        """Keep an idle connection."""
        if len(self._idle) >= MAX_IDLE:
            self._idle.pop(0).abort()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def sweep(self) -> None:
        """Close the idle ones that are too old: called now and then."""
        now = self.loop.time()
        for connection in [c for c in self._idle if now - c.idle_since > c.keep_s]:
            connection.abort()

    @property
    def open_connections(self) -> int:
        """Connected, idle or not."""
        return len(self._open)

    def close(self) -> None:
        """Close all."""
        for connection in list(self._open):
            connection.abort()
