"""Whether an endpoint may be called now: its circuit as this process knows it, and the claim of its one probe (S1-C2a).

closed              an ordinary call; one look-up, nothing is awaited (S2-05)
open, probing       no call
half_open           ask Redis, just before the call: the one that gets the probe calls, nobody else does
half_open, Redis    no call: a probe that cannot be claimed is not made
away
"""

import secrets
from logging import Logger
from typing import Final

from prometheus_client import Counter

from shared.core.circuit import state
from shared.core.plan import soonest
from shared.state.base import Circuits, Clock, StateUnavailable
from shared.wire.errors import CircuitOpen, HotpathError, NoWorker
from shared.wire.messages import Step
from workers.provider.outcomes import OutcomeLog

ORDINARY: Final = ""  # instead of a probe's id


class Gate:
    """One for the process."""

    def __init__(self, circuits: Circuits, clock: Clock, outcomes: OutcomeLog, log: Logger, claims: Counter) -> None:
        """`claims` counts by endpoint and result."""
        self._circuits = circuits
        self._clock = clock
        self._outcomes = outcomes
        self._log = log
        self._claims = claims

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
            self._claims.labels(endpoint, "unavailable").inc()
            self._outcomes.add(endpoint, None, probe)  # it may stand
            return None
        if not claimed:
            self._claims.labels(endpoint, "denied").inc()
            return ORDINARY if self.closed(endpoint) else None  # closed: another's probe went well meanwhile
        self._claims.labels(endpoint, "claimed").inc()
        self._log.info("a circuit is half open: probing", extra={"endpoint": endpoint, "probe": probe})
        return probe

    def refusal(self, steps: tuple[Step, ...]) -> HotpathError:
        """Why none of these can be called."""
        if all(self.closed(step.endpoint) for step in steps):
            return NoWorker("No endpoint of this model is usable here.")
        return CircuitOpen(retry_after_ms=soonest(steps, self._circuits.look, self._clock.now()))
