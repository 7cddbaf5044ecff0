"""Takes requests from `hotpath.v1.provider.<instance>`: checks them, starts a Walk for each, drains at the end."""

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from shared.bus.base import BadSubject, BusUnavailable, PayloadTooLarge, Subscription
from shared.bus.replies import fail
from shared.core import tokens
from shared.core.overload import Queue, Shares
from shared.core.translators import registry
from shared.core.translators.base import Dialect
from shared.service.killat import reach
from shared.service.usage import UsageStream
from shared.state.base import Clock, Principal, StateUnavailable
from shared.state.behind import Behind
from shared.wire import errors, subjects
from shared.wire.errors import HotpathError
from shared.wire.messages import UNREADABLE, VERSION, Call, Cancel, Credit, Step, decode_call
from workers.provider.control import Control
from workers.provider.ended import Ended
from workers.provider.gate import Gate
from workers.provider.mux import Channel, Mux
from workers.provider.origin import Origin
from workers.provider.outcomes import OutcomeLog
from workers.provider.posting import Counters, Posting
from workers.provider.upstream import Pool
from workers.provider.usage import UsageLog
from workers.provider.walk import Walk

if TYPE_CHECKING:
    from shared.catalog import Catalog
    from shared.service import Context
    from shared.settings import Settings
    from shared.state.redis import State

SWEEP_S: Final = 5.0  # idle connections are looked at
#: A drain waits so long for settlements Redis has not taken yet: one that was frozen for half a minute is back by then.
LATE_S: Final = 40.0
VOIDS_S: Final = 1.0  # and so long for voids alone, which a lease makes too
#: And for the look-up of a key in Redis, which answers within 100 ms or fails.
CHECK_S: Final = 1.0
MAX_NAMED: Final = 20  # requests named in one log line


class Target(Struct, frozen=True):
    """A step of a Plan, ready to be called."""

    step: Step
    dialect: Dialect
    pool: Pool
    cap_field: str
    secrets: tuple[str, ...]


class Provider:
    """The role."""

    name = "provider"
    watches: tuple[str, ...] = ("ingress", "loadgen")

    def __init__(self) -> None:
        self.capacity = 0
        self._walks: dict[Walk, asyncio.Task[None]] = {}
        self._serving: set[tuple[str, str, int]] = set()  # tenant, rid and delivery of each walk
        self._checks: set[asyncio.Task[None]] = set()  # of keys our copy does not know yet
        self._draining = False
        self._timers: list[asyncio.TimerHandle] = []
        self._subscription: Subscription | None = None

    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._walks)

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self, ctx: "Context") -> None:
        """Pools, mux, subscription."""
        self.loop = asyncio.get_running_loop()
        self.settings: Settings = ctx.settings
        self.catalog: Catalog = ctx.catalog
        self.state: State = ctx.state
        self.ledger = ctx.state.ledger
        self.clock: Clock = ctx.state.clock
        self.instance, self.pid, self.log = ctx.instance, ctx.pid, ctx.log
        self.capacity = ctx.settings.max_in_flight
        self.queue = Queue()
        self._shares = Shares(ctx.settings.max_in_flight_per_tenant)
        ctx.metrics.show_queue(self.name, self.queue)
        self._bus = ctx.bus
        self._behind = Behind(ctx.state.ledger, ctx.log, tombstone_ms=ctx.settings.ledger_tombstone_ms)
        self.mux = Mux(ctx.bus, self.name, ctx.instance, self.loop, ctx.settings.reply_mux_ms / 1000)
        self._control = Control(self.mux, ctx.rosters, self.loop, ctx.settings.client_stalled_ms / 1000)
        self.outcomes = OutcomeLog(ctx.bus, self.loop)
        self._usage = UsageStream(ctx, update=False)
        self._usage_log = UsageLog(self._usage, ctx.instance, ctx.state.clock, ctx.log)
        self._make_targets()
        self._metrics(ctx)
        self.posting = Posting(self.ledger, self.clock, self._usage_log, self._behind, self.log, self._counters)
        self.gate = Gate(ctx.state.circuits, ctx.state.clock, self.outcomes, ctx.log, self._probes)
        for encoding in {model.encoding for model in ctx.catalog.models.values()}:
            tokens.warm(encoding)
        await self._usage.start()
        self._subscription = await ctx.bus.subscribe(subjects.worker(self.name, ctx.instance), self._on_call)
        self._sweep()

    def control(self, message: Cancel | Credit) -> None:
        """See control.py."""
        self._control.message(message)

    async def drain(self) -> None:
        """Whole answers get SHUTDOWN_DRAIN_MS, streams SHUTDOWN_STREAM_DRAIN_MS (D8); the rest is told and settled."""
        if self._subscription is not None:
            await self._subscription.drain()  # what was sent before routing heard that we leave is still served
        if self._checks:  # a key made a moment ago: one round trip to Redis
            await asyncio.wait(self._checks, timeout=CHECK_S)
        self._draining = True
        whole = [task for walk, task in self._walks.items() if not walk.streams]
        end = self.loop.time() + self.settings.shutdown_stream_drain_ms / 1000
        if whole:
            await asyncio.wait(whole, timeout=self.settings.shutdown_drain_ms / 1000)
        self._shut_down([walk for walk in self._walks if not walk.streams])
        if self._walks:
            await asyncio.wait(self._walks.values(), timeout=max(0.0, end - self.loop.time()))
        self._shut_down(list(self._walks))
        if self._walks:
            await asyncio.wait(self._walks.values(), timeout=1 + self.settings.cancel_drain_ms / 1000)
        await self._close(end)

    def _shut_down(self, walks: list[Walk]) -> None:
        """S1-H5c: say what did not finish, and end it."""
        if walks:
            named = [walk.rid for walk in walks[:MAX_NAMED]]
            self.log.warning("ending requests that did not finish", extra={"count": len(walks), "rids": named})
        for walk in walks:
            walk.shut_down()

    async def _close(self, end: float) -> None:
        await self.mux.wait_closed(max(0.0, end - self.loop.time()))  # terminals behind bytes that wait for credit
        self.mux.flush()
        self.outcomes.flush()
        await self.gate.close()
        self._control.close()
        for timer in self._timers:
            timer.cancel()
        await self._settle_late()
        await self._usage_log.close()
        await self._usage.close()
        for pool in self._pools():
            pool.close()

    async def _settle_late(self) -> None:
        """Money that Redis did not take yet: what is given up here stands in the log."""
        count = self._behind.settles
        if count:
            self.log.warning("waiting for Redis to take what is still to be settled", extra={"count": count})
        await self._behind.drain(LATE_S if count else VOIDS_S)

    def _make_targets(self) -> None:
        """One pool for each endpoint; one target for each step that the catalogue names."""
        self._targets: dict[Step, Target] = {}
        pools = {}
        for endpoint in self.catalog.endpoints.values():
            dialect = registry.dialect(endpoint.provider)
            origin = Origin.of(
                endpoint.base_url, dialect.headers(endpoint.key), allow_private=endpoint.allow_private
            )  # fmt: skip
            pools[endpoint.id] = (dialect, Pool(origin, self.loop, self.capacity), endpoint)
        for model in self.catalog.models.values():
            for step in model.steps:
                dialect, pool, endpoint = pools[step.endpoint]
                self._targets[step] = Target(step, dialect, pool, endpoint.cap_field, (endpoint.key,))

    def _pools(self) -> set[Pool]:
        return {target.pool for target in self._targets.values()}

    def targets(self, step: Step) -> Target | None:
        """None for a step that this process's catalogue does not know."""
        return self._targets.get(step)

    def _sweep(self) -> None:
        self._timers[:] = [self.loop.call_later(SWEEP_S, self._sweep)]
        for pool in self._pools():
            pool.sweep()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _on_call(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        if not payload:  # routing asks after us; that we listen is the answer (bus/sender.py)
            return
        reach("provider.on_message")
        try:
            message = decode_call(payload)
        except UNREADABLE:
            self._ignored.inc()
            return
        since = self.queue.read(self.loop.time())
        ask = message.ask
        if not self.state.registry.ready:  # nor is the shared time known: what is stale could not be told
            self._refuse(
                message, errors.LedgerDown("The budget ledger has not been reachable since this provider started.")
            )
            return
        principal = self.state.registry.lookup(ask.tenant, ask.key)
        if principal is None:
            if len(self._checks) >= self.capacity:
                self._refuse(message, errors.Overloaded())
                return
            task = self.loop.create_task(self._check(message))
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)
        else:
            self._take(message, principal, since)

    async def _check(self, message: Call) -> None:
        """Our own copy does not know the key (DESIGN 3): one made a moment ago is asked for."""
        ask = message.ask
        try:
            known = await self.state.registry.find(ask.tenant, ask.key)
        except StateUnavailable:
            self._refuse(message, errors.RegistryDown())
            return
        if known is None:
            self._refuse(message, errors.Unauthorized())
        else:
            self._take(message, known, time.monotonic())

    def _objection(self, message: Call, principal: Principal) -> HotpathError | None:
        """Why this request is not begun here, if so."""
        if message.ask.v > VERSION:
            return errors.NewerVersion()
        if self._draining or len(self._walks) >= self.capacity:
            return errors.ShuttingDown() if self._draining else errors.Overloaded()
        if message.admission.reserved:
            return None
        if principal.limited:  # D4, by our own copy too: whoever holds routing's user can say that nothing was reserved
            return errors.LedgerDown()
        if self._behind.full(len(self._walks)):
            return errors.LedgerDown("The budget ledger is unreachable, and too much waits to be billed.")
        return None

    def _take(self, message: Call, principal: Principal, since: float) -> None:
        if (error := self._objection(message, principal)) is not None:
            self._refuse(message, error)
            return
        ask = message.ask
        # The ledger gives one holder the same answer each time it asks: here each delivery is walked once, whatever
        # stream number a repeated one names, or two upstream calls would be settled as one (I7).
        key = (ask.tenant, ask.rid, ask.delivery)
        if key in self._serving:
            self._ignored.inc()
            return
        if not self._shares.take(ask.tenant):
            self._refuse(message, errors.TenantBusy())
            return
        walk = Walk(self, message)
        try:
            channel = self.mux.open(ask.reply, ask.delivery, walk.pause, walk.cancel)
        except BadSubject:
            self._ignored.inc()
            channel = None
        if channel is None:  # or the same delivery again: it is being served
            self._shares.give(ask.tenant)
            return
        task = self.loop.create_task(self._begin(walk, channel, message, since))
        self._walks[walk] = task
        self._serving.add(key)
        task.add_done_callback(walk.done)

    async def _begin(self, walk: Walk, channel: Channel, message: Call, since: float) -> None:
        error: HotpathError | None = None
        if not self.queue.begin(since, time.monotonic()):
            error = errors.Overloaded()
        elif not message.admission.reserved:
            error = self._stale(message)
        if error is None:
            await walk.run(channel)
        else:
            channel.failed(error.body(), None, message.hops)
            self.void(message)

    def _stale(self, message: Call) -> HotpathError | None:
        """What stops an old request that no fence of the ledger stops, e.g. in the backlog of a process that thawed.

        Its asker has made another delivery by now, which may have been served.
        """
        now = self.clock.now()
        if message.ask.deadline and now >= message.ask.deadline:
            return errors.DeadlineExceeded()
        sent = message.hops[-1].at if message.hops else now  # routing's own hop, by the clock that all share
        return errors.Overloaded() if now - sent > self.settings.handoff_timeout_ms else None

    def _refuse(self, message: Call, error: HotpathError) -> None:
        try:
            fail(self._bus, self.name, self.instance, message.ask, error, hops=message.hops)
        except (BadSubject, BusUnavailable, PayloadTooLarge):
            self._ignored.inc()
        registry = self.state.registry
        if registry.knows(message.ask.tenant) or not registry.ready:  # a tenant that is none of ours gets no Redis keys
            self.void(message)

    def ended(self, walk: Walk, task: "asyncio.Task[None]") -> None:
        """A walk's task is done."""
        del self._walks[walk]
        self._serving.discard(walk.key)
        self._shares.give(walk.key[0])
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.error("a request failed", exc_info=error, extra={"requestId": walk.rid})
            walk.crashed()

    # ---- money behind the answer -------------------------------------------------------------------------------------

    def void(self, message: Call) -> None:
        """No call was made for this delivery."""
        if message.admission.reserved:
            self._behind.void(message.ask)

    def void_doubt(self, message: Call, call: int = 1) -> None:
        """A dispatch or top-up (for `call`) got no answer, no call was made: settle at 0 what it may have opened."""
        self._behind.void_doubt(message.ask, self.instance, call)

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def count(self, endpoint: str, ended: Ended) -> None:
        """One ended call, for the metrics; an endpoint that refuses our key, for the operator."""
        result = "ok" if ended.error is None else "cancelled" if ended.cancelled else ended.error.type
        if ended.cut:
            result = "cut"
        child = self._results.get((endpoint, result))
        if child is None:
            child = self._results[endpoint, result] = self._calls.labels(endpoint, result)
        child.inc()
        if ended.error is not None and ended.error.code == errors.UpstreamAuth.code:
            self.log.error("the provider refuses this endpoint's key", extra={"endpoint": endpoint, "security": True})

    def _metrics(self, ctx: "Context") -> None:
        metrics = ctx.metrics
        self._calls = metrics.counter("upstream_calls_total", "Ended upstream calls", ("endpoint", "result"))
        self._results: dict[tuple[str, str], Any] = {}
        self._probes = metrics.counter("circuit_probes_total", "Claims and verdicts", ("endpoint", "result"))
        self._ignored = metrics.counter("provider_messages_ignored_total", "Messages that are no call, or lead nowhere")
        self._counters = Counters(
            metrics.counter("ledger_overruns_total", "Calls billed above their reservation"),
            metrics.counter("provider_settlements_total", "Settlements by where they went first", ("road",)),
        )
        behind = self._behind
        usage, log = self._usage, self._usage_log
        for name, text, read in (
            ("usage_batches_lost", "Usage batches that JetStream never took", lambda: log.lost),
            ("spool_appended", "Settlements written to this process's spool", lambda: usage.spool.appended),
            (
                "settlements_untold",
                "Settlements of which nobody can tell whether they were posted",
                lambda: usage.unposted,
            ),
        ):
            metrics.gauge(f"provider_{name}", text).set_function(read)
        waiting = metrics.gauge("provider_settlements_waiting", "Settlements that are in this process's memory alone")
        waiting.set_function(lambda: float(behind.settles))
        given_up = metrics.gauge("provider_ledger_given_up", "Voids and settlements Redis never took")
        given_up.set_function(lambda: float(behind.given_up))
        metrics.held("walks", lambda: len(self._walks))
        metrics.held("channels", lambda: self.mux.open_channels)
        metrics.held("pairs of the provider", lambda: self.mux.pair_count)
        metrics.held("settlements behind", lambda: behind.under_way)
        metrics.held("usage records", lambda: log.waiting)
        metrics.held("upstream connections", lambda: sum(pool.open_connections for pool in self._pools()))
        metrics.gauge("reply_frames_lost", "Frames that could not be published").set_function(
            lambda: float(self.mux.lost)
        )
