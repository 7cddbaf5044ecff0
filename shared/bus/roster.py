"""Who lives: the instances of one role as their beats tell, and which of them gets the next message (DESIGN 1, 3).

Pure: `now` (monotonic seconds) and the dice are arguments. A beat younger than 1.5 s means alive; NATS's 503 or a
missed answer says dead at once, until the next beat. The choice is the power of two: of two instances drawn at random
the one with less in flight, counted as it last told plus what this process has sent it since. One whose beat is overdue
is alive but not asked while others are in time: a frozen instance gets requests for 0.75 s instead of 1.5, so that a
request cannot meet it in three deliveries of its four (500 ms apart).
"""

import random
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

from msgspec import Struct

from shared.wire.messages import Beat
from shared.wire.subjects import TOKEN

BEAT_S: Final = 0.5  # how often an instance says that it lives
ALIVE_S: Final = 1.5  # a beat older than this is nobody's: three were missed
OVERDUE_S: Final = 0.75  # half a beat late: only when nobody else is there
MAX_INSTANCES: Final = 4096  # a role's instances remembered; more is a fault or an attack, not a fleet
FORGET_S: Final = 60.0  # silent for this long: the id was of another boot and never comes back
#: Room is made at most so often: each try walks all members, and 20,000 beats of as many made-up instances stopped a
#: provider for 3.5 s when each of them tried.
FORGET_GAP_S: Final = 0.1

_NOBODY: Final[frozenset[str]] = frozenset()


class Dice(Protocol):
    """`random` itself, or a seeded `random.Random`."""

    def random(self) -> float:
        """A float in [0, 1)."""


class _Member(Struct):
    """What is known of one instance."""

    beat: Beat
    heard: float  # when the last beat came
    sent: int = 0  # messages sent to it since then
    dead: bool = False  # found dead since then

    def load(self) -> int:
        return self.beat.in_flight + self.sent


class Roster:
    """The instances of one role. Bounded: MAX_INSTANCES, the longest silent leave first."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.ignored = 0  # beats that were not believed
        self._members: dict[str, _Member] = {}
        self._forget_at = float("-inf")  # no room is made before
        # Whom a pick may choose from, valid until the first of them falls silent: beats only lengthen that, so a pick
        # does not walk all members.
        self._pool: list[tuple[str, _Member]] = []
        self._pool_until = float("-inf")

    def on_beat(self, beat: Beat, now: float) -> None:
        """Take a beat. One that names another role or no proper instance is counted and ignored."""
        if beat.role != self.role or TOKEN.match(beat.instance) is None:
            self.ignored += 1
            return
        member = self._members.get(beat.instance)
        if member is None:
            self._admit(beat, now)
            return
        was = member.beat
        if (
            member.dead
            or (was.draining, was.loaded, was.reaching) != (beat.draining, beat.loaded, beat.reaching)
            or now - member.heard >= OVERDUE_S
        ):
            self._pool_until = float("-inf")
        member.beat = beat
        member.heard = max(now, member.heard)
        member.sent = 0
        member.dead = False

    def _admit(self, beat: Beat, now: float) -> None:
        if len(self._members) >= MAX_INSTANCES and now >= self._forget_at:
            self._forget_at = now + FORGET_GAP_S
            self._forget(now)
        if len(self._members) >= MAX_INSTANCES:
            self.ignored += 1
            return
        self._members[beat.instance] = _Member(beat, now)
        self._pool_until = float("-inf")

    def _forget(self, now: float) -> None:
        """Make room: drop those silent for FORGET_S, or else for ALIVE_S."""
        for silence in (FORGET_S, ALIVE_S):
            gone = [instance for instance, member in self._members.items() if now - member.heard >= silence]
            for instance in gone:
                del self._members[instance]
            if gone:
                return

    def pick(self, now: float, skip: AbstractSet[str] = _NOBODY, dice: Dice = random) -> str | None:
        """The instance the next message goes to: alive, not draining, not in `skip`, loaded if any is, of those one
        whose beat is not overdue if there is such a one; None when there is none."""
        if now >= self._pool_until:
            self._fill(now)
        pool = self._pool
        if skip:
            pool = [entry for entry in pool if entry[0] not in skip] or [
                (instance, member)
                for instance, member in self._members.items()
                if instance not in skip and _lives(member, now) and not member.beat.draining
            ]
        count = len(pool)
        if count < 2:
            return pool[0][0] if pool else None
        first = int(dice.random() * count)
        second = int(dice.random() * (count - 1))
        if second >= first:
            second += 1
        one, two = pool[first], pool[second]
        return one[0] if one[1].load() <= two[1].load() else two[0]

    def _fill(self, now: float) -> None:
        alive = [(instance, member) for instance, member in self._members.items() if _lives(member, now)]
        serving = [entry for entry in alive if not entry[1].beat.draining]
        # Who never reached Redis can only refuse, who does not now refuses or serves degraded: better than nobody.
        loaded = [entry for entry in serving if entry[1].beat.loaded] or serving
        takers = [entry for entry in loaded if entry[1].beat.reaching] or loaded
        in_time = [entry for entry in takers if now - entry[1].heard < OVERDUE_S]
        self._pool, good_for = (in_time, OVERDUE_S) if in_time else (takers, ALIVE_S)
        self._pool_until = min((member.heard + good_for for _, member in self._pool), default=float("-inf"))

    def sent(self, instance: str) -> None:
        """One message went to `instance`: counts as load until its next beat tells."""
        member = self._members.get(instance)
        if member is not None:
            member.sent += 1

    def full(self, instance: str) -> None:
        """`instance` declined a request: it counts as full until its next beat tells its load."""
        member = self._members.get(instance)
        if member is not None:
            member.sent = max(member.sent, member.beat.capacity, 1)

    def dead(self, instance: str) -> None:
        """`instance` was found dead (503) or frozen: nothing goes there until its next beat."""
        member = self._members.get(instance)
        if member is not None and not member.dead:
            member.dead = True
            self._pool_until = float("-inf")

    def grace(self, now: float, stalled: float) -> None:
        """Our own loop stood still for `stalled` seconds until `now`: who was alive when that began gets one beat to be
        heard, since the silence may be ours (DESIGN 3)."""
        self._pool_until = float("-inf")
        for member in self._members.values():
            if now - stalled - member.heard < ALIVE_S:
                member.heard = max(member.heard, now - ALIVE_S + BEAT_S)

    def alive(self, now: float) -> list[Beat]:
        """The last beats of those alive, draining ones included."""
        return [member.beat for member in self._members.values() if _lives(member, now)]

    def heard(self, instance: str) -> float | None:
        """When the last beat of `instance` came; None when it is not known or found dead."""
        member = self._members.get(instance)
        return None if member is None or member.dead else member.heard

    def __len__(self) -> int:
        return len(self._members)


def _lives(member: _Member, now: float) -> bool:
    return not member.dead and now - member.heard < ALIVE_S
