"""Consumes `routing.<instance>`: a Plan from the catalogue's order and the circuits, then on to a provider.

Nothing is awaited and no task is made: circuits are read locally (S2-05). What ends here is told to the asker in one
Failed frame, and the reservation is given back.
"""

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from shared.bus import replies
from shared.bus.base import BusUnavailable, PayloadTooLarge, Subscription
from shared.bus.sender import NoLiveInstance
from shared.core.head import guardian_head
from shared.core.overload import Queue
from shared.core.plan import make_plan, soonest
from shared.service.killat import reach, reach_soon
from shared.state.behind import Behind
from shared.wire import subjects
from shared.wire.errors import (
    BusDown,
    CircuitOpen,
    HotpathError,
    ModelNotFound,
    NewerVersion,
    NoWorker,
    Overloaded,
    TooLarge,
    quote,
)
from shared.wire.messages import UNREADABLE, VERSION, Call, Cancel, Credit, Hop, Plan, Route, decode_route, encode
from workers.routing.learn import Learner
from workers.routing.turns import Turns

if TYPE_CHECKING:
    from shared.service import Context
_NOBODY: Final[frozenset[str]] = frozenset()


class Routing:
    """Routing's role for `shared.service`."""

    name = "routing"
    watches: tuple[str, ...] = ("provider",)

    def __init__(self) -> None:
        self.capacity = 0
        self._subscriptions: list[Subscription] = []

    def in_flight(self) -> int:
        """Reservations being given back; a request itself never waits here."""
        return self._behind.under_way

    def control(self, message: Cancel | Credit) -> None:
        """Nothing: a request never waits here, and its provider hears the cancel itself."""

    async def start(self, ctx: "Context") -> None:
        """Subscribe to requests and to outcomes."""
        self._ctx = ctx
        self._behind = Behind(ctx.state.ledger, ctx.log, tombstone_ms=ctx.settings.ledger_tombstone_ms)
        self._max_retries = ctx.settings.routing_max_retries
        self._learner = Learner(ctx)
        self._turns = Turns()
        self.capacity = ctx.settings.max_in_flight
        self._loop = asyncio.get_running_loop()
        self._queue = Queue()
        ctx.metrics.show_queue(self.name, self._queue)
        outcomes = ctx.metrics.counter("routing_requests", "Requests by how routing ended them.", ("outcome",))
        self._refusals = replies.Refusals(
            ctx.bus, self.name, ctx.instance, ctx.log, lambda code: outcomes.labels(code).inc()
        )
        self._forwarded = outcomes.labels("forwarded")
        await self._learner.start()
        self._subscriptions = [await ctx.bus.subscribe(subjects.worker(self.name, ctx.instance), self._on_route)]

    async def drain(self) -> None:
        """Take nothing more, finish what is under way."""
        for subscription in self._subscriptions:
            await subscription.drain()
        timeout = self._ctx.settings.shutdown_drain_ms / 1000
        await self._learner.drain(timeout)
        await self._ctx.sender.settled()  # what could not be handed on is void
        await self._behind.drain(timeout)

    def _on_route(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        if not payload:  # somebody asks after us; that we listen is the answer (bus/sender.py)
            return
        began = time.perf_counter()
        since = self._queue.read(self._loop.time())
        reach("routing.on_message")
        try:
            route = decode_route(payload)
        except UNREADABLE:
            self._refusals.drop()
            return
        at = self._ctx.state.clock.now()
        try:
            if not self._queue.begin(since, time.monotonic()):
                raise Overloaded
            if route.ask.v > VERSION:
                raise NewerVersion
            plan = self._plan(route, at)
        except HotpathError as exc:
            self._give_up(route, self._hops(route, at, began), exc)
            return
        self._forward(route, plan, self._hops(route, at, began))

    def _plan(self, route: Route, now: int) -> Plan:
        """Raises ModelNotFound (the catalogues of two processes differ for a moment) and CircuitOpen."""
        model = self._ctx.catalog.models.get(route.ask.model)
        if model is None:
            raise ModelNotFound(f"The model {quote(route.ask.model)} does not exist here.")
        look = self._ctx.state.circuits.look
        plan = make_plan(model.steps, look, now, self._max_retries, partial(self._turns.take, now=now))
        if plan is None:
            raise CircuitOpen(retry_after_ms=soonest(model.steps, look, now))
        return plan

    def _hops(self, route: Route, at: int, began: float) -> tuple[Hop, ...]:
        took = int((time.perf_counter() - began) * 1_000_000)
        return (*route.hops, Hop(self.name, self._ctx.instance, self._ctx.pid, at, took))

    def _forward(self, route: Route, plan: Plan, hops: tuple[Hop, ...]) -> None:
        lost = route.ask.lost
        try:
            payload = encode(Call(ask=route.ask, admission=route.admission, plan=plan, hops=hops))
            self._ctx.sender.send(
                "provider",
                payload,
                skip=frozenset((lost,)) if lost else _NOBODY,
                fenced=route.admission.reserved,
                on_undeliverable=partial(self._give_up, route, hops, NoWorker()),
            )
        except NoLiveInstance:
            self._give_up(route, hops, NoWorker())
        except PayloadTooLarge:
            self._give_up(route, hops, TooLarge())
        except BusUnavailable:
            self._give_up(route, hops, BusDown())
        else:
            self._forwarded.inc()
            reach_soon("routing.after_forward")

    def _give_up(self, route: Route, hops: tuple[Hop, ...], error: HotpathError) -> None:
        if route.admission.reserved:
            self._behind.void(route.ask)
        self._refusals.fail(route.ask, error, hops, guardian_head(route.admission))
