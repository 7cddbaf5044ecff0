"""A pull consumer of a JetStream stream: `fetch`, then `ack` or `nak` each message (jetstream.py makes it).

Messages come to the inbox of a pull under the subject they were published to; what comes under the inbox's own subject
is a status (404, 408, 409, or NATS's 503), which only the server can send there.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from shared.bus.base import Bus, BusUnavailable, Subscription
from shared.bus.stored import NS, Stored, StreamUnavailable
from shared.wire import subjects

#: What a pull may bring in bytes: what one process holds at most, unacknowledged.
PULL_BYTES: Final = 4 * 1024 * 1024
#: A pull that ended without a word from the server (a reconnect, a lost status) is given up so long after its end.
LATE_S: Final = 1.0
#: Waits between tries to make the consumer: doubled from the first to the last.
RETRY_FIRST_S: Final = 0.25
RETRY_LAST_S: Final = 2.0

_ACK: Final = b"+ACK"

_json: Final = msgspec.json.Encoder().encode


class Consumer:
    """A pull consumer: `fetch`, then `ack` or `nak` each message; what is neither is delivered again after ack_wait."""

    def __init__(self, bus: Bus, stream: str, name: str, inbox: str, create: Callable[[], Awaitable[None]]) -> None:
        """`create` makes it at the server, or brings it up to date. Raises StreamUnavailable."""
        self._bus = bus
        self._inbox = inbox
        self._create = create
        self._loop = asyncio.get_running_loop()
        self._next = subjects.jetstream_consumer("CONSUMER.MSG.NEXT", stream, name)
        self._ready: deque[Stored] = deque()
        self._open = 0  # messages that the pull under way may still bring
        self._until = 0.0  # when it is over at the latest
        self._pull = 0
        self._made = False
        self._more = asyncio.Event()
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe to the inbox. Raises BusUnavailable."""
        self._subscription = await self._bus.subscribe(self._inbox + "*", self._on_message)

    async def close(self) -> None:
        """Take nothing more; what nobody fetched goes to somebody else at once, what is in hand after its ack_wait."""
        if self._subscription is not None:
            await self._subscription.drain()
        while self._ready:
            self.nak(self._ready.popleft(), 0)

    async def fetch(self, most: int, wait_s: float) -> list[Stored]:
        """The next messages, at most so many, as soon as there is one; none when `wait_s` passed without any, or while
        JetStream is away. Only one caller at a time."""
        end = self._loop.time() + wait_s
        pause = RETRY_FIRST_S
        while not self._ready and (left := end - self._loop.time()) > 0:
            self._more.clear()
            try:
                await self._ask(most, left)
                wait = left
            except (StreamUnavailable, BusUnavailable):
                wait = min(left, pause)
                pause = min(2 * pause, RETRY_LAST_S)
            try:
                async with asyncio.timeout(min(wait, left)):
                    await self._more.wait()
            except TimeoutError:
                pass
        return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

    async def _ask(self, most: int, wait_s: float) -> None:
        """See that a pull is under way. Raises StreamUnavailable, BusUnavailable."""
        now = self._loop.time()
        if self._open > 0 and now < self._until:
            return
        if not self._made:
            await self._create()
            self._made = True
        body = {"batch": most, "max_bytes": PULL_BYTES, "expires": max(int(wait_s * 1000), 1) * NS}
        self._pull += 1
        self._bus.publish(self._next, _json(body), f"{self._inbox}{self._pull}")
        self._open, self._until = most, self._loop.time() + wait_s + LATE_S

    def _on_message(self, subject: str, reply: str, payload: bytes, no_responders: bool) -> None:
        if subject.startswith(self._inbox):  # a status; messages come under the subject they were published to
            if subject == f"{self._inbox}{self._pull}":
                self._ended(payload, no_responders=no_responders)
        elif (stored := _stored(reply, payload)) is not None:
            self._open -= 1
            self._ready.append(stored)
            self._more.set()

    def _ended(self, payload: bytes, *, no_responders: bool) -> None:
        """The pull is over: 404 or 408 (nothing came), 409 (why), 503 (no consumer, no stream or no JetStream)."""
        code = payload[9:12]
        if code == b"100":  # a heartbeat
            return
        self._open = 0
        if no_responders or (code == b"409" and b"Consumer" in payload):
            self._made = False
        self._more.set()

    def again(self) -> None:
        """The bus was away: a pull that was under way will bring nothing."""
        self._open = 0
        self._more.set()

    def ack(self, stored: Stored) -> None:
        """It is done with. An acknowledgement that is lost costs another delivery."""
        self._answer(stored, _ACK)

    def nak(self, stored: Stored, delay_s: float) -> None:
        """Deliver it again, that much later."""
        self._answer(stored, b'-NAK {"delay": %d}' % (int(delay_s * 1000) * NS))

    def working(self, stored: Stored) -> None:
        """Still at it: ack_wait begins anew."""
        self._answer(stored, b"+WPI")

    def _answer(self, stored: Stored, what: bytes) -> None:
        try:
            self._bus.publish(stored.reply, what)
        except BusUnavailable:
            pass  # it is delivered again


def _stored(reply: str, payload: bytes) -> Stored | None:
    """`$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<deliveries>.<sequence>.<number>.<ns>.<pending>[.<token>]`."""
    tokens = reply.split(".")
    skip = 2 if len(tokens) > 9 else 0
    if tokens[:2] != ["$JS", "ACK"] or len(tokens) < 9 + skip:
        return None
    deliveries, sequence, _number, nanoseconds = tokens[4 + skip : 8 + skip]
    try:
        return Stored(int(sequence), int(nanoseconds) // NS, int(deliveries), payload, reply)
    except ValueError:
        return None
