"""/health (the process answers) and /ready (requests would be served), with what is missing (S1-G14, S1-M6d)."""

import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from ingress.auth import Registry
from ingress.middleware import Door, Visit
from ingress.protocol import Reply
from shared.bus.base import Bus
from shared.bus.roster import Roster
from shared.wire import errors

#: The roles a request needs.
NEEDED: Final = ("guardian", "routing", "provider")
#: How long the answer to "is every role alive" holds: rosters are walked ten times a second, not per request.
LOOK_S: Final = 0.1

_json: Final = msgspec.json.Encoder().encode


class Health:
    """Knows what this process knows of the others. Nothing is asked of anybody: an open route must cost nothing."""

    def __init__(
        self, *, bus: Bus, registry: Registry, rosters: Mapping[str, Roster], models: int, door: Door,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._bus = bus
        self._registry = registry
        self._rosters = rosters
        self._models = models
        self._door = door
        self._clock = clock
        self._looked = float("-inf")
        self._missing = ""

    async def health(self, visit: Visit) -> Reply:
        """Always 200: the process answers."""
        return visit.json(b'{"status":"ok"}')

    async def ready(self, visit: Visit) -> Reply:
        """200, or 503 with the same detail."""
        now = self._clock()
        workers = {
            role: sum(beat.loaded and not beat.draining for beat in self._rosters[role].alive(now)) for role in NEEDED
        }
        detail = {
            "redis": self._registry.fresh,
            "nats": self._bus.connected,
            # told only: without it what Redis does not take goes to the spool (DESIGN 5)
            "jetstream": all(beat.stored for beat in self._rosters["provider"].alive(now)),
            "workers": workers,
            "registry": self._registry.ready,
            "catalogue": self._models,
            "draining": self._door.draining,
        }
        good = (
            detail["redis"] and detail["nats"] and all(workers.values()) and detail["registry"] and self._models > 0
        ) and not self._door.draining
        body = _json({"status": "ready" if good else "not ready", **detail})
        return visit.reply(200 if good else 503, body, [("Content-Type", "application/json")])

    def require(self) -> None:
        """Refuse at once what could only time out. Raises BusDown, NoWorker, LedgerDown."""
        if not self._bus.connected:
            raise errors.BusDown
        if not self._registry.ready:  # nor is the shared time known: a deadline would mean nothing
            raise errors.LedgerDown("The budget ledger has not been reachable since this process started.")
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            # `pick` knows draining from serving, and dead from silent
            self._missing = next((role for role in NEEDED if self._rosters[role].pick(now) is None), "")
        if self._missing:
            self._looked = float("-inf")
            raise errors.NoWorker(f"No {self._missing} worker is available.")
