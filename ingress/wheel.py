"""Timers of many requests in one: buckets of 25 ms, so that arming costs two dict operations and no system timer.

Nearly every request ends before its first timer is due; its entry is taken out again and nothing ever fires.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

GRAIN_S: Final = 0.025


class Timed(Protocol):
    """What the wheel carries."""

    armed: float  # when it is called next; inf = not in the wheel
    slot: int

    def wake(self, now: float) -> None:
        """`armed` has come. It may arm itself again."""


class Wheel:
    """Calls `wake` at most GRAIN_S late. Runs only while something is armed."""

    __slots__ = ("_clock", "_handle", "_loop", "_slots", "_turned")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._slots: dict[int, dict[int, Timed]] = {}
        self._turned = 0  # the last slot that was emptied
        self._handle: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def arm(self, timed: Timed, due: float) -> None:
        """Wake it at `due` (and at no other time)."""
        self.disarm(timed)
        slot = int(due / GRAIN_S) + 1
        if self._handle is None:
            self._turned = int(self._clock() / GRAIN_S)
            self._handle = self._loop.call_later(GRAIN_S, self._turn)
        slot = max(slot, self._turned + 1)
        timed.armed, timed.slot = due, slot
        bucket = self._slots.get(slot)
        if bucket is None:
            self._slots[slot] = {id(timed): timed}
        else:
            bucket[id(timed)] = timed

    def disarm(self, timed: Timed) -> None:
        """Forget it."""
        bucket = self._slots.get(timed.slot)
        if bucket is not None and bucket.pop(id(timed), None) is not None and not bucket:
            del self._slots[timed.slot]
        timed.armed, timed.slot = float("inf"), -1

    def _turn(self) -> None:
        now = self._clock()
        upto = int(now / GRAIN_S)
        due = range(self._turned + 1, upto + 1)
        slots = sorted(slot for slot in self._slots if slot <= upto) if len(due) > len(self._slots) else due
        self._turned = max(upto, self._turned)
        for slot in slots:
            for timed in self._slots.pop(slot, {}).values():
                timed.armed, timed.slot = float("inf"), -1
                timed.wake(now)
        self._handle = self._loop.call_later(GRAIN_S, self._turn) if self._slots else None
