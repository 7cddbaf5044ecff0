"""What a process does not take on: requests that waited too long in its own queue, and one tenant's share. Pure.

Where is a process's own queue? In the event loop. A turn reads what the sockets hold and then begins it, request after
request; what arrives meanwhile waits in the kernel for the next turn. So a request read in this turn came in after the
last poll at the earliest, or after this one if the loop slept in between, and that bounds how long it has waited. No
clock but our own is needed, and nothing that a sender could say.

When is a request shed? Not for its wait alone: a stall of the process (a frozen scheduler, a collection of garbage)
makes everybody wait and ends by itself, and a burst is worked off. That is CoDel's observation (RFC 8289): a queue is
bad when it *stands*. Here it stands once every request begun in INTERVAL_S, and BURST of them, or every one in BURST_S,
waited over WAIT_S. From then on those who waited over WAIT_S are shed, until nobody was for PAUSE_S. However large the
flood is, each turn begins some (TURN_S, WORK): else nobody at all would be begun once refusing takes WAIT_S a turn.
"""

from typing import Final

#: Issue 3: no request waits longer than this in a process's own queue before it is begun.
WAIT_S: Final = 0.05
#: RFC 8289's interval: longer than any stall that is not a fault of its own, short against a client's patience.
INTERVAL_S: Final = 0.1
#: Requests at once that are worked off: the test of a limit sends a thousand to one process (I2) ...
BURST: Final = 1000
#: ... unless that takes longer than this.
BURST_S: Final = 1.0
#: While the queue stands a turn begins requests for this long, whatever they waited, and for this share of the turn
#: before: a process that gets half of a core, or a flood, would else only refuse.
TURN_S: Final = 0.01
WORK: Final = 0.25
#: While the queue stands, so many requests of a turn are parsed at the least.
LEAST: Final = 16
#: Fewer late ones say nothing: each may have met a stall of its own.
FEW: Final = 16
#: Of declined requests that may be delivered again: a share of all, and so many at once. A retry budget, as Finagle's
#: and gRPC's, though no call upstream is repeated.
ALLOWED: Final = 0.1
CREDIT: Final = 100.0
#: A loop that did nothing for so long after the last begin has slept: its queue was empty. Five times the turn of a
#: process with 64 requests under way.
NAP_S: Final = 0.005
#: Late begins further apart than this have nothing to do with each other. A queue that is 20 % too full sheds one
#: request in six, by chance none for some turns: a tenth of this was too short (tests/core/test_overload.py).
PAUSE_S: Final = 1.0


class Queue:
    """The queue of one process. All times are seconds of one monotonic clock, which is also the loop's."""

    __slots__ = (
        "_began", "_begun", "_late", "_late_at", "_late_since", "_polled", "_quota", "_read", "_since", "_turn",
        "_turn_until", "_worst", "shed", "stands",
    )  # fmt: skip

    def __init__(self) -> None:
        self._polled = 0.0  # when the loop last came back from its poll, of the turns that read requests
        self._since = 0.0  # what this turn reads came in after that
        self._began = 0.0  # the last begin
        self._late = 0  # begins in a row that waited too long
        self._late_since = 0.0
        self._late_at = 0.0
        self.stands = False
        self._turn = 0.0  # while it stands: the poll of the turn being begun, and until when it begins in any case
        self._turn_until = 0.0
        self._begun = 0  # while it stands: begun in this turn, read in it, and how many may be read in it
        self._read = 0
        self._quota = 0
        self._worst = 0.0
        self.shed = 0  # since the start

    def read(self, polled: float) -> float:
        """A request is read in the turn of the loop that began at `polled`: the earliest moment it can have come."""
        if polled != self._polled:
            self._quota = max(LEAST, self._begun + self._begun // 4)
            self._begun = self._read = 0
            self._since = self._polled if polled - self._began < NAP_S else polled
            self._polled = polled
        return self._since

    def turn_is_full(self) -> bool:
        """Whether the request just read need not even be parsed, while the queue stands: this turn has read a quarter
        more than the last one could begin. `begin` stays the judge of the others."""
        self._read += 1
        if self._read <= self._quota:
            return False
        self._late_at = self._polled
        self.shed += 1
        return True

    def begin(self, since: float, now: float) -> bool:
        """Whether a request that came in after `since` is begun `now`; False: it is shed."""
        self._began = now
        waited = now - since
        if self.stands:
            if self._turn != self._polled:
                self._turn = self._polled
                self._turn_until = now + max(TURN_S, (self._polled - self._since) * WORK)
            if waited > WAIT_S and now > self._turn_until:
                self._late_at = now
                self.shed += 1
                return False
            self._begun += 1
            self.stands = now - self._late_at < PAUSE_S
        elif waited > WAIT_S:
            self._count(now)
        elif self._late:
            self._late = 0
        if waited > self._worst:  # noqa: PLR1730 - a call of max() is half of what all of this costs
            self._worst = waited
        return True

    def _count(self, now: float) -> None:
        """One more is begun late."""
        if not self._late or now - self._late_at >= PAUSE_S:
            self._late = 0
            self._late_since = now
        self._late += 1
        self._late_at = now
        lasted = now - self._late_since
        if (self._late >= BURST and lasted >= INTERVAL_S) or (self._late >= FEW and lasted >= BURST_S):
            self.stands = True
            self._late = 0

    def worst(self) -> float:
        """The longest wait of a request that was begun since this was last asked, in seconds."""
        worst, self._worst = self._worst, 0.0
        return worst


class Allowance:
    """Second deliveries of what a worker declined, by credit.

    One hot worker of four is relieved by the others; when all are full their refusals bring little more work.
    """

    __slots__ = ("_credit", "_seen")

    def __init__(self) -> None:
        self._credit = CREDIT
        self._seen = 0

    def spend(self, requests: int) -> bool:
        """Whether one more may be made, when there were so many `requests` in all."""
        self._credit = min(CREDIT, self._credit + (requests - self._seen) * ALLOWED)
        self._seen = requests
        if self._credit < 1:
            return False
        self._credit -= 1
        return True


class Shares:
    """Requests under way by tenant, at most `most` of each: one tenant cannot fill a process (faults 91)."""

    __slots__ = ("_most", "_under_way")

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: dict[str, int] = {}  # no tenant stays at 0: as many as there are requests, at most

    def take(self, tenant: str) -> bool:
        """One more, if the tenant may have it; then `give` must follow."""
        count = self._under_way.get(tenant, 0)
        if count >= self._most:
            return False
        self._under_way[tenant] = count + 1
        return True

    def give(self, tenant: str) -> None:
        """It has ended."""
        count = self._under_way[tenant] - 1
        if count:
            self._under_way[tenant] = count
        else:
            del self._under_way[tenant]

    def __len__(self) -> int:
        return len(self._under_way)
