"""The usage stream as one role sees it: the stream, a spool for what it does not take, and the spools of the dead.

    provider   `store` with a bound while somebody waits, else `spool`; see workers/provider/usage.py
    guardian   reads it; see workers/guardian/learn.py

Both collect spools. Where there is no JetStream at all, what a spool holds is posted to Redis directly once that is
back: there is no second copy then, and no settlement is lost for it.
"""

from typing import TYPE_CHECKING, Final

from shared.bus.base import PayloadTooLarge
from shared.bus.jetstream import JetStream, inboxes
from shared.bus.spool import Collector, Spool
from shared.bus.stored import StreamPlan, StreamUnavailable
from shared.state import late
from shared.wire import subjects
from shared.wire.messages import UNREADABLE
from shared.wire.records import UsageBatch, UsageRecord, decode_stored

if TYPE_CHECKING:
    from shared.service.contract import Context
    from shared.settings import Settings

#: For a message that nobody waits for.
STORE_S: Final = 2.0


def plan(settings: "Settings") -> StreamPlan:
    """The stream, by the settings."""
    return StreamPlan(
        name=subjects.USAGE_STREAM, subject=subjects.USAGE, max_age_ms=settings.usage_retention_ms,
        max_bytes=settings.usage_max_bytes, replicas=settings.usage_replicas,
    )  # fmt: skip


class UsageStream:
    """Of one role of a process. `update`: its NATS user may change the stream."""

    def __init__(self, ctx: "Context", *, update: bool) -> None:
        self._ctx = ctx
        self._inbox, self.pull_inbox = inboxes(ctx.role, ctx.instance)
        self.stream = JetStream(ctx.bus, plan(ctx.settings), self._inbox, update=update)
        self.spool = Spool(ctx.settings.spool, ctx.instance)
        self._collector = Collector(ctx.settings.spool, self._collect, StreamUnavailable, self._let_go)
        ctx.stored = lambda: self.there
        shown = ctx.metrics.gauge(f"{ctx.role}_usage_stream", "1 while JetStream takes usage records")
        shown.set_function(lambda: float(self.there))
        self.unposted = 0  # settlements of which nobody can tell whether they were posted

    async def start(self) -> None:
        """Make the stream (in the background), and look for spools. Raises BusUnavailable."""
        await self.stream.start()
        self._collector.start()

    async def close(self) -> None:
        """What is spooled is left to others."""
        await self._collector.close()
        await self.spool.close()
        await self.stream.close()

    @property
    def there(self) -> bool:
        """Whether the stream takes something now, as far as we know."""
        return self.stream.there and self._ctx.bus.connected

    def _let_go(self) -> None:
        if self.there or self._ctx.state.available:
            self.spool.let_go()

    async def _collect(self, payload: bytes) -> None:
        """One message of a spool. Raises StreamUnavailable."""
        try:
            await self.stream.publish(payload, STORE_S)
        except StreamUnavailable:
            if self.there or not self._ctx.state.available:
                raise
            await self._post(payload)
        except PayloadTooLarge as error:  # a NATS that takes less than the one of then, or than a batch needs
            if not self._ctx.state.available:
                raise StreamUnavailable("Redis is away, and JetStream takes no message of that size") from error
            await self._post(payload)

    async def _post(self, payload: bytes) -> None:
        """Without the stream: straight to Redis."""
        try:
            stored = decode_stored(payload)
        except UNREADABLE:
            self._ctx.log.critical("a spool holds what is no usage record")
            return
        if not isinstance(stored, UsageBatch):
            return
        records = [record for record in stored.records if not record.line]
        now, tombstone = self._ctx.state.clock.now(), self._ctx.settings.ledger_tombstone_ms
        for record, result in zip(
            records, await late.post(self._ctx.state.ledger, records, now, tombstone), strict=True
        ):
            if isinstance(result, late.Untold):
                self.untold(record, result)
            elif not isinstance(result, str):
                raise StreamUnavailable("Redis did not take it either") from result

    def untold(self, record: UsageRecord, why: Exception) -> None:
        """A settlement that must be looked at by hand, or by `hotpath reconcile`."""
        self.unposted += 1
        self._ctx.log.critical(
            "a settlement was given up: post it by hand, or reconcile with the provider's bill",
            extra={
                "tenant": record.tenant, "rid": record.rid, "call": record.call, "cost_nano_usd": record.cost,
                "error": str(why),
            },
        )  # fmt: skip
