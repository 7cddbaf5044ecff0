"""What a role is to the service, and what it is given (DESIGN 2)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from shared.bus.base import Bus
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.catalog import Catalog
from shared.settings import Settings
from shared.state.redis import State
from shared.telemetry.metrics import Metrics, MetricsServer
from shared.wire.messages import Cancel, Credit

if TYPE_CHECKING:
    from aiohttp import web


class BootError(Exception):
    """The process cannot start; the message says why and what to do."""


class Role(Protocol):
    """What a worker or the ingress is to the service."""

    name: str
    watches: tuple[str, ...]  # roles whose beats it follows
    capacity: int  # requests it takes at once, as told in its beats

    def in_flight(self) -> int:
        """Requests it has now."""

    async def start(self, ctx: "Context") -> None:
        """Subscribe; everything it needs is up. Raising ends the boot."""

    def control(self, message: Cancel | Credit) -> None:
        """A control message for this instance; must not block or raise."""

    async def drain(self) -> None:
        """Take nothing new, wait for what is in flight (bounded by the settings), settle."""


@dataclass(slots=True)
class Context:
    """What a role may use. `bus`, `state`, `rosters` and `metrics` are shared by the roles of one process."""

    settings: Settings
    catalog: Catalog
    bus: Bus
    state: State
    rosters: dict[str, Roster]
    sender: Sender
    role: str
    instance: str
    pid: int
    log: logging.Logger
    metrics: Metrics
    started_at: float  # monotonic seconds, of the process's start
    bus_listeners: list[Callable[[bool], None]] = field(default_factory=list)  # told when NATS goes and comes back
    stored: Callable[[], bool] = lambda: True  # told in its beats: JetStream takes what the role has to store
    _server: MetricsServer | None = None

    @property
    def metrics_app(self) -> "web.Application":
        """The aiohttp Application of the metrics port, to add routes to in `start`."""
        assert self._server is not None
        return self._server.app
