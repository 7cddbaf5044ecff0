"""Hand a message to one live instance of a role, and to another when NATS says that nobody was there (DESIGN 3).

The `reply` of each publish is the sender's own inbox with a token: NATS's 503 ("no responders") comes back only there,
within a round trip. Payloads are kept for that long and no longer, in bounded memory.

A process that is killed takes with it what stands unread in its socket, and NATS says nothing of that. So an instance
that was sent something is asked 100 and 200 ms later whether it is still there, by an empty message on its own subject
that nobody answers: a 503 says that it died, and what it was sent just before goes to another one, if a fence makes a
second delivery harmless (`fenced`). At most ten such messages a second go to an instance, whatever the load.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from msgspec import Struct

from shared.bus.base import Bus, BusUnavailable, PayloadTooLarge, Subscription
from shared.bus.roster import Roster
from shared.wire import subjects

#: A 503 is written in the same turn of the server that read the message; this leaves it ten stalled beats of time.
KEEP_S: Final = 1.0
MAX_KEPT: Final = 16_384
MAX_KEPT_BYTES: Final = 64 * 1024 * 1024
#: A message goes to as many instances one after the other; who dies faster than that leaves nobody to send to.
MAX_ROUNDS: Final = 5

#: Instances are looked after this often while something is sent to them, and once more after it.
LOOK_S: Final = 0.1
#: What was sent longer ago had been read by an instance that has died since: two looks, and how late they may be.
UNREAD_S: Final = 0.3

_NOBODY: Final[frozenset[str]] = frozenset()


class NoLiveInstance(Exception):
    """The role has no live instance that was not skipped: nothing was sent."""


class _Kept(Struct):
    """One message that may still come back."""

    role: str
    instance: str
    payload: bytes
    skip: AbstractSet[str]
    lost: Callable[[str, str], None] | None
    undeliverable: Callable[[], None]
    until: float
    fenced: bool


class Sender:
    """Sends to roles by their rosters; at most MAX_KEPT messages and MAX_KEPT_BYTES are kept for a second sending."""

    def __init__(
        self,
        bus: Bus,
        role: str,
        instance: str,
        rosters: Mapping[str, Roster],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._rosters = rosters
        self._clock = clock
        self._inbox = subjects.inbox(role, instance, "*")
        self._prefix = subjects.inbox(role, instance, "")
        self._kept: dict[str, _Kept] = {}  # in the order they were sent, so the oldest stand first
        self._kept_bytes = 0
        self._number = 0
        self._unsure: set[tuple[str, str]] = set()  # who was sent something since the last look
        self._before: set[tuple[str, str]] = set()  # and between the two before
        self._looked: dict[str, tuple[str, str]] = {}  # token -> who was asked after at the last look
        self._timer: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        self.resent = 0
        self.undeliverable = 0

    async def start(self) -> None:
        """Subscribe to the inbox: before the first send."""
        self._subscription = await self._bus.subscribe(self._inbox, self._on_inbox)

    @property
    def kept(self) -> int:
        """Messages that could still be sent again."""
        return len(self._kept)

    def send(
        self,
        role: str,
        payload: bytes,
        *,
        on_undeliverable: Callable[[], None],
        skip: AbstractSet[str] = _NOBODY,
        tried: AbstractSet[str] = _NOBODY,
        fenced: bool = False,
        lost: Callable[[str, str], None] | None = None,
    ) -> str:
        """Publish `payload` to one live instance of `role` and return its id: to none of `skip`, and to one of `tried`
        (which did not answer before) only when there is no other.

        When NATS answers that nobody is there, the instance is marked dead and another one gets the message (each at
        most once): `lost(dead, next)` is told. With none left `on_undeliverable()` is called, once. Both are called
        on the event loop, later than this call. Raises NoLiveInstance, BusUnavailable, PayloadTooLarge: nothing was
        sent then, and `on_undeliverable` is not called. `fenced`: the ledger's dispatch makes one call of it however
        often it comes, so what the instance may have died with unread is sent to another one.
        """
        now = self._clock()
        self.sweep(now)
        roster = self._rosters[role]
        instance = roster.pick(now, skip | tried) if tried else None
        if instance is None:
            instance = roster.pick(now, skip)
        if instance is None:
            raise NoLiveInstance(role)
        self._publish(_Kept(role, instance, payload, skip, lost, on_undeliverable, now + KEEP_S, fenced))
        return instance

    def _publish(self, kept: _Kept) -> None:
        self._number += 1
        token = str(self._number)
        self._bus.publish(subjects.worker(kept.role, kept.instance), kept.payload, self._prefix + token)
        self._rosters[kept.role].sent(kept.instance)
        self._kept[token] = kept
        self._kept_bytes += len(kept.payload)
        if kept.fenced:
            self._unsure.add((kept.role, kept.instance))
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """Ask after those that were sent something since the last look, or the one before."""
        self._looked.clear()
        asked, self._before, self._unsure = self._unsure | self._before, self._unsure, set()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look) if asked else None
        for role, instance in asked:
            self._number += 1
            token = str(self._number)
            try:
                self._bus.publish(subjects.worker(role, instance), b"", self._prefix + token)
            except BusUnavailable:
                return
            self._looked[token] = (role, instance)

    def _on_inbox(self, subject: str, _reply: str, _payload: bytes, no_responders: bool) -> None:
        if not no_responders:
            return
        token = subject[len(self._prefix) :]
        kept = self._forget(token)
        if kept is not None:
            role, dead = kept.role, kept.instance
            self._again(kept)
            if kept.fenced:
                self._died(role, dead)
        elif (found := self._looked.pop(token, None)) is not None:
            self._died(*found)

    def _died(self, role: str, instance: str) -> None:
        """What it was sent just before may be unread."""
        self._rosters[role].dead(instance)
        since = self._clock() + KEEP_S - UNREAD_S
        unread = [token for token, kept in self._kept.items() if kept.fenced and kept.instance == instance]
        for token in unread:
            if self._kept[token].until >= since and (kept := self._forget(token)) is not None:
                self._again(kept)

    def _forget(self, token: str) -> _Kept | None:
        kept = self._kept.pop(token, None)
        if kept is not None:
            self._kept_bytes -= len(kept.payload)
        return kept

    def _again(self, kept: _Kept) -> None:
        """Its instance is dead: the next one."""
        dead = kept.instance
        roster = self._rosters[kept.role]
        roster.dead(dead)
        kept.skip = kept.skip | {dead}
        now = self._clock()
        following = roster.pick(now, kept.skip)
        if following is not None:
            kept.instance = following
            kept.until = now + KEEP_S
            try:
                self._publish(kept)
            except (BusUnavailable, PayloadTooLarge):  # the connection went, or came back with a smaller limit
                following = None
        if following is None:
            self.undeliverable += 1
            kept.undeliverable()
            return
        self.resent += 1
        if kept.lost is not None:
            kept.lost(dead, following)

    async def settled(self) -> None:
        """Return once no 503 can come any more for what was sent: NATS answers a PING after what came before it. While
        the bus is away nothing can come either."""
        for _ in range(MAX_ROUNDS):
            sent = self._number
            try:
                await self._bus.flush()
            except BusUnavailable:
                return
            if self._number == sent:
                return

    def sweep(self, now: float) -> None:
        """Forget what no 503 can concern any more, and the oldest beyond the bounds."""
        while self._kept:
            token = next(iter(self._kept))
            kept = self._kept[token]
            if kept.until > now and len(self._kept) <= MAX_KEPT and self._kept_bytes <= MAX_KEPT_BYTES:
                return
            self._forget(token)
