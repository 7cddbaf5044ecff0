"""How long a process that died stays down before it is started again. Pure: times are arguments, in seconds.

A crash loop must not eat the machine (faults 21). A process that served and was killed, by the kernel's memory killer
or by hand, must be back before its siblings feel it, also when that happens a dozen times in a minute. What tells them
apart is whether it had been ready for a while, and how often that was of late.
"""

from typing import Final

FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 10.0
HEALTHY_S: Final = 30.0  # alive this long: the waits begin again at FIRST_PAUSE_S
SERVED_S: Final = 0.5  # ready this long: it served, and what ended it is not how it starts
#: So many times a process that had served comes back after FIRST_PAUSE_S; one more each REFILL_S. A start costs
#: half a second of CPU: a loop of processes that become ready and die settles at 10 % of a core.
BURST: Final = 20
REFILL_S: Final = 10.0


class Backoff:
    """The waits of one slot."""

    def __init__(self) -> None:
        self._growing = FIRST_PAUSE_S
        self._spare = float(BURST)
        self._at = 0.0  # when `_spare` was counted

    def pause(self, now: float, *, alive: float, served: float) -> float:
        """Seconds to wait for the next start, of a process that died `now` after `alive` seconds, `served` of them
        ready."""
        if alive >= HEALTHY_S:
            self._growing = FIRST_PAUSE_S
        if served >= SERVED_S:
            self._spare = min(BURST, self._spare + (now - self._at) / REFILL_S)
            self._at = now
            if self._spare >= 1:
                self._spare -= 1
                return FIRST_PAUSE_S
        wait = self._growing
        self._growing = min(wait * 2, MAX_PAUSE_S)
        return wait
