"""When to write: at once, or at the end of the loop's turn with whatever else this turn brings. Pure.

A flush at the turn's end is one system call and one wake-up of the reader for all messages of the turn. When there is
only one, it costs a further turn instead: an epoll of 4 us, and as much latency. So it is learnt: after SURE turns with
one message each the next is written at once, until a second one comes so soon that they would have shared a turn.

The first try asked only how long nothing had been written. On a busy machine that is long for every first message of a
turn; it went ahead alone, and NATS woke twice a turn: 140 us of its CPU a request in place of 45 (64 in flight).
"""

from typing import Final

#: Turns in a row: a load of many at once has company in one of ten at the least.
SURE: Final = 64
#: Two messages of one turn come closer together than this; two of one request's round trips do not.
COMPANY_S: Final = 0.0001


class Pace:
    """Of one connection. `now` is monotonic seconds."""

    __slots__ = ("_alone", "_last")

    def __init__(self) -> None:
        self._alone = 0
        self._last = 0.0

    def at_once(self, now: float) -> bool:
        """Whether a message that comes now, the first of its turn as far as is known, is written at once."""
        if self._alone < SURE:
            return False
        if now - self._last < COMPANY_S:
            self._alone = 0
            return False
        self._last = now
        return True

    def flushed(self, count: int) -> None:
        """A turn's end wrote so many messages."""
        self._alone = self._alone + 1 if count == 1 else 0
