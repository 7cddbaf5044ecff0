"""Whether an endpoint may be called now: its circuit as this process knows it, and the claim of its one probe (S1-C2a).

closed              an ordinary call; one look-up, nothing is awaited (S2-05)
open, probing       no call
half_open           ask Redis, just before the call: the one that gets the probe calls, nobody else does
half_open, Redis    no call: a probe that cannot be claimed is not made
away
"""

import asyncio
import logging
import secrets
from typing import Final

from prometheus_client import Counter

from shared.core.circuit import Event, state
from shared.core.plan import soonest
from shared.state.base import Circuits, Clock, StateUnavailable
from shared.wire.errors import CircuitOpen, HotpathError, NoWorker
from shared.wire.messages import Step
from workers.provider.outcomes import OutcomeLog

ORDINARY: Final = ""  # instead of a probe's id


class Gate:
    """One for the process."""

    def __init__(
        self, circuits: Circuits, clock: Clock, outcomes: OutcomeLog, log: logging.Logger, probes: Counter
    ) -> None:
        """`probes` counts by endpoint and result."""
        self._circuits = circuits
        self._clock = clock
        self._outcomes = outcomes
        self._log = log
        self._probes = probes
        self._verdicts: set[asyncio.Task[None]] = set()  # as many as there are probes

    def closed(self, endpoint: str) -> bool:
        """Whether it may simply be called."""
        return self._circuits.look(endpoint) is None

    def shut(self, endpoint: str) -> bool:
        """Whether no call to it may start now."""
        found = self._circuits.look(endpoint)
        return found is not None and state(found, self._clock.now()) != "half_open"

    async def enter(self, endpoint: str) -> str | None:
        """ORDINARY; the id of the probe that this call now is; None: it must not be made."""
        if self.closed(endpoint):
            return ORDINARY
        if self.shut(endpoint):
            return None
        probe = secrets.token_hex(16)
        try:
            claimed = await self._circuits.claim(endpoint, probe)
        except StateUnavailable:
            self._probes.labels(endpoint, "unavailable").inc()
            self._outcomes.add(endpoint, None, probe)  # it may stand
            return None
        if not claimed:
            self._probes.labels(endpoint, "denied").inc()
            return ORDINARY if self.closed(endpoint) else None  # closed: another's probe went well meanwhile
        self._probes.labels(endpoint, "claimed").inc()
        self._log.info("a circuit is half open: probing", extra={"endpoint": endpoint, "probe": probe})
        return probe

    def tell(self, endpoint: str, ok: bool | None, probe: str) -> None:
        """How a call went; None: it says nothing.

        A probe's verdict goes straight to Redis, since a routing process that is frozen swallows its share of the
        outcomes; and with those, which tells everybody of it, and makes up for it when Redis did not take it from
        here. Whichever comes second finds the probe decided.
        """
        if not probe:
            if ok is not None:
                self._outcomes.add(endpoint, ok)
            return
        self._outcomes.add(endpoint, ok, probe)
        task = asyncio.get_running_loop().create_task(self._decide(endpoint, ok, probe))
        self._verdicts.add(task)
        task.add_done_callback(self._verdicts.discard)

    async def _decide(self, endpoint: str, ok: bool | None, probe: str) -> None:
        event: Event = "probe_void" if ok is None else "probe_good" if ok else "probe_failed"
        self._probes.labels(endpoint, event.removeprefix("probe_")).inc()
        try:
            became = await self._circuits.record(endpoint, ((event, probe),))
        except StateUnavailable:
            return
        if became is not None:
            level = logging.INFO if became == "half_open" else logging.WARNING
            self._log.log(level, "a circuit changed", extra={"endpoint": endpoint, "state": became, "probe": probe})

    async def close(self) -> None:
        """Verdicts on their way; each takes 150 ms at most."""
        if self._verdicts:
            await asyncio.wait(self._verdicts)

    def refusal(self, steps: tuple[Step, ...]) -> HotpathError:
        """Why none of these can be called."""
        if all(self.closed(step.endpoint) for step in steps):
            return NoWorker("No endpoint of this model is usable here.")
        return CircuitOpen(retry_after_ms=soonest(steps, self._circuits.look, self._clock.now()))
