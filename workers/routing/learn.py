"""Consumes `outcome` (queue group "routing"): how upstream calls ended moves the circuits, which all processes share.

Batches are recorded one after another, in the order they came; a success and the failure after it must not change
places. The queue is bounded: while Redis is away the oldest knowledge is worth least.
"""

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from shared.bus.base import BusUnavailable, Subscription
from shared.service.killat import reach
from shared.state.base import StateUnavailable
from shared.wire import subjects
from shared.wire.messages import Outcomes, decode_outcomes

if TYPE_CHECKING:
    from shared.service import Context

MAX_WAITING: Final = 1000  # batches; a provider sends some per second
COMPLAIN_S: Final = 5.0  # at most one log line about lost or unreadable batches in this time
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


def by_endpoint(outcomes: Outcomes, known: frozenset[str]) -> dict[str, list[bool]]:
    """The outcomes of each endpoint in the catalogue, oldest first."""
    found: dict[str, list[bool]] = {}
    for call in outcomes.calls:
        if call.endpoint in known:
            found.setdefault(call.endpoint, []).append(call.ok)
    return found


class Learner:
    """Records outcomes behind the requests, and tells every process when a circuit changed."""

    def __init__(self, ctx: "Context") -> None:
        self._ctx = ctx
        self._known = frozenset(ctx.catalog.endpoints)
        self._waiting: deque[dict[str, list[bool]]] = deque()
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._complained = 0.0
        self.lost = 0

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
        except _UNREADABLE:
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
                for endpoint, outcomes in self._waiting.popleft().items():
                    await self._record(endpoint, outcomes)
            self._more.clear()
            self._idle.set()

    async def _record(self, endpoint: str, outcomes: list[bool]) -> None:
        circuits = self._ctx.state.circuits
        reach("routing.before_record")
        try:
            changed = await circuits.record(endpoint, outcomes)
        except StateUnavailable:
            self._lose(1)
            return
        if not changed:
            return
        circuits.refresh_soon()
        self._ctx.log.info("a circuit changed", extra={"endpoint": endpoint})
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
