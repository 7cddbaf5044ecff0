"""The ingress as a role: what it is made of, its routes and its numbers."""

import asyncio
import logging
import time
from functools import partial
from typing import Final

from aiohttp import web

from ingress import observe
from ingress.admin.resources import Resources
from ingress.admin.router import Router
from ingress.admin.server import AdminServer
from ingress.auth import Auth
from ingress.chat import Chat, Rules
from ingress.costs import CostsPage
from ingress.deliver import Desk, Handoff
from ingress.events import Events
from ingress.health import Health
from ingress.leave import Leaving, Times
from ingress.limiter import Limiter
from ingress.listener import Listener, allow_connections
from ingress.middleware import Door, Visit
from ingress.models import PREFIX, Models
from ingress.protocol import Reply, Server, Timers
from ingress.replies import Replies
from ingress.wheel import Wheel
from shared.core.users import user_id
from shared.service import Context
from shared.settings import Settings
from shared.wire import errors
from shared.wire.messages import Cancel, Credit

#: S1-R1, from one address: a scrape each 15 s is 4. The process's own metrics port has no such limit.
METRICS_A_MINUTE: Final = 10
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Ingress:
    """One ingress process."""

    name = "ingress"
    watches: tuple[str, ...] = ("guardian", "routing", "provider", "ingress")

    def __init__(self) -> None:
        self.capacity = 0
        self.port = 0
        self._door: Door | None = None

    def in_flight(self) -> int:
        """Requests being served."""
        return self._door.in_flight if self._door is not None else 0

    def control(self, message: Cancel | Credit) -> None:
        """Nobody cancels or credits an ingress."""

    async def start(self, ctx: Context) -> None:
        """Subscribe, then listen."""
        settings = ctx.settings
        self.capacity = settings.max_in_flight
        self._ctx = ctx
        self._tally = observe.Tally()
        self._traces = observe.Traces()
        self._door = door = Door(
            max_in_flight=settings.max_in_flight, per_tenant=settings.max_in_flight_per_tenant, tally=self._tally
        )
        ctx.metrics.show_queue(self.name, door.queue)
        self._desk = self._make_desk(ctx)
        self._replies = Replies(ctx.bus, ctx.instance, ctx.rosters, self._desk)
        self._desk.control = self._replies
        self._events = Events(ctx.log, time.monotonic)
        self._auth = Auth(ctx.state.registry, settings.admin_api_key, self._events, ctx.state.clock.now)
        ctx.bus_listeners.append(self._replies.on_bus)
        router = Router(Resources(ctx.state.operations), self._auth, self._tally, ctx.state.registry.refresh_soon)
        self._admin = AdminServer(settings, router, ctx.log)
        self._add_routes(ctx, door)
        self._add_metrics(ctx)
        await self._replies.start()
        self._server = Server(
            door,
            refuse=door.refuse,
            read=door.queue.read,
            crowded=door.crowded,
            answer_unparsed=door.answer_unparsed,
            max_connections=self._connections(settings.max_connections),
            timers=_timers(settings),
            log=logging.getLogger("hotpath.ingress"),
        )
        self._listener = Listener(settings)
        await self._listener.start(self._server)
        self.port = self._listener.port
        await self._admin.start()

    def _connections(self, wanted: int) -> int:
        """So many as there are descriptors for: above them nothing could be accepted, and nobody be told so."""
        bound = allow_connections(wanted)
        if bound < wanted:
            self._ctx.log.warning(
                "MAX_CONNECTIONS is above the limit of open files (ulimit -n)", extra={"bound": bound}
            )
        return bound

    def _make_desk(self, ctx: Context) -> Desk:
        loop = asyncio.get_running_loop()
        return Desk(
            sender=ctx.sender,
            wheel=Wheel(loop, time.monotonic),
            handoff=Handoff(ctx.settings.handoff_timeout_ms / 1000),
            instance=ctx.instance,
            pid=ctx.pid,
            now_ms=ctx.state.clock.now,
        )

    # ---- routes ------------------------------------------------------------------------------------------------------

    def _add_routes(self, ctx: Context, door: Door) -> None:
        settings, catalog = ctx.settings, ctx.catalog
        health = Health(
            bus=ctx.bus, registry=ctx.state.registry, rosters=ctx.rosters, models=len(catalog.models), door=door
        )
        chat = Chat(
            rules=_rules(settings),
            auth=self._auth,
            events=self._events,
            models=catalog.models,
            epoch=catalog.epoch,
            desk=self._desk,
            user_id=partial(user_id, settings.key_pepper.encode()),
            traces=self._traces,
            cold=observe.ColdStart(ctx.log, ctx.started_at),
            ready=health.require,
        )
        models = Models(self._auth, catalog.models)
        self._limiter = Limiter(METRICS_A_MINUTE, time.monotonic)
        costs = CostsPage(self._auth, self._limiter, ctx.state.registry, ctx.state)
        door.add("POST", "/v1/chat/completions", chat)
        door.add("GET", "/v1/models", models.every)
        door.add("GET", PREFIX, models.one, prefix=True)
        door.add("GET", "/health", health.health, public=True)
        door.add("GET", "/ready", health.ready, public=True)
        door.add("GET", "/metrics", self._metrics, public=True)
        door.add("GET", "/metrics/targets", self._targets, public=True)
        door.add("GET", "/metrics/costs", costs, public=True)
        door.add("GET", "/trace/", self._trace, prefix=True, public=True)

    async def _metrics(self, visit: Visit) -> Reply:
        """S1-G01: a tenant's key is not enough."""
        self._auth.admin(visit.request, visit.label)
        self._limiter.take(visit.request.remote or "")
        return visit.reply(200, self._ctx.metrics.render(), [("Content-Type", METRICS_TYPE)])

    async def _targets(self, visit: Visit) -> Reply:
        self._auth.admin(visit.request, visit.label)
        return visit.json(observe.targets(self._ctx.rosters, time.monotonic()))

    async def _trace(self, visit: Visit) -> Reply:
        self._auth.admin(visit.request, visit.label)
        found = self._traces.find(visit.path[len("/trace/") :])
        if found is None:
            raise errors.NotFound("This ingress keeps no such request (it keeps the last 10,000).")
        return visit.json(found)

    def _add_metrics(self, ctx: Context) -> None:
        """The same two on the process's own metrics port, and this role's numbers."""

        async def targets(_request: web.Request) -> web.Response:
            body = observe.targets(ctx.rosters, time.monotonic())
            return web.Response(body=body, content_type="application/json")

        async def trace(request: web.Request) -> web.Response:
            found = self._traces.find(request.match_info["rid"])
            status = 404 if found is None else 200
            return web.Response(status=status, body=found or b"null", content_type="application/json")

        ctx.metrics_app.router.add_get("/metrics/targets", targets)
        ctx.metrics_app.router.add_get("/trace/{rid}", trace)
        replies, counts = self._replies, self._events.counts
        self._tally.numbers = {
            "auth_failures": ("Requests without a valid key", lambda: float(counts["auth_failure"])),
            "unusual_models": ("Requests for a model whose name is no name", lambda: float(counts["unusual_model"])),
            "rate_limited": ("Requests refused for a rate limit", lambda: float(counts["rate_limited"])),
            "cancels": ("Cancels sent to providers", lambda: float(replies.cancels)),
            "presumed_deaths": ("Instances found dead or frozen", lambda: float(replies.deaths)),
            "stray_frames": ("Frames of streams that were gone", lambda: float(replies.stray_frames)),
            "unknown_frames": ("Frames of a kind not known here", lambda: float(replies.unknown_frames)),
            "bad_batches": ("Batches that could not be read", lambda: float(replies.bad_batches)),
        }
        ctx.metrics.registry.register(self._tally)
        listening = ctx.metrics.gauge("admin_listening", "1 while this process has the admin API's port")
        listening.set_function(lambda: float(self._admin.listening))
        held, desk = ctx.metrics.held, self._desk
        held("exchanges", lambda: len(desk.exchanges))
        held("timers", lambda: len(desk.wheel))
        held("pairs of the ingress", lambda: replies.pairs)
        held("client connections", lambda: len(self._server.connections))

    # ---- draining ----------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """See leave.py; then nothing listens and no connection is open."""
        assert self._door is not None
        settings = self._ctx.settings
        await self._admin.close()
        leaving = Leaving(
            door=self._door, desk=self._desk, server=self._server, listener=self._listener,
            siblings=self._ctx.rosters["ingress"], log=self._ctx.log,
            times=Times(whole=settings.shutdown_drain_ms / 1000, streams=settings.drain_s()),
        )  # fmt: skip
        await leaving.run()
        await self._listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(1.0)
        await self._replies.close()


def _rules(settings: Settings) -> Rules:
    return Rules(
        max_body=settings.max_body_bytes,
        body=settings.client_body_ms / 1000,
        max_response=settings.max_response_bytes,
        timeout_ms=settings.timeout_ms,
        timeout_streaming_ms=settings.timeout_streaming_ms,
        timeout_min_ms=settings.timeout_min_ms,
        timeout_max_ms=settings.timeout_max_ms,
        first_token=settings.timeout_first_token_ms / 1000,
        idle=settings.timeout_idle_ms / 1000,
        commit=settings.stream_commit_ms / 1000,
        keepalive=settings.keepalive_ms / 1000,
    )


def _timers(settings: Settings) -> Timers:
    return Timers(
        head=settings.client_head_ms / 1000,
        idle=settings.client_idle_ms / 1000,
        stalled=settings.client_stalled_ms / 1000,
    )
