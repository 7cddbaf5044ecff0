"""Give reservations back behind the answer: nobody waits for it, and nothing is lost when it fails.

A worker that cannot pass a request on voids its reservation. While Redis is away that is tried again a few times; after
that the lease does it (I3), so a void that never arrives costs headroom for a while and no money.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from shared.state.base import Ledger, StateUnavailable
from shared.wire.messages import Ask

#: Seconds before each try. A short restart of Redis is over by the last; the lease (deadline + 10 s) covers the rest.
WAITS: Final = (0.0, 1.0, 4.0)
#: Voids under way at once; more mean that Redis is away under full load, when leases are the better way.
MAX_UNDER_WAY: Final = 10_000


class Voids:
    """The voids of one worker. `sleep` is asyncio's, or a test's."""

    def __init__(self, ledger: Ledger, sleep: Callable[[float], asyncio.Future[None]] | None = None) -> None:
        self._ledger = ledger
        self._sleep = sleep or asyncio.sleep
        self._tasks: set[asyncio.Task[None]] = set()
        self.given_up = 0

    @property
    def under_way(self) -> int:
        """Voids not yet answered."""
        return len(self._tasks)

    def void(self, ask: Ask) -> None:
        """Start giving back what this delivery reserved."""
        if len(self._tasks) >= MAX_UNDER_WAY:
            self.given_up += 1
            return
        task = asyncio.get_running_loop().create_task(self._void(ask.tenant, ask.rid, ask.delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _void(self, tenant: str, rid: str, delivery: int) -> None:
        for wait in WAITS:
            if wait:
                await self._sleep(wait)
            try:
                await self._ledger.void(tenant=tenant, rid=rid, delivery=delivery)
            except StateUnavailable:
                continue
            return
        self.given_up += 1

    async def drain(self, timeout_s: float) -> None:
        """Wait for those under way, at most so long; the rest are left to their leases."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
