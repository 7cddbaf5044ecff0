"""Reads the usage stream, shared by all guardians (DESIGN 4): posts what Redis did not take, and learns from the rest.

A message is acknowledged when everything in it is done:

    records without a line    posted (shared/state/late.py), and published anew with their line in a batch of our own
    records with one          learned from, once for each batch and tenant
    Redis away                held, and told so to JetStream; a batch of half the stream's age is published anew, before
                              it would be dropped
    Redis refuses one         delivered again a while later: it does not stop the others
    a snapshot, or no record  nothing to do

A guardian that dies leaves what it held to another one; nothing of it counts twice.
"""

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from shared.bus.base import PayloadTooLarge
from shared.bus.spool import SpoolFailed
from shared.bus.stored import Stored, StreamUnavailable
from shared.service.usage import STORE_S, UsageStream
from shared.state import keys, late
from shared.state.base import NotApplied, StateUnavailable
from shared.wire import subjects
from shared.wire.messages import UNREADABLE, VERSION, encode
from shared.wire.records import BalanceSnapshot, UsageBatch, UsageRecord, decode_stored
from workers.guardian.alerts import Alerts

if TYPE_CHECKING:
    from shared.service import Context

#: What a guardian holds that died, or froze, is delivered to another one after this.
ACK_WAIT_S: Final = 30.0
#: Messages in the hands of all guardians together.
MAX_PENDING: Final = 4096
AT_ONCE: Final = 64
MAX_BATCH: Final = 500  # records, as a provider's
FETCH_S: Final = 5.0
#: How often Redis is tried while it is away: its own gate is probed four times a second.
LOOK_S: Final = 0.05
#: Told to JetStream of what is held, well within ACK_WAIT_S.
WORKING_S: Final = 10.0
#: Rounds after which what Redis refuses while it answers is given back, for so long.
ROUNDS: Final = 3
LATER_S: Final = 5.0
#: A batch is published anew at this share of the stream's age.
RENEW: Final = 0.5


class _Held(Struct):
    """One message in hand: what is still to be posted of it."""

    stored: Stored
    batch: UsageBatch
    todo: list[UsageRecord]


class Learner:
    """Of one guardian process; owns one task."""

    def __init__(self, ctx: "Context", usage: UsageStream) -> None:
        self._ctx = ctx
        self._usage = usage
        self._loop = asyncio.get_running_loop()
        self._renew_ms = int(ctx.settings.usage_retention_ms * RENEW)
        self._consumer = usage.stream.consumer(
            subjects.USAGE_CONSUMER, usage.pull_inbox, ack_wait_s=ACK_WAIT_S, max_pending=MAX_PENDING
        )
        self._alerts = Alerts(ctx)
        self._number = 0
        self._task: asyncio.Task[None] | None = None
        self._held = 0
        posted = ctx.metrics.counter("guardian_usage", "Usage records by what became of them", ("result",))
        self._counts = {name: posted.labels(name) for name in ("posted", "renewed", "refused", "unreadable")}
        ctx.metrics.held("usage messages", lambda: self._held)
        untold = ctx.metrics.gauge("guardian_settlements_untold", "Settlements that only reconcile can tell of")
        untold.set_function(lambda: float(usage.unposted))

    async def start(self) -> None:
        """Begin to read. Raises BusUnavailable."""
        await self._consumer.start()
        self._ctx.bus_listeners.append(self._on_bus)
        self._task = self._loop.create_task(self._run())

    async def drain(self) -> None:
        """What is in hand is given back, and done by another guardian."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._consumer.close()
        await self._alerts.close()

    def _on_bus(self, connected: bool) -> None:
        if connected:
            self._consumer.again()

    async def _run(self) -> None:
        while True:
            messages = await self._consumer.fetch(AT_ONCE, FETCH_S)
            held = [each for each in map(self._read, messages) if each is not None]
            self._held = len(held)
            try:
                await self._handle(held)
            except asyncio.CancelledError:
                self._return(held, 0)
                raise
            except Exception:  # the task's door: one message must not stop all that come after it
                self._ctx.log.exception("usage records could not be read")
                self._return(held, LATER_S)
            finally:
                self._held = 0

    def _read(self, stored: Stored) -> _Held | None:
        """None: there is nothing to do, and that is acknowledged."""
        try:
            found = decode_stored(stored.payload)
        except UNREADABLE:
            self._counts["unreadable"].inc()
            self._ctx.log.critical("a usage message cannot be read", extra={"sequence": stored.sequence})
            self._consumer.ack(stored)
            return None
        if isinstance(found, BalanceSnapshot):
            self._consumer.ack(stored)
            return None
        if found.v > VERSION:  # a newer guardian reads it, for as long as the stream keeps it
            self._consumer.nak(stored, LATER_S)
            return None
        return _Held(stored, found, [record for record in found.records if not record.line])

    async def _handle(self, held: list[_Held]) -> None:
        """Until nothing is in hand any more."""
        rounds = 0
        working_at = self._loop.time() + WORKING_S
        while held:
            if self._ctx.state.available:
                await self._post(held)
                rounds += 1
            held[:] = [each for each in held if not await self._finished(each)]
            if not held:
                return
            if rounds >= ROUNDS and self._ctx.state.available:
                self._give_back(held)
                return
            await asyncio.sleep(LOOK_S)
            if self._loop.time() >= working_at:
                working_at = self._loop.time() + WORKING_S
                for each in held:
                    self._consumer.working(each.stored)

    def _give_back(self, held: list[_Held]) -> None:
        self._counts["refused"].inc(len(held))
        self._ctx.log.error(
            "Redis refuses what is to be posted",
            extra={"rids": [record.rid for each in held for record in each.todo[:1]]},
        )
        self._return(held, LATER_S)
        held.clear()

    def _return(self, held: list[_Held], delay_s: float) -> None:
        for each in held:
            self._consumer.nak(each.stored, delay_s)

    async def _post(self, held: list[_Held]) -> None:
        """Post what is to be posted, all messages together."""
        todo = [(each, record) for each in held for record in each.todo]
        if not todo:
            return
        results = await late.post(
            self._ctx.state.ledger,
            [record for _, record in todo],
            self._ctx.state.clock.now(),
            self._ctx.settings.ledger_tombstone_ms,
        )
        posted = []
        for (each, record), result in zip(todo, results, strict=True):
            if isinstance(result, late.Untold):
                self._usage.untold(record, result)
            elif isinstance(result, Exception):
                continue
            elif result:
                posted.append(msgspec.structs.replace(record, line=result))
            each.todo.remove(record)
        self._counts["posted"].inc(len(posted))
        for first in range(0, len(posted), MAX_BATCH):
            await self._publish(posted[first : first + MAX_BATCH])

    async def _publish(self, records: list[UsageRecord]) -> bool:
        """In a batch of our own, on disk if JetStream does not take it; False when neither does."""
        self._number += 1
        batch = UsageBatch(
            instance=self._ctx.instance, number=self._number, at=self._ctx.state.clock.now(), records=tuple(records),
            late=True,
        )  # fmt: skip
        payload = encode(batch)
        try:
            await self._usage.stream.publish(payload, STORE_S)
        except (StreamUnavailable, PayloadTooLarge):
            try:
                await self._usage.spool.append(payload)
            except SpoolFailed as error:
                self._ctx.log.warning("usage records could not be published", extra={"error": str(error)})
                return False
        return True

    async def _finished(self, held: _Held) -> bool:
        """Whether this message is done with, and acknowledged."""
        old = self._ctx.state.clock.now() - held.batch.at > self._renew_ms
        if held.todo:
            if not old or not await self._publish(held.todo):
                return False
            self._counts["renewed"].inc(len(held.todo))
        if not await self._learn(held.batch) and not old:
            return False
        self._consumer.ack(held.stored)
        return True

    async def _learn(self, batch: UsageBatch) -> bool:
        """Once for each tenant of the batch, however often it comes; False: Redis did not answer."""
        if keys.OPAQUE.fullmatch(batch.instance) is None:
            return True
        tenants: dict[str, list[UsageRecord]] = {}
        for record in batch.records:
            if record.line and late.is_ours(record):
                tenants.setdefault(record.tenant, []).append(record)
        for tenant, records in tenants.items():
            try:
                alerts = await self._ctx.state.tracker.learn(tenant, batch, records)
            except NotApplied as error:
                if not self._ctx.state.available:
                    return False
                self._ctx.log.warning("usage was not learned", extra={"tenant": tenant, "error": str(error)})
            except StateUnavailable:
                return False
            else:
                for alert in alerts:
                    self._alerts.tell(alert)
        return True
