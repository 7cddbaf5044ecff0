"""The shared clock: this process's monotonic clock mapped to Redis TIME (DESIGN 3, "Stale work never runs").

Wall clocks are never compared: they differ between machines and jump (faults 78).
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

#: Samples among which the shortest round trip wins: old ones must go, since clocks drift (50 ppm over 16 s: 0.8 ms).
SAMPLES: Final = 16
#: A sample that differs by more than its own uncertainty and this says that the server's clock was set, or is another.
STEP_MS: Final = 5.0


class _Sample(Struct, frozen=True):
    offset: float  # server ms = monotonic ms + offset
    round_trip: float


class SharedClock:
    """`base.Clock`. Fed by `State` once a second; keeps its last offset while Redis is away."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic: Final = monotonic
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES)
        self._offset = 0.0

    @property
    def ready(self) -> bool:
        """Whether it was ever told the time; before that `now` means nothing."""
        return bool(self._samples)

    def now(self) -> int:
        """Milliseconds of the server's clock."""
        return int(self.monotonic() * 1000 + self._offset)

    def offer(self, sent: float, received: float, seconds: int, microseconds: int) -> None:
        """A reply to TIME: monotonic seconds when it was sent and received, and what the server said."""
        round_trip = (received - sent) * 1000
        sample = _Sample(seconds * 1000 + microseconds / 1000 - (sent + received) * 500, round_trip)
        if self._samples:
            uncertain = (round_trip + min(each.round_trip for each in self._samples)) / 2
            if abs(sample.offset - self._offset) > uncertain + STEP_MS:
                self._samples.clear()
        self._samples.append(sample)
        self._offset = min(self._samples, key=lambda each: each.round_trip).offset
