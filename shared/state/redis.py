"""State: the connections to Redis and everything that stands on them.

Two connections, both our own pipeline on the hiredis parser: one for the hot calls, one for what has long replies or
nobody waits for (registry, clock, admin). redis-py is left out of the processes: it costs 180 ms of CPU at each start
and 27 MB in each process, and its retries would have to be switched off one by one.
"""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import Final

from shared.settings import Settings
from shared.state.admin import Admin, KeyInfo, NewKey, announce
from shared.state.base import StateUnavailable
from shared.state.books import Entry
from shared.state.circuits import RedisCircuits, policy
from shared.state.clock import SharedClock
from shared.state.costs import Costs, RedisCosts
from shared.state.keys import Period
from shared.state.ledger import SCRIPTS, RedisLedger
from shared.state.operations import Operations
from shared.state.pipeline import Pipeline
from shared.state.policies import KeyChange
from shared.state.registry import RedisRegistry
from shared.state.resp import pack
from shared.state.scripts import Scripts

#: How often the versions of registry and circuits are polled, since a notice may be lost, and the clock is sampled.
POLL_S: Final = 0.5
CLOCK_S: Final = 1.0
#: Snapshots of a tenant that are in JetStream at a time, though nothing happens: some may not get there.
RENEWALS: Final = 4

_log: Final = logging.getLogger("hotpath.state")

_TIMEOUT: Final = 0.5
_PING_TIMEOUT: Final = 0.25


class State:
    """The shared state of one process; made by `connect` or `away`, closed by `close`.

    `registry.ready` says that the process has ever reached Redis: it then knows the time, the tenants and the circuits,
    and goes on with its copies while Redis is away. Before that it serves nothing (deploy/decisions/0018).
    """

    ledger: RedisLedger
    clock: SharedClock
    registry: RedisRegistry
    circuits: RedisCircuits
    tracker: RedisCosts

    def __init__(self, settings: Settings) -> None:
        greeting = tuple(pack((b"SCRIPT", b"LOAD", script.text)) for script in SCRIPTS.values())
        self.lease_grace_ms: Final = settings.ledger_lease_grace_ms
        self._hot = Pipeline(settings.redis_url, greeting=greeting)
        self._side = Pipeline(settings.redis_url)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        scripts = Scripts(self._hot)
        self.clock = SharedClock()
        self.ledger = RedisLedger(
            self._hot,
            scripts,
            now=self.clock.now,
            lease_grace_ms=settings.ledger_lease_grace_ms,
            tombstone_ms=settings.ledger_tombstone_ms,
            unconfirmed_ms=settings.ledger_unconfirmed_ms,
            journal_lines=settings.ledger_journal_lines,
            snapshot_ms=settings.ledger_snapshot_ms,
            renew_ms=settings.usage_retention_ms // RENEWALS,
            announce=partial(announce, self._side),
        )
        self.admin: Final = Admin(self._side, pepper=settings.key_pepper, set_limit=self.ledger.set_limit)
        self.tracker = RedisCosts(self._side, Scripts(self._side), keep_ms=2 * settings.usage_retention_ms)
        self.operations: Final = Operations(
            admin=self.admin,
            ledger=self.ledger,
            costs=self.tracker.read,
            pepper=settings.key_pepper,
            now=self.clock.now,
        )
        self.registry = RedisRegistry(
            self._side,
            pepper=settings.key_pepper,
            bootstrap_key=settings.gateway_api_key,
            monotonic=self.clock.monotonic,
            now=self.clock.now,
            wake=self._wake.set,
        )
        self.circuits = RedisCircuits(
            self._side,
            scripts,
            now=self.clock.now,
            policy=policy(settings),
            wake=self._wake.set,
        )

    @classmethod
    async def connect(cls, settings: Settings) -> "State":
        """Connect, learn the time, load the registry and the circuits. Raises StateUnavailable, ValueError (URL)."""
        state = cls(settings)
        try:
            await state._hot.connect()
            await state._side.connect()
            await state._sample()
            await state._poll()
        except BaseException:  # also when cancelled: nothing may stay open
            await state.close()
            raise
        return state

    @classmethod
    def away(cls, settings: Settings) -> "State":
        """Without Redis, which is connected to as soon as it answers. Raises ValueError (URL)."""
        state = cls(settings)
        state._hot.start()
        state._side.start()
        return state

    def run(self) -> None:
        """Start the polling: the clock each second, registry and circuits each 500 ms or when told to refresh."""
        loop = asyncio.get_running_loop()
        self._tasks += [loop.create_task(self._keep_time()), loop.create_task(self._keep_polling())]

    async def close(self) -> None:
        """Stop the polling and close the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._hot.close()
        await self._side.close()

    @property
    def available(self) -> bool:
        """Whether the hot calls would be sent now (connected, and the gate open)."""
        return self._hot.available

    async def ping(self) -> bool:
        """Whether Redis answers a PING on the hot connection within 250 ms."""
        try:
            await self._hot.execute(b"PING", within=_PING_TIMEOUT)
        except StateUnavailable:
            return False
        return True

    @property
    def waiting(self) -> int:
        """Calls that Redis has not answered."""
        return self._hot.waiting + self._side.waiting

    # ---- the admin calls most asked for; `admin` and `ledger` have the rest ------------------------------------------

    async def create_key(
        self,
        tenant_name: str,
        limit: int | None = None,
        period: Period = "month",
        *,
        synthetic: bool = False,
        key_limits: Mapping[Period, int] | None = None,
        change: KeyChange | None = None,
    ) -> NewKey:
        """See Admin.create_key."""
        return await self.admin.create_key(
            tenant_name, limit, period, synthetic=synthetic, key_limits=key_limits, change=change
        )

    async def list_keys(self) -> list[KeyInfo]:
        """See Admin.list_keys."""
        return await self.admin.list_keys()

    async def revoke_key(self, key_id: str) -> bool:
        """See Admin.revoke_key."""
        return await self.admin.revoke_key(key_id)

    async def tenant_by_name(self, name: str) -> str | None:
        """See Admin.tenant_by_name."""
        return await self.admin.tenant_by_name(name)

    async def set_limit(self, tenant: str, period: Period, limit: int | None, level: str = "t") -> None:
        """Set or clear a limit in nano-USD of the tenant or another level. Raises ValueError, StateUnavailable."""
        await self.ledger.set_limit(tenant=tenant, period=period, limit=limit, level=level)

    async def entries(self, tenant: str) -> list[Entry]:
        """What the ledger remembers of the tenant's calls."""
        return await self.ledger.entries(tenant=tenant)

    async def costs(self, tenant: str) -> Costs:
        """What the tenant's calls cost by model and day. Raises StateUnavailable."""
        return await self.tracker.read(tenant)

    # ---- polling -----------------------------------------------------------------------------------------------------

    async def _sample(self) -> None:
        sent = self.clock.monotonic()
        seconds, microseconds = await self._side.execute(b"TIME", within=_TIMEOUT)
        self.clock.offer(sent, self.clock.monotonic(), int(seconds), int(microseconds))

    async def _poll(self) -> None:
        if not self.clock.ready:  # first, so that a registry that is ready means that the time is known
            await self._sample()
        await self.registry.poll()
        await self.circuits.poll()

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_S)
            try:
                await self._sample()
            except StateUnavailable:
                continue  # the offset stays as it is

    async def _keep_polling(self) -> None:
        """The copies stay as they are while Redis is away; `registry.fresh` says so."""
        answers = self.registry.ready
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._poll()
            except StateUnavailable as error:
                if answers:
                    _log.error("Redis does not answer", extra={"error": str(error)})
                answers = False
                continue
            if not answers:
                _log.info("Redis answers")
            answers = True
