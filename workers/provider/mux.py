"""Frames on their way back: all streams for one asker share one FIFO and one NATS message per tick (DESIGN 3).

    Mux -> Pair (one per asker: ingress or loadgen instance) -> Channel (one per delivery of a request)

When a frame goes: `Accepted` waits for the tick or for whatever comes first; a Delta goes at the end of this loop turn
when the pair was quiet for a tick, else at the tick; terminals at the end of the loop turn. Batches are cut at 256
KiB, Deltas at 32 KiB. A publish that fails loses its frames: the asker sees the gap and ends the stream.

Flow control is ours: at most `WINDOW` Delta bytes of a stream beyond what the asker's client took, at most
`PAIR_WINDOW` of a pair beyond what the asker read. What may not go waits in the channel, whose upstream is paused
meanwhile, so that at most one read (and a whole answer, bounded by MAX_RESPONSE_BYTES) waits there.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from msgspec import Struct

from shared.bus.base import Bus, BusUnavailable, PayloadTooLarge
from shared.bus.replies import address
from shared.core.stream import WINDOW
from shared.wire.messages import (
    VERSION,
    Accepted,
    Credit,
    Delta,
    End,
    ErrorBody,
    Failed,
    Hop,
    Refused,
    ReplyTo,
    Summary,
    encode,
)

TICK_S: Final = 0.002
PAIR_WINDOW: Final = 16 * 1024 * 1024
MAX_BATCH: Final = 256 * 1024
MAX_DELTA: Final = 32 * 1024
#: A pair without streams is kept this long, for its offset: credits are absolute.
KEEP_PAIR_S: Final = 600.0
#: Pairs kept in all. Beyond it those of direct publishers that have no stream are forgotten first heard first: whoever
#: may publish can name any instance as its own, and an ingress's offset must not be lost.
MAX_PAIRS: Final = 4096

_OVERHEAD: Final = 64  # bytes of a frame besides its data: an estimate, for MAX_BATCH
_HEAD: Final = 512  # and of one with headers, an error or a summary

Head = dict[str, str] | None


class _Batch(Struct, frozen=True, array_like=True):
    """messages.Batch before its frames are encoded: the same bytes, in one go."""

    v: int
    role: str
    instance: str
    offset: int
    frames: list[Any]


class Pair:
    """One asker."""

    __slots__ = (
        "_flushed", "_frames", "_mux", "_size", "_soon", "_timer", "channels", "heard", "offset", "read", "subject",
        "waiting",
    )  # fmt: skip

    def __init__(self, mux: "Mux", subject: str, now: float) -> None:
        self._mux = mux
        self.subject = subject
        self.offset = 0  # Delta bytes sent to it, ever
        self.read = 0  # of those, read by it
        self.heard = now  # loop time of its last message
        self.channels: dict[tuple[int, int], Channel] = {}
        self.waiting: dict[tuple[int, int], Channel] = {}  # those with bytes that may not go yet, oldest first
        self._frames: list[Any] = []
        self._size = 0
        self._soon = False  # a flush at the end of this loop turn is on its way
        self._timer: asyncio.TimerHandle | None = None
        self._flushed = 0.0

    def put(self, frame: Any, size: int, *, lazy: bool = False, at_once: bool = False) -> None:
        """Append a frame and see to it that it goes."""
        if self._size + size > MAX_BATCH and self._frames:
            self.flush()
        self._frames.append(frame)
        self._size += size
        if self._soon:
            return
        if at_once and len(self.channels) == 1:  # nobody else's frame could share the message
            self.flush()
            return
        loop = self._mux.loop
        if not at_once:
            now = loop.time()
            due = (now if lazy else self._flushed) + self._mux.tick_s
            if due > now:
                if self._timer is None:
                    self._timer = loop.call_at(due, self.flush)
                return
        self._soon = True
        loop.call_soon(self.flush)

    def left(self) -> None:
        """One of its channels has closed."""
        if not self.channels:
            self._mux.check_closed()

    def flush(self) -> None:
        """One NATS message with all that waits."""
        self._soon = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._frames:
            return
        frames, self._frames, self._size = self._frames, [], 0
        self._flushed = self._mux.loop.time()
        self._mux.publish(self, frames)


class Channel:
    """The frames of one delivery. `on_pause(True)` asks to stop reading the upstream; `on_cancel(reason)` to give up.

    Made by `Mux.open`; closes itself with its terminal.
    """

    __slots__ = (
        "_at", "_end", "_head", "_key", "_on_pause", "_pair", "_paused", "_queue", "_seq", "_taken", "closed",
        "on_cancel", "sent", "stalled_since",
    )  # fmt: skip

    def __init__(
        self, pair: Pair, key: tuple[int, int], on_pause: Callable[[bool], None], on_cancel: Callable[[str], None]
    ) -> None:
        self._pair = pair
        self._key = key
        self._on_pause = on_pause
        self.on_cancel = on_cancel
        self._seq = 0
        self.sent = 0  # Delta bytes
        self._taken = 0
        self._queue: deque[bytes] = deque()
        self._at = 0  # how much of its first entry went
        self._head: Head = None
        self._end: End | Failed | None = None
        self._paused = False
        self.stalled_since = 0.0  # loop time of the last progress while something waits
        self.closed = False

    def accepted(self, instance: str, call: int) -> None:
        """The dispatch is won."""
        if not self.closed:
            self._pair.put(Accepted(*self._key, self._next(), instance, call), _OVERHEAD, lazy=True)

    def refused(self, holder: str, delivery: int) -> None:
        """Somebody else holds the stream; ends the channel."""
        if not self.closed:
            self._pair.put(Refused(*self._key, self._next(), holder, delivery), _OVERHEAD, at_once=True)
            self.close()

    def write(self, data: bytes, head: Head = None) -> None:
        """Bytes for the client; `head` with the first ones."""
        if self.closed:
            return
        size = len(data)
        pair = self._pair
        if (
            not self._queue
            and size <= MAX_DELTA
            and self.sent + size <= self._taken + WINDOW
            and pair.offset + size <= pair.read + PAIR_WINDOW
        ):
            self.sent += size
            pair.offset += size
            seq = self._seq
            self._seq = seq + 1
            stream, delivery = self._key
            pair.put(Delta(stream, delivery, seq, data, head), size + (_OVERHEAD if head is None else _HEAD))
            return
        self._head = self._head or head
        self._queue.append(data)
        self.pump()

    def end(self, summary: Summary, hops: tuple[Hop, ...]) -> None:
        """The good terminal, after everything written."""
        self._terminal(End(*self._key, 0, summary, hops))

    def failed(self, error: ErrorBody, head: Head, hops: tuple[Hop, ...]) -> None:
        """The bad one."""
        self._terminal(Failed(*self._key, 0, error, head, hops))

    def give_up(self, error: ErrorBody) -> None:
        """What waits is not taken: drop it, and tell the asker."""
        self._queue.clear()
        self.failed(error, self._head, ())

    def credit(self, taken: int) -> None:
        """The asker's client has taken this many bytes in all."""
        if self._taken < taken <= self.sent:
            self._taken = taken
            if self._queue:
                self.pump()

    def pump(self) -> None:
        """Send what may go now; pause or resume the upstream."""
        pair, queue = self._pair, self._queue
        while queue:
            window = min(self._taken + WINDOW - self.sent, pair.read + PAIR_WINDOW - pair.offset, MAX_DELTA)
            if window <= 0:
                break
            piece = queue[0][self._at : self._at + window]
            self._at += len(piece)
            if self._at == len(queue[0]):
                queue.popleft()
                self._at = 0
            self.sent += len(piece)
            pair.offset += len(piece)
            head, self._head = self._head, None
            pair.put(Delta(*self._key, self._next(), piece, head), len(piece) + (_HEAD if head else _OVERHEAD))
            self.stalled_since = pair._mux.loop.time()  # noqa: SLF001 - one module, one clock
        if queue:
            if self._key not in pair.waiting:  # nothing of it may have gone now, when others filled the pair's window
                self.stalled_since = pair._mux.loop.time()  # noqa: SLF001 - one module, one clock
            pair.waiting[self._key] = self
        else:
            pair.waiting.pop(self._key, None)
            if self._end is not None:
                self._terminal(self._end)
                return
        if self._paused != bool(queue):
            self._paused = bool(queue)
            self._on_pause(self._paused)

    def close(self) -> None:
        """Nothing goes out from here on."""
        if self.closed:
            return
        self.closed = True
        self._queue.clear()
        self._pair.waiting.pop(self._key, None)
        del self._pair.channels[self._key]
        self._pair.left()

    def _next(self) -> int:
        seq = self._seq
        self._seq = seq + 1
        return seq

    def _terminal(self, frame: End | Failed) -> None:
        if self.closed:
            return
        if self._queue:
            self._end = frame
            return
        frame = type(frame)(frame.stream, frame.delivery, self._next(), *_rest(frame))
        self._pair.put(frame, _HEAD, at_once=True)
        self.close()


def _rest(frame: End | Failed) -> tuple[Any, ...]:
    if isinstance(frame, End):
        return frame.summary, frame.hops
    return frame.error, frame.head, frame.hops


class Mux:
    """All pairs of one process. Bounded by the calls in flight; idle pairs are swept."""

    def __init__(
        self, bus: Bus, role: str, instance: str, loop: asyncio.AbstractEventLoop, tick_s: float = TICK_S
    ) -> None:
        self.loop = loop
        self.tick_s = tick_s
        self.lost = 0  # frames that could not be published
        self._bus = bus
        self._role = role
        self._instance = instance
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._waiter: asyncio.Future[None] | None = None

    def open(
        self, reply: ReplyTo, delivery: int, on_pause: Callable[[bool], None], on_cancel: Callable[[str], None]
    ) -> Channel | None:
        """The channel of a delivery; None when it is open already (a repeated message). Raises BadSubject."""
        pair = self._pairs.get((reply.role, reply.instance))
        if pair is None:
            subject = address(reply)
            self._make_room()
            pair = self._pairs[reply.role, reply.instance] = Pair(self, subject, self.loop.time())
        pair.heard = self.loop.time()
        key = (reply.stream, delivery)
        if key in pair.channels:
            return None
        channel = pair.channels[key] = Channel(pair, key, on_pause, on_cancel)
        return channel

    def _make_room(self) -> None:
        if len(self._pairs) < MAX_PAIRS:
            return
        idle = [key for key, pair in self._pairs.items() if key[0] == "loadgen" and not pair.channels]
        for key in idle[: max(1, MAX_PAIRS // 4)]:
            del self._pairs[key]

    def find(self, role: str, instance: str, stream: int, delivery: int) -> Channel | None:
        """An open channel."""
        pair = self._pairs.get((role, instance))
        return None if pair is None else pair.channels.get((stream, delivery))

    def hear(self, role: str, instance: str) -> None:
        """The asker lives."""
        pair = self._pairs.get((role, instance))
        if pair is not None:
            pair.heard = self.loop.time()

    def credit(self, credit: Credit) -> None:
        """Absolute, so a lost one is healed by the next; nonsense is ignored."""
        pair = self._pairs.get((credit.role, credit.instance))
        if pair is None:
            return
        pair.heard = self.loop.time()
        if pair.read < credit.read <= pair.offset:
            pair.read = credit.read
        for stream, delivery, taken in credit.streams:
            channel = pair.channels.get((stream, delivery))
            if channel is not None:
                channel.credit(taken)
        for channel in list(pair.waiting.values()):
            channel.pump()

    def pairs(self) -> Iterator[tuple[tuple[str, str], Pair]]:
        """Those with open channels; forgets those long without."""
        now = self.loop.time()
        for key, pair in list(self._pairs.items()):
            if pair.channels:
                yield key, pair
            elif now - pair.heard > KEEP_PAIR_S:
                del self._pairs[key]

    @property
    def pair_count(self) -> int:
        """Askers remembered."""
        return len(self._pairs)

    @property
    def open_channels(self) -> int:
        """Deliveries whose terminal has not gone."""
        return sum(len(pair.channels) for pair in self._pairs.values())

    async def wait_closed(self, timeout_s: float) -> None:
        """Return when no channel is open, or after so many seconds."""
        if self.open_channels:
            self._waiter = self.loop.create_future()
            await asyncio.wait((self._waiter,), timeout=timeout_s)

    def check_closed(self) -> None:
        """A pair has closed its last channel."""
        if self._waiter is not None and not self._waiter.done() and not self.open_channels:
            self._waiter.set_result(None)

    def flush(self) -> None:
        """Everything that waits for a tick goes now."""
        for pair in self._pairs.values():
            pair.flush()

    def publish(self, pair: Pair, frames: list[Any]) -> None:
        """One message; frames of a bus that is away are lost and counted."""
        batch = _Batch(VERSION, self._role, self._instance, pair.offset, frames)
        try:
            self._bus.publish(pair.subject, encode(batch))
        except (BusUnavailable, PayloadTooLarge):
            self.lost += len(frames)
