"""One pipelined connection on the hiredis parser: what the two or three calls per request run on.

Commands are written once per turn of the loop (core/pace.py: at once when they come alone); replies come in order and
meet a FIFO of futures. There are no retries: a timed-out command may still be applied (redis-py's default of ten
retries turns 0.3 s into 7 s: DESIGN 4). A timeout does not tear the connection down: the reply, when it comes, is
dropped in its place. After three timeouts in a row the gate closes and calls fail at once, until a PING is answered in
time.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

from hiredis import HiredisError, Reader, ReplyError
from msgspec import Struct

from shared.core.pace import Pace
from shared.state.address import Address
from shared.state.base import NotApplied, StateUnavailable
from shared.state.resp import pack

#: Commands written and not yet answered, at most: at 10 us a command the server is 80 ms behind by then.
MAX_PENDING: Final = 8192
#: Timeouts in a row that close the gate (DESIGN 4).
GATE_AFTER: Final = 3
#: How often a closed gate is probed, and the time within which a probe counts as answered, in seconds.
PROBE_EVERY: Final = 0.25
PROBE_TIMEOUT: Final = 0.1
#: A timer that runs later than this: our own loop stood still, and answers may lie in the socket unread.
STALL: Final = 0.02
#: A connection that has said nothing for so long under probes is given up: its peer may be gone without a FIN, and what
#: a partition swallowed TCP sends again only after waits that double. Below the 2 s in which all must be well again.
SILENCE: Final = 1.5
CONNECT_TIMEOUT: Final = 1.0
#: Waits between connects: doubled from the first to the last, each shortened by up to half by chance.
RECONNECT_FIRST: Final = 0.02
RECONNECT_LAST: Final = 0.5

_PING: Final = pack((b"PING",))


class _Waiting(Struct):
    """A command on its way: `reply` is None when nobody asks for it."""

    reply: "asyncio.Future[Any] | None"
    give_up: float


class Pipeline(asyncio.Protocol):
    """The connection. `send` and `cast` are synchronous; everything runs on the loop that called `connect`."""

    def __init__(
        self, url: str, *, greeting: tuple[bytes, ...] = (), dice: Callable[[], float] = random.random
    ) -> None:
        """`greeting` are packed commands sent after each (re)connect, before anything else (script loads)."""
        self._address = Address.parse(url)
        self._greeting = greeting
        self._dice = dice
        self._loop = asyncio.get_running_loop()
        self.now: Final = self._loop.time
        self._reader = Reader()
        self._transport: asyncio.Transport | None = None
        self._ready = False  # greeted
        self._out: list[bytes] = []
        self._pace = Pace()
        self._waiting: deque[_Waiting] = deque()
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._wake: asyncio.Handle | None = None
        self._wake_due = 0.0  # kept here: uvloop's handle of a time that has passed has no `when`
        self._graced = False
        self._misses = 0
        self._gate: asyncio.TimerHandle | None = None  # set while the gate is closed
        self._probe: asyncio.Future[Any] | None = None
        self._heard = 0.0

    # ---- for callers -------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Calls without an answer."""
        return len(self._waiting)

    @property
    def available(self) -> bool:
        """Whether a command would be sent now."""
        return self._ready and self._gate is None

    def send(self, command: bytes, within: float) -> "asyncio.Future[Any]":
        """Write a packed command in this turn of the loop; the future gets the reply, an error reply as a value.

        Raises NotApplied at once when not connected, gated or full; the future raises StateUnavailable after `within`
        seconds or when the connection is lost.
        """
        if not self._ready:
            raise NotApplied("redis: not connected")
        if self._gate is not None:
            raise NotApplied("redis: not answering, calls are held back until a probe is answered")
        return self._send(command, within)

    def cast(self, command: bytes) -> None:
        """Write a packed command whose reply nobody needs; dropped when it cannot be sent."""
        if self._ready and len(self._waiting) < MAX_PENDING:
            self._write(command, None, 0.0)

    async def execute(self, *args: bytes | int | str, within: float) -> Any:
        """One command, packed here. Raises StateUnavailable, for error replies too."""
        reply = await self.send(pack(args), within)
        if type(reply) is ReplyError:
            raise NotApplied(f"redis: {reply}")
        return reply

    async def many(self, commands: Iterable[tuple[bytes | int | str, ...]], within: float) -> list[Any]:
        """Several commands in one write, nothing of ours in between (so MULTI ... EXEC works); error replies as values.

        Raises StateUnavailable when any of them got no answer.
        """
        futures: list[asyncio.Future[Any]] = []
        try:
            futures.extend(self.send(pack(command), within) for command in commands)
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()  # done ones stay as they are

    async def connect(self) -> None:
        """Connect, and stay connected until `close`. Raises StateUnavailable when the first connect fails."""
        await self._open()
        self._keeper = self._loop.create_task(self._keep())

    def start(self) -> None:
        """The same without a first connect: calls fail at once until one succeeds."""
        self._lost.set()
        self._keeper = self._loop.create_task(self._keep())

    async def close(self) -> None:
        """Close; what still waits fails."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._transport is not None:
            self._transport.abort()
            await self._lost.wait()
        self._clear_timers()

    # ---- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with an empty order of replies."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not subclasses
        self._reader = Reader()
        self._lost.clear()
        self._heard = self.now()

    def data_received(self, data: bytes) -> None:
        """Give each reply to the command that is first in the order, or drop it when nobody waits any more."""
        reader, waiting = self._reader, self._waiting
        now = self._heard = self.now()
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                first = waiting.popleft()
                future = first.reply
                if future is not None and not future.done():
                    if now <= first.give_up:  # an answer in time, even when the timer has yet to look
                        self._misses = 0
                    future.set_result(reply)
        except (HiredisError, IndexError):  # not RESP, or a reply nobody asked for: the order is lost
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits: it may or may not have been applied."""
        self._transport, self._ready = None, False
        self._out.clear()
        waiting, self._waiting = self._waiting, deque()
        error = StateUnavailable(f"redis: connection lost{f' ({exc})' if exc else ''}")
        for command in waiting:
            if command.reply is not None and not command.reply.done():
                command.reply.set_exception(error)
        self._clear_timers()
        self._lost.set()

    # ---- writing and timeouts ----------------------------------------------------------------------------------------

    def _send(self, command: bytes, within: float) -> "asyncio.Future[Any]":
        if len(self._waiting) >= MAX_PENDING:
            raise NotApplied("redis: too many commands are waiting for an answer")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._write(command, future, self.now() + within)
        return future

    def _write(self, command: bytes, reply: "asyncio.Future[Any] | None", give_up: float) -> None:
        if self._out:
            self._out.append(command)
        elif self._pace.at_once(time.monotonic()) and self._transport is not None:
            self._transport.write(command)
        else:
            self._out.append(command)
            self._loop.call_soon(self._flush)
        self._waiting.append(_Waiting(reply, give_up))
        if reply is not None and (self._wake is None or give_up < self._wake_due):
            self._wake_at(give_up)

    def _flush(self) -> None:
        if self._transport is not None and self._out:
            self._pace.flushed(len(self._out))
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _wake_at(self, when: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._loop.call_at(when, self._give_up)
        self._wake_due = when

    def _give_up(self) -> None:
        """Fail what is past its time (one timer serves all: the next wake is the earliest that remains)."""
        now, earliest = self.now(), float("inf")
        if now - self._wake_due > STALL and not self._graced:  # timers run before reads: read first
            self._graced = True
            self._wake_at(now + 0.001)
            return
        self._wake, self._graced = None, False
        for command in self._waiting:
            if command.reply is None or command.reply.done():
                continue
            if command.give_up <= now:
                command.reply.set_exception(StateUnavailable("redis: no answer in time"))
                self._misses += 1
            else:
                earliest = min(earliest, command.give_up)
        if earliest < float("inf"):
            self._wake_at(earliest)
        if self._misses >= GATE_AFTER and self._gate is None:
            self._ask()

    # ---- the gate ----------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """While the gate is closed: one PING on its way, looked at every PROBE_EVERY."""
        self._gate = self._loop.call_later(PROBE_EVERY, self._ask)
        if self._probe is None:
            if self._transport is None or len(self._waiting) >= MAX_PENDING:
                return
            asked = self.now()
            self._probe = self._loop.create_future()
            self._probe.add_done_callback(lambda probe: self._answered(probe, asked))
            self._write(_PING, self._probe, float("inf"))
        elif self.now() - self._heard > SILENCE:
            self._abort()

    def _answered(self, probe: "asyncio.Future[Any]", asked: float) -> None:
        self._probe = None
        if probe.cancelled() or probe.exception() is not None or self._gate is None:
            return
        self._gate.cancel()
        if self.now() - asked <= PROBE_TIMEOUT:
            self._gate, self._misses = None, 0
        else:  # it is behind, or just thawed: ask again now
            self._ask()

    def _clear_timers(self) -> None:
        for timer in (self._wake, self._gate):
            if timer is not None:
                timer.cancel()
        self._wake = self._gate = self._probe = None
        self._misses = 0

    # ---- connecting --------------------------------------------------------------------------------------------------

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _open(self) -> None:
        """Connect and greet. Raises StateUnavailable."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._address.open(lambda: self)
                greetings = [self._send(each, CONNECT_TIMEOUT) for each in (*self._address.greeting(), *self._greeting)]
                replies = await asyncio.gather(*greetings)
        except (OSError, TimeoutError) as error:
            self._abort()
            raise StateUnavailable(f"redis: cannot connect to {self._address}: {str(error) or 'timed out'}") from error
        for reply in replies:
            if type(reply) is ReplyError:
                self._abort()
                raise StateUnavailable(f"redis: {reply}")
        self._ready = True

    async def _keep(self) -> None:
        wait = RECONNECT_FIRST
        while True:
            await self._lost.wait()
            await asyncio.sleep(wait * (1 - self._dice() / 2))
            wait = min(wait * 2, RECONNECT_LAST)
            try:
                await self._open()
            except StateUnavailable:
                continue
            wait = RECONNECT_FIRST
