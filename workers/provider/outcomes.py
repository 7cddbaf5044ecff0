"""How calls ended, to the breakers: batched each 100 ms, since nobody waits for it but a probe (DESIGN 1, S1-C2)."""

import asyncio
from typing import Final

from shared.bus.base import Bus, BusUnavailable, PayloadTooLarge
from shared.wire import subjects
from shared.wire.messages import Outcome, Outcomes, encode

EVERY_S: Final = 0.1
#: A batch that is full goes at once; 4096 outcomes are some 100 KiB.
MAX_BATCH: Final = 4096


class OutcomeLog:
    """Collects and publishes; what a bus that is away cannot take is lost: the next failures tell the same."""

    def __init__(self, bus: Bus, loop: asyncio.AbstractEventLoop) -> None:
        self._bus = bus
        self._loop = loop
        self._waiting: list[Outcome] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, endpoint: str, ok: bool | None, probe: str = "") -> None:
        """One ended call; None: it says nothing, which only a `probe` has to tell. A probe's verdict goes at once, with
        what waits: until then nobody else may call the endpoint."""
        self._waiting.append(Outcome(endpoint, ok is True, probe, ok is not None))
        if probe or len(self._waiting) >= MAX_BATCH:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(EVERY_S, self.flush)

    def flush(self) -> None:
        """Publish what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        calls, self._waiting = tuple(self._waiting), []
        try:
            self._bus.publish(subjects.OUTCOME, encode(Outcomes(calls=calls)))
        except (BusUnavailable, PayloadTooLarge):
            return
