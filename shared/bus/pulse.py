"""The pulse of one process: it says that its instances live, hears who else does, and notices when it stood still.

Beats go out every 500 ms, in the first two seconds every 100 ms: processes that boot together find each other within
100 ms. A process that notices that its own loop stood still for over 250 ms grants everybody one beat of grace
(DESIGN 3): the silence may have been its own.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from shared.bus.base import Bus, BusUnavailable, PayloadTooLarge
from shared.bus.roster import BEAT_S, Roster
from shared.bus.sender import Sender
from shared.wire import subjects
from shared.wire.messages import UNREADABLE, VERSION, Beat, decode_beat, encode

EARLY_BEATS: Final = 20
EARLY_BEAT_S: Final = 0.1
#: With a look each 100 ms and 150 ms of lateness allowed, no stall over 250 ms goes unnoticed.
LOOK_S: Final = 0.1
LATE_S: Final = 0.15
#: Whoever lives has beaten once in this time.
ACQUAINT_S: Final = BEAT_S + 0.1

_log: Final = logging.getLogger("hotpath.pulse")


@dataclass(frozen=True, slots=True)
class Living:
    """One instance of this process."""

    role: str
    instance: str
    capacity: int
    in_flight: Callable[[], int]
    redis: Callable[[], tuple[bool, bool]]  # whether it has reached Redis since its start, and does now
    bus: Bus
    sender: Sender
    stored: Callable[[], bool] = lambda: True  # whether JetStream takes what it has to store


class Pulse:
    """Beats of this process's instances, and the rosters that others' beats fill."""

    def __init__(self, rosters: Mapping[str, Roster]) -> None:
        self.ignored = 0  # beats not understood, or not their subject's
        self.stalls = 0
        self._rosters = rosters
        self._living: list[Living] = []
        self._url = ""
        self._draining = False
        self._booting = False
        self._sent = 0
        self._beat_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._awaited: set[str] = set()  # roles not heard yet, while `acquaint` waits
        self._acquainted = asyncio.Event()
        self._listens_since = 0.0

    async def listen(self, bus: Bus, roles: Iterable[str]) -> None:
        """Follow the beats of these roles; each has a roster. Raises what `subscribe` raises."""
        for role in roles:
            await bus.subscribe(subjects.beat(role, "*"), self._on_beat)
        self._listens_since = time.monotonic()

    async def acquaint(self, roles: AbstractSet[str], *, together: bool = False) -> None:
        """Return once everybody of these roles was heard: one beat after `listen`, before work is taken. `together`:
        the whole fleet starts now, so it is enough that each role was heard, if only booting: nobody is at work whose
        beat could still be missing. An instance that leaves does not count.

        A worker that took work before it knew whom to hand it to could only refuse it, at once, and would be sent more
        for being idle: 300 refusals in the half second after a guardian's restart (measured). One that knew only one
        of two, or only one that was booting, refused what its sibling could have passed on (seen: 503 after a routing
        and a provider were killed in the same moment).
        """
        if not together:
            if roles:
                await asyncio.sleep(max(0.0, self._listens_since + ACQUAINT_S - time.monotonic()))
            return
        now = time.monotonic()
        self._awaited = {role for role in roles if not any(map(_stays, self._rosters[role].alive(now)))}
        if self._awaited:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._acquainted.wait(), ACQUAINT_S)
            self._awaited = set()

    def announce(self, living: list[Living]) -> None:
        """Say that these are booting: they are to be sent nothing yet, but nobody need wait to hear of them."""
        self._booting = True
        self._begin(living)

    def start(self, living: list[Living], metrics_url: str) -> None:
        """Say at once that these live, and go on saying it."""
        self._booting = False
        self._url = metrics_url
        self._sent = 0
        self._begin(living)

    def _begin(self, living: list[Living]) -> None:
        self._living = living
        self.beat()
        if self._look_timer is None:
            self._look(time.monotonic())

    def drain(self) -> None:
        """Say that nothing more should be sent here; the beats go on."""
        self._draining = True
        self.beat()

    def stop(self) -> None:
        """No further beat."""
        for timer in (self._beat_timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        self._living = []

    def beat(self) -> None:
        """One beat now, the next ones by themselves."""
        if not self._living:
            return
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        wait = EARLY_BEAT_S if self._sent < EARLY_BEATS else BEAT_S
        self._beat_timer = asyncio.get_running_loop().call_later(wait, self.beat)
        self._sent += 1
        now = time.monotonic()
        for one in self._living:
            one.sender.sweep(now)
            loaded, reaching = one.redis()
            beat = Beat(
                role=one.role,
                instance=one.instance,
                pid=os.getpid(),
                in_flight=0 if self._booting else one.in_flight(),
                capacity=one.capacity,
                draining=self._draining or self._booting,
                loaded=loaded,
                reaching=reaching,
                metrics=self._url,
                booting=self._booting,
                stored=one.stored(),
            )
            try:
                one.bus.publish(subjects.beat(one.role, one.instance), encode(beat))
            except (BusUnavailable, PayloadTooLarge):
                continue  # silence is what the others should hear then

    def _on_beat(self, subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        try:
            beat = decode_beat(payload)
        except UNREADABLE:
            self.ignored += 1
            return
        # The subject says who may have sent it (NATS's allow-lists); the payload must agree. Who is two versions ahead
        # does not read what we would send it.
        if subject != subjects.beat(beat.role, beat.instance) or beat.v > VERSION + 1:
            self.ignored += 1
            return
        self._rosters[beat.role].on_beat(beat, time.monotonic())
        if self._awaited and _stays(beat):
            self._awaited.discard(beat.role)
            if not self._awaited:
                self._acquainted.set()

    def _look(self, due: float) -> None:
        now = time.monotonic()
        self._look_timer = asyncio.get_running_loop().call_later(LOOK_S, self._look, now + LOOK_S)
        late = now - due
        if late > LATE_S:
            for roster in self._rosters.values():
                roster.grace(now, late + LOOK_S)
            self.stalls += 1
            _log.warning("the event loop stood still", extra={"ms": int(late * 1000)})


def _stays(beat: Beat) -> bool:
    """Whether it takes work, or is about to."""
    return beat.booting or not beat.draining
