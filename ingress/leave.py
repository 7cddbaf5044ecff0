"""How an ingress leaves (S1-H5, D8, faults 84; deploy/decisions/0016-rolling.md).

    another ingress lives and stays           the last one
    ----------------------------------------  -------------------------------------------------------
    lets nobody in any more                   goes on letting clients in
    serves what comes on open connections     refuses it: 503 "Service Unavailable - shutting down"
    /ready 200                                /ready 503

Which of the two it is may change while it leaves (all are told to end at once: none is anybody's sibling). Every answer
says `Connection: close`. A kept-alive connection is closed only after IDLE_S without a request: until then the client
may have sent one, and closing would lose it.

Whole answers get SHUTDOWN_DRAIN_MS from when they began or we did, streams SHUTDOWN_STREAM_DRAIN_MS in all. What is
left then is told so, and logged.
"""

import asyncio
import logging
from typing import Final

from msgspec import Struct

from ingress.deliver import Desk, Exchange
from ingress.listener import Listener
from ingress.middleware import Door
from ingress.protocol import Server
from shared.bus.roster import Roster
from shared.service import BootError
from shared.wire import errors

TICK_S: Final = 0.1
#: No common client sends on a connection that was idle for longer: undici keeps one 4 s, httpx (the openai SDK) 5 s,
#: aiohttp 15 s. Those that do (Go: 90 s) send again when an idle connection turns out to be closed.
IDLE_S: Final = 16.0
#: For the terminals of what was ended by us to be written.
LAST_WORDS_S: Final = 1.0
MAX_NAMED: Final = 20  # requests named in one log line


class Times(Struct, frozen=True, kw_only=True):
    """Seconds."""

    whole: float
    streams: float


class Leaving:
    """One ingress on its way out."""

    def __init__(
        self, *, door: Door, desk: Desk, server: Server, listener: Listener, siblings: Roster, times: Times,
        log: logging.Logger,
    ) -> None:  # fmt: skip
        self._door = door
        self._desk = desk
        self._server = server
        self._listener = listener
        self._siblings = siblings
        self._times = times
        self._log = log
        self._locked_out = False
        self._began = 0.0
        self._seen: dict[int, float] = {}  # exchange -> since when its time counts
        self._quiet_since = 0.0  # since when no request is in flight; 0 = one is

    async def run(self) -> None:
        """Return when every client has its answer, or the time is up and it was told so."""
        door, clock = self._door, self._desk.clock
        door.leaving = True
        self._began = clock()
        end = self._began + self._times.streams
        while True:
            last = not self._has_sibling(clock())
            await self._choose(last=last)
            now = clock()
            if now >= end or self._is_over(now, last=last):
                break
            self._end_late(now)
            await self._wait(TICK_S)
        self._end(list(self._desk.exchanges.values()))
        if door.in_flight:
            await self._wait(LAST_WORDS_S)

    def _has_sibling(self, now: float) -> bool:
        """Whether another ingress lives that is not leaving too."""
        return any(not beat.draining and beat.instance != self._desk.instance for beat in self._siblings.alive(now))

    async def _choose(self, *, last: bool) -> None:
        self._door.draining = last
        if last and not self._listener.open and not self._locked_out:
            try:
                await self._listener.start()
            except BootError as error:  # somebody else has taken the port meanwhile: nobody comes whom we could refuse
                self._locked_out = True
                self._log.warning("cannot listen again while leaving", extra={"error": str(error)})
        elif not last and self._listener.open:
            await self._listener.stop()

    def _is_over(self, now: float, *, last: bool) -> bool:
        if self._door.in_flight:
            self._quiet_since = 0.0
            # without an exchange they still read their bodies, and have as long for it as a whole answer
            return last and not self._desk.exchanges and now - self._began >= self._times.whole
        self._quiet_since = self._quiet_since or now
        busy = self._server.busy()
        if last:
            # a client that takes its last bytes slowly has as long as a whole answer
            return not busy or now - self._quiet_since >= self._times.whole
        self._server.close_idle(IDLE_S)
        return not self._server.connections

    def _end_late(self, now: float) -> None:
        """Whole answers that had their time."""
        open_now = self._desk.exchanges
        self._seen = {number: self._seen.get(number, now) for number in open_now}
        late = now - self._times.whole
        self._end([one for number, one in open_now.items() if not one.ask.stream and self._seen[number] <= late])

    def _end(self, left: list[Exchange]) -> None:
        """S1-H5c: say what did not finish, and end it."""
        if not left:
            return
        named = [f"{one.ask.label} ({one.ask.rid})" for one in left[:MAX_NAMED]]
        self._log.warning("ending requests that did not finish", extra={"count": len(left), "requests": named})
        for one in left:
            one.fail(errors.ShuttingDown().body(), "shutting down")

    async def _wait(self, seconds: float) -> None:
        """So long, or until nothing is in flight any more."""
        if not self._door.in_flight:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._door.emptied()
        except TimeoutError:
            pass
