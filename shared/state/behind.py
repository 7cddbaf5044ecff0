"""What the ledger has still to be told, behind the answer: kept and tried until Redis takes it.

A worker that cannot pass a request on voids its reservation; a provider whose settlement got no answer settles later.
While Redis is away both wait here, in order, for as long as the process lives: nothing a client was served may go
unbilled because Redis was frozen for half a minute. Three bounds:

    number    MAX_SETTLES settlements: from then on `full`, and no call is begun whose settlement might not fit.
              MAX_VOIDS voids: a further one is left to its lease (I3), it costs headroom for a while and no money
    age       a void after VOID_S: its lease has done it. A settlement whose first try may have been applied, when the
              tombstone that makes it idempotent is nearly gone: later it would be billed twice
    the end   a drain waits for what is left as long as it may; what is not taken by then is written to the log with
              its amount, one line each, and counted

One task for all, alive only while something waits: AT_ONCE pipelined tries a turn, and a pause that doubles up to
PAUSE_LAST_S while none of them is taken (a closed gate refuses at once, so a Redis that is away costs nothing).
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from shared.state.base import Ledger, NotApplied, StateUnavailable
from shared.wire.messages import Ask

#: Settlements kept: 30 MB, and 1000 calls a second for 100 s.
MAX_SETTLES: Final = 100_000
#: Voids kept; more mean that Redis is away under full load, when leases are the better way.
MAX_VOIDS: Final = 10_000
#: The default lease of a whole answer (30 s + 10 s) is long over by then, that of a stream (120 s + 10 s) nearly.
VOID_S: Final = 120.0
#: The share of a tombstone's life in which a settlement that may have been applied is tried again.
DOUBT: Final = 0.9
AT_ONCE: Final = 64
PAUSE_FIRST_S: Final = 0.05
PAUSE_LAST_S: Final = 0.5


class Void(Struct, frozen=True):
    """See `Ledger.void`."""

    tenant: str
    rid: str
    delivery: int
    key: str
    user: str
    instance: str = ""
    call: int = 1


class Settle(Struct, frozen=True):
    """See `Ledger.settle`."""

    tenant: str
    rid: str
    call: int
    cost: int
    estimated: bool
    key: str
    user: str
    day: int
    tokens: int


class _Kept(Struct):
    post: Void | Settle
    until: float  # loop time; after that it is given up


class Behind:
    """What one worker has still to tell the ledger. `dice` spreads the workers' tries."""

    def __init__(
        self, ledger: Ledger, log: logging.Logger, *, tombstone_ms: int, dice: Callable[[], float] = random.random
    ) -> None:
        self._ledger = ledger
        self._log = log
        self._doubt_s = tombstone_ms / 1000 * DOUBT
        self._dice = dice
        self._loop = asyncio.get_running_loop()
        self._kept: deque[_Kept] = deque()
        self._trying: list[_Kept] = []  # taken out of the queue, answer not known yet
        self._settles = 0
        self._task: asyncio.Task[None] | None = None
        self.given_up = 0

    @property
    def under_way(self) -> int:
        """Voids and settlements not yet taken."""
        return len(self._kept) + len(self._trying)

    @property
    def settles(self) -> int:
        """Of those, settlements."""
        return self._settles

    def full(self, open_calls: int) -> bool:
        """Whether so many calls more could end in settlements that do not fit."""
        return self._settles + open_calls >= MAX_SETTLES

    def void(self, ask: Ask) -> None:
        """Give back what this delivery reserved."""
        self._void(Void(ask.tenant, ask.rid, ask.delivery, ask.key, ask.user))

    def void_doubt(self, ask: Ask, instance: str, call: int) -> None:
        """A dispatch or top-up (for `call`) of this instance got no answer, no call was made: settle it at 0."""
        self._void(Void(ask.tenant, ask.rid, ask.delivery, ask.key, ask.user, instance, call))

    def settle(self, settle: Settle, error: StateUnavailable) -> None:
        """Redis did not take this settlement, for that reason."""
        self._settles += 1
        safe = isinstance(error, NotApplied)
        self._keep(_Kept(settle, float("inf") if safe else self._loop.time() + self._doubt_s))

    def _void(self, void: Void) -> None:
        if self.under_way - self._settles >= MAX_VOIDS:
            self.given_up += 1
            return
        self._keep(_Kept(void, self._loop.time() + VOID_S))

    def _keep(self, kept: _Kept) -> None:
        self._kept.append(kept)
        if self._task is None:
            self._task = self._loop.create_task(self._try_all())

    async def _try_all(self) -> None:
        """Until nothing waits any more."""
        pause = PAUSE_FIRST_S
        try:
            while self._kept:
                if await self._turn():
                    pause = PAUSE_FIRST_S
                    continue
                await asyncio.sleep(pause * (1 - self._dice() / 2))
                pause = min(pause * 2, PAUSE_LAST_S)
        finally:
            self._task = None

    async def _turn(self) -> bool:
        """Try the first AT_ONCE; True when any was taken. Those that were not go to the end: one that Redis refuses for
        ever (a damaged tenant) does not stop the others."""
        now = self._loop.time()
        some = self._trying = [self._kept.popleft() for _ in range(min(AT_ONCE, len(self._kept)))]
        for kept in [kept for kept in some if kept.until <= now]:
            some.remove(kept)
            self._give_up(kept)
        results = await asyncio.gather(*(self._post(kept.post) for kept in some), return_exceptions=True)
        self._trying = []
        for kept, result in zip(some, results, strict=True):
            if isinstance(result, StateUnavailable):
                self._wait_again(kept, result)
                continue
            self._settles -= isinstance(kept.post, Settle)
            if isinstance(result, BaseException):  # not ours to try again: it can never be taken
                self._settles += isinstance(kept.post, Settle)
                self._log.error("the ledger's books refuse a posting", exc_info=result)
                self._give_up(kept)
        return not some or not all(isinstance(result, BaseException) for result in results)

    def _wait_again(self, kept: _Kept, error: StateUnavailable) -> None:
        if isinstance(kept.post, Settle) and not isinstance(error, NotApplied):
            kept.until = min(kept.until, self._loop.time() + self._doubt_s)  # this try may have been applied
        self._kept.append(kept)

    async def _post(self, post: Void | Settle) -> None:
        if isinstance(post, Settle):
            await self._ledger.settle(
                tenant=post.tenant, rid=post.rid, call=post.call, cost=post.cost, estimated=post.estimated,
                key=post.key, user=post.user, day=post.day, tokens=post.tokens,
            )  # fmt: skip
        else:
            await self._ledger.void(
                tenant=post.tenant, rid=post.rid, delivery=post.delivery, instance=post.instance, call=post.call,
                key=post.key, user=post.user,
            )  # fmt: skip

    def _give_up(self, kept: _Kept) -> None:
        self.given_up += 1
        post = kept.post
        if isinstance(post, Void):
            return  # its lease does it
        self._settles -= 1
        self._log.critical(
            "a settlement was given up: post it by hand",
            extra={"tenant": post.tenant, "rid": post.rid, "call": post.call, "cost_nano_usd": post.cost},
        )

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is left, at most so long; voids are then left to their leases, settlements to the log."""
        task = self._task
        if task is None:
            return
        await asyncio.wait((task,), timeout=timeout_s)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        left = [*self._trying, *self._kept]
        self._trying = []
        self._kept.clear()
        for kept in left:
            self._give_up(kept)
