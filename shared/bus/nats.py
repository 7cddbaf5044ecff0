"""The bus on NATS (DESIGN 3): publish in this turn of the loop, handlers called as the bytes come in.

A thin client of our own over the documented protocol (bus/protocol.py), since nats-py puts each message through two
queues and three tasks, and since it keeps what was published in the moment a connection dies and sends it after the
next connect (faults 23: nothing stale may run). deploy/decisions tells the measurements.

Nothing is buffered but what the socket has not taken yet, at most WRITE_BYTES: beyond that, and while disconnected, a
publish fails at once. Received messages wait nowhere, so there is no pending limit to reach: a busy process reads late
and TCP holds the server back.
"""

import asyncio
import json
import logging
import random
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from shared.bus import checks
from shared.bus.address import Server, parse_url
from shared.bus.base import BusUnavailable, Handler, NotAllowed
from shared.bus.protocol import Parser, ProtocolError
from shared.core.pace import Pace

PING_S: Final = 2.0  # DESIGN 3: ping 2 s x 2
PINGS: Final = 2
CONNECT_S: Final = 1.0  # a try that began in a partition must be over well before the 2 s after its end
FLUSH_S: Final = 2.0
#: Waits between connects: doubled from the first to the last, each shortened by up to half by chance.
RECONNECT_FIRST_S: Final = 0.05
RECONNECT_LAST_S: Final = 0.5
#: What the socket may leave unsent: four times DESIGN 3's bound for one pair of processes, so a slow NATS (faults 28)
#: slows streams down before it fails them.
WRITE_BYTES: Final = 64 * 1024 * 1024
MAX_FLUSHES: Final = 1024

_log: Final = logging.getLogger("hotpath.bus")


class NatsSubscription:
    """A subscription; it survives reconnects."""

    def __init__(self, bus: "NatsBus", sid: bytes, pattern: str, queue: str, handler: Handler) -> None:
        self.sid = sid
        self.handler = handler
        self.pattern = pattern
        #: The subject of every message when the pattern has no wildcard, so that it need not be decoded each time.
        self.subject = "" if "*" in pattern or ">" in pattern else pattern
        self.line = b"SUB %b %b %b\r\n" % (pattern.encode(), queue.encode(), sid)
        self._bus = bus

    async def drain(self) -> None:
        """No new messages; returns when those received have been handled. While disconnected there are none."""
        await self._bus.unsubscribe(self)


class NatsBus(asyncio.Protocol):
    """The Bus of base.py; made by `connect`."""

    def __init__(self, servers: list[Server], name: str, on_change: Callable[[bool], None] | None = None) -> None:
        self.errors: dict[str, int] = {}  # by kind, since the start
        self.reconnects = 0
        self.received = 0
        self._servers = servers
        self._name = name
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._checks = checks.Checks()
        self._subscriptions: dict[bytes, NatsSubscription] = {}
        self._next_sid = 0
        self._max_payload = 0
        self._transport: asyncio.Transport | None = None
        self._parser = Parser(self._deliver, self._operation)
        self._connected = False
        self._unsent: list[bytes] = []  # of this turn of the loop
        self._pace = Pace()
        self._full = False  # the socket has WRITE_BYTES to send and takes no more
        self._closing = False
        self._login: dict[str, str] = {}
        self._greeting: asyncio.Future[None] | None = None  # done when the server took our login
        self._info: asyncio.Future[dict[str, Any]] | None = None
        self._lost = asyncio.Event()
        self._lost.set()
        self._pongs: deque[asyncio.Future[None] | None] = deque()
        self._refused: set[str] = set()  # patterns the server did not allow
        self._pings_open = 0
        self._ping_timer: asyncio.TimerHandle | None = None
        self._reconnecting: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, name: str, on_change: Callable[[bool], None] | None = None) -> "NatsBus":
        """Connect to one of the servers of `url`, each tried once; `on_change(connected)` tells of every change after
        that. Raises BusUnavailable, NotAllowed (the login is refused), ValueError (URL)."""
        bus = cls(parse_url(url), name, on_change)
        random.shuffle(bus._servers)
        fault: BusUnavailable | None = None
        for server in bus._servers:
            try:
                await bus._open(server)
            except BusUnavailable as error:
                fault = error
            else:
                return bus
        assert fault is not None
        raise fault

    # ---- Bus ---------------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a publish would be sent now."""
        return self._connected and not self._full

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes, as the server last said."""
        return self._max_payload

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send one message: at once, or with all others of this turn of the loop in one write (core/pace.py).

        Raises BusUnavailable, PayloadTooLarge, BadSubject.
        """
        self._checks.subject(subject)
        size = len(payload)
        if reply:
            self._checks.reply(reply)
            line = f"PUB {subject} {reply} {size}\r\n".encode()
        else:
            line = f"PUB {subject} {size}\r\n".encode()
        if size > self._max_payload:
            checks.size(payload, self._max_payload)
        if not self._connected or self._full:
            raise BusUnavailable("NATS does not take what was sent" if self._full else "NATS is disconnected")
        if not self._unsent:
            if self._pace.at_once(time.monotonic()) and self._transport is not None:
                self._transport.write(b"".join((line, payload, b"\r\n")))
                return
            self._loop.call_soon(self._send)
        self._unsent += (line, payload, b"\r\n")

    async def subscribe(self, pattern: str, handler: Handler, queue: str = "") -> NatsSubscription:
        """Deliver matching messages to `handler`. Raises BadSubject, BusUnavailable, NotAllowed."""
        checks.pattern(pattern, queue)
        self._next_sid += 1
        sid = str(self._next_sid).encode()
        subscription = NatsSubscription(self, sid, pattern, queue, handler)
        self._subscriptions[sid] = subscription
        try:
            self._write(subscription.line)
            await self.flush()
            self._check_allowed(pattern)
        except BaseException:  # also when cancelled: the caller has no subscription
            del self._subscriptions[sid]
            self._refused.discard(pattern)
            if self._connected:
                self._put(b"UNSUB %b\r\n" % sid)
            raise
        return subscription

    def _check_allowed(self, pattern: str) -> None:
        if pattern in self._refused:
            raise NotAllowed(f"this NATS user may not subscribe to {pattern}")

    async def unsubscribe(self, subscription: NatsSubscription) -> None:
        """See NatsSubscription.drain."""
        try:
            if self._connected and subscription.sid in self._subscriptions:
                self._write(b"UNSUB %b\r\n" % subscription.sid)
                await self.flush()  # what the server sent before it read UNSUB was handled before its PONG
        except BusUnavailable:
            pass  # the server has forgotten it too
        finally:
            self._subscriptions.pop(subscription.sid, None)

    async def flush(self) -> None:
        """Everything published before has reached the server. Raises BusUnavailable."""
        if len(self._pongs) >= MAX_FLUSHES:
            raise BusUnavailable("too many flushes wait for NATS")
        answered: asyncio.Future[None] = self._loop.create_future()
        self._write(b"PING\r\n")
        self._pongs.append(answered)
        try:
            async with asyncio.timeout(FLUSH_S):
                await answered
        except TimeoutError as error:
            raise BusUnavailable("NATS does not answer") from error

    async def close(self) -> None:
        """Flush and close."""
        self._closing = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
        if self._connected:
            try:
                await self.flush()
            except BusUnavailable:
                self._count("close", "what was published last may not have arrived")
        self._connected = False
        if self._transport is not None:
            self._transport.close()
            cut = self._loop.call_later(1, self._transport.abort)  # a frozen server takes no bytes
            await self._lost.wait()
            cut.cancel()

    # ---- connecting --------------------------------------------------------------------------------------------------

    async def _open(self, server: Server) -> None:
        """One connection, up to the server's answer to our first PING. Raises BusUnavailable, NotAllowed."""
        self._info = self._loop.create_future()
        self._greeting = self._loop.create_future()
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._greet(server)
        except (OSError, TimeoutError, BusUnavailable) as error:
            await self._drop()
            if isinstance(error, BusUnavailable):
                raise
            reason = str(error) or "no answer"
            raise BusUnavailable(f"NATS at {server.host}:{server.port}: {reason}") from error
        except BaseException:
            await self._drop()
            raise
        finally:
            self._info = self._greeting = None
        self._connected = True
        self._pings_open = 0
        self._ping_timer = self._loop.call_later(PING_S, self._ping)

    async def _greet(self, server: Server) -> None:
        assert self._info is not None
        assert self._greeting is not None
        await self._loop.create_connection(lambda: self, server.host, server.port)
        info = await self._info
        if server.tls or info.get("tls_required"):
            await self._start_tls(server)
        if self._transport is not None:
            self._transport.write(self._hello(server))
        await self._greeting
        if self._transport is None:
            raise BusUnavailable("NATS closed the connection")

    async def _start_tls(self, server: Server) -> None:
        if self._transport is None:
            return  # gone already: the greeting tells
        context = ssl.create_default_context()
        secured = await self._loop.start_tls(self._transport, self, context, server_hostname=server.host)
        if secured is None:
            raise BusUnavailable("NATS closed the connection while TLS began")
        self._transport = secured
        secured.set_write_buffer_limits(high=WRITE_BYTES)

    def _hello(self, server: Server) -> bytes:
        """CONNECT, every subscription, and the PING whose answer says that all of it was taken."""
        options = {
            "verbose": False, "pedantic": False, "lang": "hotpath", "version": "1", "protocol": 1, "echo": True,
            "headers": True, "no_responders": True, "name": self._name, **server.login,
        }  # fmt: skip
        lines = [b"CONNECT %b\r\n" % json.dumps(options).encode()]
        lines += [subscription.line for subscription in self._subscriptions.values()]
        return b"".join([*lines, b"PING\r\n"])

    async def _drop(self) -> None:
        """Give the connection up and wait until it is gone."""
        if self._transport is not None:
            self._transport.abort()
        await self._lost.wait()

    async def _reconnect(self) -> None:
        wait = RECONNECT_FIRST_S
        turn = 0
        while True:
            await asyncio.sleep(wait * random.uniform(0.5, 1))  # noqa: S311 - spreads clients, hides nothing
            wait = min(wait * 2, RECONNECT_LAST_S)
            try:
                await self._open(self._servers[turn % len(self._servers)])
            except BusUnavailable as error:
                turn += 1
                self._count("reconnect", str(error), logging.DEBUG)
                continue
            self.reconnects += 1
            self._tell(connected=True)
            return

    def _tell(self, *, connected: bool) -> None:
        if self._on_change is not None and not self._closing:
            self._on_change(connected)

    def _ping(self) -> None:
        """Every PING_S: a server that left PINGS of them unanswered is given up, and its unsent bytes with it."""
        self._ping_timer = self._loop.call_later(PING_S, self._ping)
        if self._pings_open >= PINGS:
            self._count("stale", "NATS does not answer: connecting anew", logging.ERROR)
            assert self._transport is not None
            self._transport.abort()
            return
        self._pings_open += 1
        self._pongs.append(None)
        self._put(b"PING\r\n")

    # ---- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with an empty parser."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not subclasses
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)
        self._parser = Parser(self._deliver, self._operation)
        self._pongs.clear()
        self._refused.clear()
        self._full = False
        self._lost.clear()

    def data_received(self, data: bytes) -> None:
        """Handle every whole message now."""
        try:
            self._parser.feed(data)
        except ProtocolError as error:
            self._count("protocol", str(error), logging.ERROR)
            assert self._transport is not None
            self._transport.abort()

    def pause_writing(self) -> None:
        """WRITE_BYTES wait to be sent."""
        self._full = True
        self._count("full", "NATS does not take what was sent", logging.ERROR)

    def resume_writing(self) -> None:
        """It takes bytes again."""
        self._full = False

    def connection_lost(self, exc: Exception | None) -> None:
        """What waits fails; a connection that was in use is made anew."""
        was_connected = self._connected
        self._connected = False
        self._transport = None
        self._unsent.clear()  # nothing of it is sent later
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        gone = BusUnavailable(f"NATS closed the connection ({exc})" if exc else "NATS closed the connection")
        waiting = [self._info, self._greeting, *self._pongs]
        self._pongs.clear()
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(gone)
                future.exception()  # nobody may be waiting for it any more
        self._lost.set()
        if was_connected and not self._closing:
            self._count("disconnect", str(gone), logging.ERROR)
            self._reconnecting = self._loop.create_task(self._reconnect())
            self._tell(connected=False)

    # ---- what the server says ----------------------------------------------------------------------------------------

    def _deliver(self, sid: bytes, subject: bytes, reply: bytes, payload: bytes, no_responders: bool) -> None:
        subscription = self._subscriptions.get(sid)
        if subscription is None:
            return  # sent before the server read our UNSUB
        self.received += 1
        name = subscription.subject or subject.decode()
        try:
            subscription.handler(name, reply.decode(), payload, no_responders)
        except Exception:  # noqa: BLE001 - the door of the bus: one handler's fault must not cost the others their messages
            self.errors["handler"] = self.errors.get("handler", 0) + 1
            _log.exception("bus handler failed", extra={"subject": subscription.pattern})

    def _operation(self, name: bytes, rest: bytes) -> None:
        if name == b"PING":
            self._put(b"PONG\r\n")
        elif name == b"PONG":
            self._on_pong()
        elif name == b"-ERR":
            self._on_error(rest.decode("utf-8", "replace").strip("'"))
        elif name == b"INFO":
            self._on_info(rest)
        elif name != b"+OK":
            raise ProtocolError("an unknown operation")

    def _on_pong(self) -> None:
        self._pings_open = 0
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_result(None)
        elif self._pongs:
            waiting = self._pongs.popleft()
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

    def _on_info(self, text: bytes) -> None:
        try:
            info = json.loads(text)
            self._max_payload = int(info["max_payload"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError("a malformed INFO") from error
        if self._info is not None and not self._info.done():
            self._info.set_result(info)
        if info.get("ldm"):
            _log.warning("this NATS server is about to shut down")

    def _on_error(self, text: str) -> None:
        """A permissions violation costs one message or subscription; all others are followed by a close."""
        lowered = text.lower()
        if "permissions violation for subscription to" in lowered:
            self._refused.update(text.split('"')[1::2])
        if self._greeting is not None and not self._greeting.done() and "permissions violation" not in lowered:
            error = NotAllowed if "authorization" in lowered else BusUnavailable
            self._greeting.set_exception(error(f"NATS says: {text}"))
        self._count("permissions" if "permissions" in lowered else "server", text, logging.ERROR)

    def _count(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        self.errors[kind] = self.errors.get(kind, 0) + 1
        _log.log(level, "bus: %s", text, extra={"kind": kind})

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _write(self, line: bytes) -> None:
        if not self._connected:
            raise BusUnavailable("NATS is disconnected")
        self._put(line)

    def _put(self, line: bytes) -> None:
        """Behind what was published before."""
        if self._transport is None:
            return
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.append(line)

    def _send(self) -> None:
        if self._unsent and self._transport is not None:
            self._pace.flushed(len(self._unsent) // 3)
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
