"""Consumes `outcome` (queue group "routing"): how upstream calls ended moves the circuits, which all processes share.

Batches are recorded one after another, in the order they came; a success and the failure after it must not change
places. The queue is bounded: while Redis is away the oldest knowledge is worth least.
"""

import asyncio
import logging
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from shared.bus.base import BusUnavailable, Subscription
from shared.core.circuit import Event, state
from shared.service.killat import reach
from shared.state import keys
from shared.state.base import StateUnavailable
from shared.wire import subjects
from shared.wire.messages import UNREADABLE, VERSION, Outcome, Outcomes, decode_outcomes

if TYPE_CHECKING:
    from shared.service import Context

MAX_WAITING: Final = 1000  # batches; a provider sends some per second
COMPLAIN_S: Final = 5.0  # at most one log line about lost or unreadable batches in this time


Events = list[tuple[Event, str]]


def by_endpoint(outcomes: Outcomes, known: frozenset[str]) -> dict[str, Events]:
    """What happened at each endpoint of the catalogue, oldest first. What names a probe that cannot be one is left
    out: no provider of ours sent it."""
    found: dict[str, Events] = {}
    for call in outcomes.calls:
        if call.endpoint in known and (not call.probe or keys.OPAQUE.fullmatch(call.probe)):
            found.setdefault(call.endpoint, []).append((_event(call), call.probe))
    return found


def _event(call: Outcome) -> Event:
    if not call.probe:
        return "good" if call.ok else "failed"
    if not call.verdict:
        return "probe_void"
    return "probe_good" if call.ok else "probe_failed"


class Learner:
    """Records outcomes behind the requests, and tells every process when a circuit changed."""

    def __init__(self, ctx: "Context") -> None:
        self._ctx = ctx
        self._known = frozenset(ctx.catalog.endpoints)
        self._waiting: deque[dict[str, Events]] = deque()
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._complained = 0.0
        self._changes = ctx.metrics.counter("circuit_changes_total", "Changes of circuits", ("endpoint", "state"))
        self._show_states()
        self.lost = 0

    def _show_states(self) -> None:
        """A gauge for each endpoint; there are as many as the catalogue has."""
        gauge = self._ctx.metrics.gauge("circuit_state", "0 closed, 1 half open (or probing), 2 open", ("endpoint",))
        for endpoint in self._known:
            gauge.labels(endpoint).set_function(partial(self._shown, endpoint))

    def _shown(self, endpoint: str) -> float:
        found = self._ctx.state.circuits.look(endpoint)
        if found is None:
            return 0.0
        return 2.0 if state(found, self._ctx.state.clock.now()) == "open" else 1.0

    async def start(self) -> None:
        """Subscribe, as one of the queue group."""
        self._subscription = await self._ctx.bus.subscribe(subjects.OUTCOME, self._on_outcomes, subjects.OUTCOME_GROUP)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def drain(self, timeout_s: float) -> None:
        """Record what came, within the time."""
        if self._subscription is not None:
            await self._subscription.drain()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._lose(len(self._waiting))
        if self._task is not None:
            self._task.cancel()

    def _on_outcomes(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        try:
            outcomes = decode_outcomes(payload)
        except UNREADABLE:
            outcomes = None
        if outcomes is None or outcomes.v > VERSION:
            self._lose(1)
            return
        batch = by_endpoint(outcomes, self._known)
        if not batch:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self._lose(1)
        self._waiting.append(batch)
        self._idle.clear()
        self._more.set()

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            while self._waiting:
                for endpoint, events in self._waiting.popleft().items():
                    await self._record(endpoint, events)
            self._more.clear()
            self._idle.set()

    async def _record(self, endpoint: str, events: Events) -> None:
        circuits = self._ctx.state.circuits
        reach("routing.before_record")
        try:
            became = await circuits.record(endpoint, events)
        except StateUnavailable:
            self._lose(1)
            return
        if became is not None:
            self._changes.labels(endpoint, became).inc()
            level = logging.INFO if became == "half_open" else logging.WARNING  # half_open: a probe was given back
            self._ctx.log.log(level, "a circuit changed", extra={"endpoint": endpoint, "state": became})
        elif not any(probe for _, probe in events):  # else: decided by its own process, of which nobody else has heard
            return
        circuits.refresh_soon()
        try:
            self._ctx.bus.publish(subjects.NOTICE_CIRCUIT, b"")
        except BusUnavailable:
            pass  # every process polls the version besides

    def _lose(self, batches: int) -> None:
        self.lost += batches
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_S:
            self._complained = now
            self._ctx.log.warning("outcomes of upstream calls were lost", extra={"so_far": self.lost})
