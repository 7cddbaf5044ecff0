"""Consumes `guardian.<instance>` (from the ingress) and `admit` (direct publishers): assess, reserve, forward.

One Lua call per request and no other await before the forward (DESIGN 5): everything else is local. Money fails closed
for a tenant with a limit and open, marked `degraded`, for one without (D4). Whatever ends here is told to the asker in
one Failed frame, and what was reserved is given back.
"""

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shared.bus import replies
from shared.bus.base import BusUnavailable, PayloadTooLarge, Subscription
from shared.bus.sender import NoLiveInstance
from shared.core import tokens
from shared.core.head import guardian_head, status_head
from shared.core.overload import Queue, Shares
from shared.service.killat import reach, reach_soon
from shared.service.usage import UsageStream
from shared.state.base import Principal, Reserved, StateUnavailable
from shared.state.behind import Behind
from shared.wire import headers, subjects
from shared.wire.errors import (
    BusDown,
    DeadlineExceeded,
    HotpathError,
    KeyExpired,
    LedgerDown,
    NewerVersion,
    NoWorker,
    Overloaded,
    RegistryDown,
    TenantBusy,
    TooLarge,
    Unauthorized,
)
from shared.wire.messages import UNREADABLE, VERSION, Admission, Ask, Cancel, Credit, Hop, Route, decode_admit, encode
from workers.guardian import decide, envelope, refusals
from workers.guardian.assess import likely_tokens
from workers.guardian.decide import House, Pending
from workers.guardian.learn import Learner
from workers.guardian.screening import Screening
from workers.guardian.seen import Seen
from workers.guardian.sweep import Sweeper

if TYPE_CHECKING:
    from shared.service import Context

RESERVE_MS: Final = 100  # a reserve that runs later than this is refused by the ledger (DESIGN 4)
DAY_MS: Final = 86_400_000
#: Bodies above this are weighed in a thread: a megabyte of text takes 0.5 ms, of twelve thousand messages 10 ms.
OFF_LOOP_BYTES: Final = 65_536
#: Requests a minute: from a person to a batch job.
VELOCITY: Final = (1.0, 10.0, 60.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)


class Guardian:
    """The guardian's role for `shared.service`."""

    name = "guardian"
    watches: tuple[str, ...] = ("routing",)

    def __init__(self) -> None:
        self.capacity = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []

    def in_flight(self) -> int:
        """Requests whose reservation is being made."""
        return len(self._tasks)

    def control(self, message: Cancel | Credit) -> None:
        """Nothing: a request is here for one round trip to Redis, and its provider hears the cancel itself."""

    async def start(self, ctx: "Context") -> None:
        """Load the token tables, subscribe, begin to sweep."""
        self._ctx = ctx
        self._house = House.of(ctx.settings, ctx.catalog)
        self._seen = Seen()
        self._behind = Behind(ctx.state.ledger, ctx.log, tombstone_ms=ctx.settings.ledger_tombstone_ms)
        self._loop = asyncio.get_running_loop()
        self.capacity = ctx.settings.max_in_flight
        self._queue = Queue()
        self._shares = Shares(ctx.settings.max_in_flight_per_tenant)
        ctx.metrics.show_queue(self.name, self._queue)
        outcomes = ctx.metrics.counter("guardian_requests", "Requests by how the guardian ended them.", ("outcome",))
        self._count = outcomes.labels
        self._refusals = replies.Refusals(
            ctx.bus, self.name, ctx.instance, ctx.log, lambda code: outcomes.labels(code).inc()
        )
        self._screen = Screening(ctx.metrics, ctx.log, time.monotonic)
        self._forwarded = outcomes.labels("forwarded")
        self._velocity = ctx.metrics.histogram(
            "guardian_key_velocity", "Requests of a key in its minute, at each of its requests (S2-13).", (), VELOCITY
        )
        for encoding in {model.encoding for model in ctx.catalog.models.values()}:
            tokens.warm(encoding)
        own = subjects.worker(self.name, ctx.instance)
        self._subscriptions = [
            await ctx.bus.subscribe(own, self._on_ingress),
            await ctx.bus.subscribe(subjects.ADMIT, self._on_direct, subjects.ADMIT_GROUP),
        ]
        self._usage = UsageStream(ctx, update=True)
        self._learner = Learner(ctx, self._usage)
        await self._usage.start()
        await self._learner.start()
        self._sweeper = Sweeper(ctx, self._usage)
        self._sweeper.start()

    async def drain(self) -> None:
        """Take nothing more, finish what is under way."""
        for subscription in self._subscriptions:
            await subscription.drain()
        timeout = self._ctx.settings.shutdown_drain_ms / 1000
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)
        await self._ctx.sender.settled()  # what could not be handed on is void
        await self._behind.drain(timeout)
        await self._sweeper.close()
        await self._learner.drain()
        await self._usage.close()

    # ---- taking ------------------------------------------------------------------------------------------------------

    def _on_ingress(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        self._take(payload, direct=False)

    def _on_direct(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        self._take(payload, direct=True)

    def _take(self, payload: bytes, *, direct: bool) -> None:
        began = time.perf_counter()
        since = self._queue.read(self._loop.time())
        reach("guardian.on_message")
        try:
            admit = decode_admit(payload)
        except UNREADABLE:
            self._refusals.drop()
            return
        ask = admit.ask
        if direct and not envelope.is_sane(ask):
            self._refusals.drop()
            return
        hops = envelope.sane_hops(admit.hops) if direct else admit.hops
        at = self._ctx.state.clock.now()
        if ask.answer_by and at > ask.answer_by:  # it lay in a frozen NATS, or we were: its sender has given it up
            self._count("stale").inc()
            return
        refusal = self._refusal(ask)
        if refusal is not None:
            self._refusals.fail(ask, refusal, hops)
            return
        task = self._loop.create_task(self._serve(ask, hops, at, began, since, direct=direct))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refusal(self, ask: Ask) -> HotpathError | None:
        """Why this request is not begun here; None: it is, with one of its tenant's places taken."""
        if not self._ctx.state.registry.ready:
            return LedgerDown("The budget ledger has not been reachable since this guardian started.")
        if ask.v > VERSION:
            return NewerVersion()
        if len(self._tasks) >= self.capacity:
            return Overloaded()
        return None if self._shares.take(ask.tenant) else TenantBusy()

    async def _serve(
        self, ask: Ask, hops: tuple[Hop, ...], at: int, began: float, since: float, *, direct: bool
    ) -> None:
        """One request, whatever becomes of it."""
        pending = principal = None
        try:
            if not self._queue.begin(since, time.monotonic()):
                self._refusals.fail(ask, Overloaded(), hops)
                return
            principal = self._ctx.state.registry.lookup(ask.tenant, ask.key) or await self._find(ask)
            ask = decide.accept(self._house, ask, principal, at, direct=direct)
            status = "on"
            if principal.pii != "off":
                ask, status = await self._screen(ask, principal)
            pending = await self._weigh(ask, principal, at, began, hops, status)
            unwanted = decide.seatbelt(ask, principal, pending.admission)
            if unwanted is None:
                await self._reserve(pending)
            else:
                self._refuse(pending, unwanted)
        except HotpathError as exc:
            status = decide.refusal_status(exc, principal)
            took = int((time.perf_counter() - began) * 1_000_000)
            self._refusals.fail(ask, exc, hops, status_head(status, took))
        except Exception:  # the process's door: one request must not take the others with it
            self._ctx.log.exception("a request failed", extra={"requestId": ask.label, "rid": ask.rid})
            if pending is not None:
                self._behind.void(pending.ask)
            self._refusals.fail(ask, HotpathError(), hops)
        finally:
            self._shares.give(ask.tenant)

    async def _find(self, ask: Ask) -> Principal:
        """A key made a moment ago, which the ingress knows already. Raises Unauthorized, KeyExpired, RegistryDown."""
        registry = self._ctx.state.registry
        try:
            principal = await registry.find(ask.tenant, ask.key)
        except StateUnavailable as exc:
            raise RegistryDown from exc
        if registry.expired(ask.tenant, ask.key):
            raise KeyExpired
        if principal is None:
            raise Unauthorized if registry.fresh else RegistryDown
        return principal

    async def _weigh(
        self, ask: Ask, principal: Principal, at: int, began: float, hops: tuple[Hop, ...], status: str
    ) -> Pending:
        """What it may cost."""
        ratio = self._seen.ratio(ask.tenant)
        if len(ask.body) > OFF_LOOP_BYTES:
            admission, fault = await asyncio.to_thread(decide.weigh, self._house, ask, principal, ratio, status)
        else:
            admission, fault = decide.weigh(self._house, ask, principal, ratio, status)
        if fault:
            self._ctx.log.warning("tokens could not be counted", extra={"rid": ask.rid, "error": fault})
        return Pending(
            ask=ask,
            admission=admission,
            principal=principal,
            ratio=ratio,
            least=decide.least(self._house, ask, principal, admission),
            tokens=decide.taken(likely_tokens(admission, ask.n, ratio), admission.input_estimate, principal),
            at=at,
            began=began,
            hops=hops,
        )

    # ---- reserving ---------------------------------------------------------------------------------------------------

    async def _reserve(self, pending: Pending) -> None:
        ask = pending.ask
        reach("guardian.before_reserve")
        try:
            answer = await self._ctx.state.ledger.reserve(
                tenant=ask.tenant,
                rid=ask.rid,
                delivery=ask.delivery,
                amount=pending.admission.amount,
                deadline=ask.deadline,
                not_after=self._ctx.state.clock.now() + RESERVE_MS,
                key=ask.key,
                user=ask.user,
                least=pending.least,
                rates=decide.rates(pending),
            )
        except StateUnavailable:
            self._behind.void(ask)  # it may have been applied all the same
            self._without_ledger(pending)
            return
        reach("guardian.after_reserve")
        if answer.status == "ok":
            self._seen.note(ask.tenant, ask.user, answer)
            if answer.counted is not None:
                self._velocity.observe(answer.counted.minute)
            self._forward(pending, decide.granted(self._house, pending, answer))
        else:
            self._on_unreserved(pending, answer)

    def _on_unreserved(self, pending: Pending, answer: Reserved) -> None:
        if answer.status == "denied":
            self._refuse(pending, refusals.over_budget(answer, pending.admission.amount, pending.least))
        elif answer.status == "limited":
            extra = decide.rate_limits(answer.counted)
            if answer.wait_ms < 0:
                extra[headers.SHOULD_RETRY] = "false"
            self._refuse(pending, refusals.over_rate(answer, pending.tokens), extra)
        elif answer.status == "late":
            self._refuse(pending, DeadlineExceeded())
        elif answer.status == "lost":  # its limits are not known any more, so it is refused whatever it had
            text = "This tenant's budget is damaged; the operator has to run `hotpath ledger rebuild`."
            self._refuse(pending, LedgerDown(text))
        elif answer.status == "stale":  # Redis was away longer than the call waited; nothing was reserved
            self._without_ledger(pending)
        elif answer.status == "refused":  # this delivery was given up already; a later one has the stream
            self._refuse(pending, NoWorker())
        else:  # closed: the request is over, nobody listens
            self._count("closed").inc()

    def _without_ledger(self, pending: Pending) -> None:
        """D4: fail closed with a limit, open without one."""
        ask = pending.ask
        if pending.principal.limited or self._seen.limited(ask.tenant, ask.user):
            self._refuse(pending, LedgerDown())
        else:
            day = pending.at // DAY_MS  # it is billed later, for today
            self._forward(pending, msgspec.structs.replace(pending.admission, status="degraded", day=day))

    # ---- forwarding --------------------------------------------------------------------------------------------------

    def _finish(self, pending: Pending, admission: Admission, **more: Any) -> tuple[Admission, Hop]:
        """The admission with the time this took, and this process's hop."""
        took = int((time.perf_counter() - pending.began) * 1_000_000)
        admission = msgspec.structs.replace(admission, overhead_us=took, **more)
        return admission, Hop(self.name, self._ctx.instance, self._ctx.pid, pending.at, took)

    def _forward(self, pending: Pending, admission: Admission) -> None:
        ask = pending.ask
        admission, hop = self._finish(pending, admission)
        hops = (*pending.hops, hop)
        give_up = partial(self._give_up, ask, admission, hops)
        try:
            payload = encode(Route(ask=ask, admission=admission, hops=hops))
            self._ctx.sender.send(
                "routing", payload, on_undeliverable=partial(give_up, NoWorker()), fenced=admission.reserved
            )
        except NoLiveInstance:
            give_up(NoWorker())
        except PayloadTooLarge:
            give_up(TooLarge())
        except BusUnavailable:
            give_up(BusDown())
        else:
            self._forwarded.inc()
            reach_soon("guardian.after_forward")

    def _give_up(self, ask: Ask, admission: Admission, hops: tuple[Hop, ...], error: HotpathError) -> None:
        if admission.reserved:
            self._behind.void(ask)
        self._refusals.fail(ask, error, hops, guardian_head(admission))

    def _refuse(self, pending: Pending, error: HotpathError, extra: dict[str, str] | None = None) -> None:
        status = "degraded" if isinstance(error, LedgerDown) else pending.admission.status
        admission, hop = self._finish(pending, pending.admission, amount=0, status=status, extra=extra or {})
        self._refusals.fail(pending.ask, error, (*pending.hops, hop), guardian_head(admission))
