"""The roles of one process: connect, check, subscribe, beat, drain."""

import asyncio
import base64
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from shared.bus.base import Bus, BusUnavailable
from shared.bus.pulse import Living, Pulse
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.catalog import Catalog
from shared.service.contract import BootError, Context, Role
from shared.settings import ROLES, SETTLE_S, Settings
from shared.state.base import StateUnavailable
from shared.state.redis import State
from shared.telemetry.log import Log
from shared.telemetry.metrics import Metrics, MetricsServer
from shared.wire import subjects
from shared.wire.messages import UNREADABLE, decode_control

EXIT_FAULT: Final = 1
CONNECT_S: Final = 10.0  # how long Redis is tried when it is required; NATS is tried for ever, and louder after this
GLANCE_S: Final = 3.0  # how long Redis is waited for before the process starts without it
RETRY_S: Final = 0.1
ENVELOPE_BYTES: Final = 65_536  # what an envelope may add to the largest body (DESIGN 3)
CLOSE_S: Final = 3.0  # for each connection

T = TypeVar("T")


class ConnectBus(Protocol):
    """`NatsBus.connect`, or a test's."""

    def __call__(self, url: str, name: str, on_change: Callable[[bool], None]) -> Awaitable[Bus]:
        """Raises BusUnavailable."""


class NoAnswer(BootError):
    """A server did not answer in time; it may yet."""


class Process:
    """The roles of one process and what they share."""

    def __init__(
        self,
        roles: list[Role],
        settings: Settings,
        catalog: Catalog,
        log: Log,
        *,
        connect_bus: ConnectBus,
        connect_state: Callable[[Settings], Awaitable[State]],
        state_away: Callable[[Settings], State] = State.away,
        started_at: float,
    ) -> None:
        self._roles = roles
        self._settings = settings
        self._catalog = catalog
        self._logs = log
        self._connect_bus = connect_bus
        self._connect_state = connect_state
        self._state_away = state_away
        self._started_at = started_at
        self._instances = {role.name: new_instance() for role in roles}
        self._log = log.role(roles[0].name, self._instances[roles[0].name])
        self._rosters = {name: Roster(name) for role in roles for name in role.watches}
        self._metrics = Metrics()
        self._contexts: list[Context] = []
        self._buses: dict[str, Bus] = {}
        self._state: State | None = None
        self._server: MetricsServer | None = None
        self._listeners: list[Callable[[bool], None]] = []
        self._stop = asyncio.Event()
        self._pulse = Pulse(self._rosters)
        self._foreign = 0  # control messages not understood

    # ---- boot

    async def run(self) -> None:
        """Boot, serve until a signal, drain. Raises BootError."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            if await self._boot_unless_stopped():
                took = int((time.monotonic() - self._started_at) * 1000)
                self._log.info("ready", extra={"boot_ms": took})
                await self._stop.wait()
                await self._drain()
        finally:
            await self._release()

    async def _boot_unless_stopped(self) -> bool:
        """Boot; False when a signal came first."""
        booting = asyncio.ensure_future(self._boot())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((booting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if booting.done():
            booting.result()
            return True
        booting.cancel()
        await asyncio.wait((booting,))
        return False

    async def _boot(self) -> None:
        settings = self._settings
        await self._connect()
        state = self._state
        assert state is not None
        need = settings.max_body_bytes + ENVELOPE_BYTES
        for bus in self._buses.values():
            if bus.max_payload < need:
                raise BootError(
                    f"NATS takes messages up to {bus.max_payload} bytes, MAX_BODY_BYTES={settings.max_body_bytes} needs"
                    f" {need}: raise max_payload in the server's configuration, or lower MAX_BODY_BYTES"
                )
        state.run()
        try:
            server = self._server = MetricsServer(
                self._metrics, settings.metrics_host, settings.metrics_port, settings.admin_api_key
            )
        except OSError as error:
            raise BootError(
                f"cannot serve metrics on {settings.metrics_host}:{settings.metrics_port} ({error.strerror}):"
                " set METRICS_PORT=0 for a free port"
            ) from error
        self._register_metrics()
        self._register_held(state)
        for role in self._roles:
            self._contexts.append(self._context(role, state, server))
        await self._subscribe(state)
        self._pulse.announce(self._living(state))
        others = (self._rosters.keys() & set(ROLES)) - self._instances.keys()
        await self._pulse.acquaint(others, together=settings.hotpath_together)
        for role, ctx in zip(self._roles, self._contexts, strict=True):
            await ctx.sender.start()
            await role.start(ctx)
        server.start()
        gc.collect()
        gc.freeze()  # what is loaded now lives as long as the process: full collections need not walk it
        self._pulse.start(self._living(state), server.url)
        self._say_ready(server.url)

    def _living(self, state: State) -> list[Living]:
        reach, both = _reach(state), zip(self._roles, self._contexts, strict=True)
        return [
            Living(role.name, ctx.instance, role.capacity, role.in_flight, reach, ctx.bus, ctx.sender, ctx.stored)
            for role, ctx in both
        ]

    async def _connect(self) -> None:
        """Redis and NATS at once. Raises BootError of the first that fails."""
        connecting = [asyncio.ensure_future(self._connect_redis()), asyncio.ensure_future(self._connect_buses())]
        try:
            await asyncio.gather(*connecting)
        finally:
            for task in connecting:
                task.cancel()
            await asyncio.wait(connecting)

    async def _connect_redis(self) -> None:
        """Tenants and keys are loaded before anybody is told that we are here. Without Redis the process starts all the
        same and refuses until it answers (S1-M6a), unless STATE_REQUIRED says otherwise. Raises BootError."""
        required = self._settings.state_required
        try:
            self._state = await self._patiently(
                "Redis", "REDIS_URL", lambda: self._connect_state(self._settings), CONNECT_S if required else GLANCE_S
            )
        except NoAnswer as error:
            if required:
                raise
            self._log.critical("starting without Redis: requests are refused until it answers: %s", error)
            self._state = self._state_away(self._settings)

    async def _connect_buses(self) -> None:
        """One connection for each user among the roles (one in all while they share a user)."""
        for role in self._roles:
            url = self._settings.nats_url_for(role.name)
            if url not in self._buses:
                name = f"{role.name}.{self._instances[role.name]}"
                setting = "NATS_URL" if url == self._settings.nats_url else f"NATS_URL_{role.name.upper()}"
                self._buses[url] = await self._patiently(
                    "NATS",
                    setting,
                    lambda url=url, name=name: self._connect_bus(url, name, self._on_bus),  # type: ignore[misc]
                    float("inf"),
                )

    async def _patiently(self, what: str, setting: str, connect: Callable[[], Awaitable[T]], within: float) -> T:
        """Try to connect for so many seconds, saying so each second, later each 10 s. Raises NoAnswer, BootError."""
        began = say_at = time.monotonic()
        end = began + within
        while True:
            try:
                return await connect()
            except ValueError as error:
                raise BootError(f"{setting} is not usable: {self._logs.redactor.clean(str(error))}") from error
            except (BusUnavailable, StateUnavailable, OSError) as error:
                now = time.monotonic()
                reason = self._logs.redactor.clean(str(error) or type(error).__name__)
                if now >= end:
                    raise NoAnswer(
                        f"{what} did not answer within {within:.0f} s ({reason}): is it running? is {setting} right?"
                    ) from error
                if now >= say_at:
                    late = now - began >= CONNECT_S
                    level = logging.CRITICAL if late else logging.WARNING
                    say_at = now + (CONNECT_S if late else min(1.0, CONNECT_S))
                    self._log.log(
                        level, "waiting for %s: is it running? is %s right?", what, setting, extra={"error": reason}
                    )
            await asyncio.sleep(RETRY_S)

    def _context(self, role: Role, state: State, server: MetricsServer) -> Context:
        instance = self._instances[role.name]
        bus = self._buses[self._settings.nats_url_for(role.name)]
        return Context(
            settings=self._settings,
            catalog=self._catalog,
            bus=bus,
            state=state,
            rosters=self._rosters,
            sender=Sender(bus, role.name, instance, self._rosters),
            role=role.name,
            instance=instance,
            pid=os.getpid(),
            log=self._logs.role(role.name, instance),
            metrics=self._metrics,
            started_at=self._started_at,
            bus_listeners=self._listeners,
            _server=server,
        )

    def _register_metrics(self) -> None:
        connected = self._metrics.gauge("bus_connected", "1 while NATS is connected")
        connected.set_function(lambda: float(all(bus.connected for bus in self._buses.values())))
        errors = self._metrics.gauge("bus_errors", "What went wrong on the bus since the start")
        errors.set_function(lambda: float(sum(sum(bus.errors.values()) for bus in self._buses.values())))
        ignored = self._metrics.gauge("messages_ignored", "Beats and control messages not understood")
        ignored.set_function(lambda: float(self._foreign + self._pulse.ignored))
        stalls = self._metrics.gauge("loop_stalls", "Times the event loop stood still for over 250 ms")
        stalls.set_function(lambda: float(self._pulse.stalls))
        dropped = self._metrics.gauge("log_lines_dropped", "Log lines lost to a full queue or disk")
        dropped.set_function(lambda: float(self._logs.handler.dropped))
        in_flight = self._metrics.gauge("in_flight", "Requests in flight", ("role",))
        alive = self._metrics.gauge("instances_alive", "Live instances as this process sees them", ("role",))
        for role in self._roles:
            in_flight.labels(role.name).set_function(role.in_flight)
        for roster in self._rosters.values():
            alive.labels(roster.role).set_function(partial(_count_alive, roster))

    def _register_held(self, state: State) -> None:
        """What I8 wants back at its baseline; each role adds its own."""
        held = self._metrics.held
        held("tasks", lambda: len(asyncio.all_tasks()))
        held("redis calls waiting", lambda: state.waiting)
        held("keys asked for in vain", lambda: state.registry.unknown)
        held("messages that may come back", lambda: sum(ctx.sender.kept for ctx in self._contexts))
        held("instances known", lambda: sum(map(len, self._rosters.values())))

    # ---- subscriptions

    async def _subscribe(self, state: State) -> None:
        first = self._contexts[0].bus

        def on_registry(_subject: str, _reply: str, _payload: bytes, _no_responders: bool) -> None:
            state.registry.refresh_soon()

        def on_circuit(_subject: str, _reply: str, _payload: bytes, _no_responders: bool) -> None:
            state.circuits.refresh_soon()

        await first.subscribe(subjects.NOTICE_REGISTRY, on_registry)
        await first.subscribe(subjects.NOTICE_CIRCUIT, on_circuit)
        heard: set[str] = set()
        for role, ctx in zip(self._roles, self._contexts, strict=True):
            # by the user of the role that watches: no other one may (deploy/nats.conf)
            await self._pulse.listen(ctx.bus, [watched for watched in role.watches if watched not in heard])
            heard.update(role.watches)
            await ctx.bus.subscribe(subjects.control(ctx.instance), self._control_handler(role, ctx))

    def _control_handler(self, role: Role, ctx: Context) -> Callable[[str, str, bytes, bool], None]:
        def on_control(_subject: str, reply: str, payload: bytes, _no_responders: bool) -> None:
            if not payload:
                if subjects.answerable(role.name, reply):
                    with contextlib.suppress(BusUnavailable):
                        ctx.bus.publish(reply, b"")
                return
            try:
                message = decode_control(payload)
            except UNREADABLE:
                self._foreign += 1
                return
            role.control(message)

        return on_control

    # ---- life

    def _on_bus(self, connected: bool) -> None:
        if connected:
            self._log.info("bus connected again")
            self._pulse.beat()  # the others hear of us at once
        else:
            self._log.error("bus disconnected")
        for listener in self._listeners:
            listener(connected)

    def _say_ready(self, url: str) -> None:
        descriptor = self._settings.hotpath_ready_fd
        if descriptor < 0:
            return
        lines = [
            json.dumps({"role": ctx.role, "instance": ctx.instance, "pid": ctx.pid, "metrics": url}) + "\n"
            for ctx in self._contexts
        ]
        try:
            os.write(descriptor, "".join(lines).encode())
            os.close(descriptor)
        except OSError as error:
            self._log.warning("nobody reads HOTPATH_READY_FD", extra={"error": str(error)})

    def _on_loop_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._log.error(
            context.get("message", "event loop error"),
            exc_info=(type(error), error, error.__traceback__) if error is not None else None,
        )

    # ---- end

    def stop(self) -> None:
        """Begin to drain; called again, end at once."""
        if self._stop.is_set():
            self._log.warning("second signal: ending at once, without draining")
            self._logs.close()
            os._exit(EXIT_FAULT)
        self._stop.set()

    async def _drain(self) -> None:
        self._log.info("draining", extra={"in_flight": sum(role.in_flight() for role in self._roles)})
        self._pulse.drain()
        drains = [asyncio.ensure_future(role.drain()) for role in self._roles]
        done, late = await asyncio.wait(drains, timeout=self._settings.drain_s() + SETTLE_S)
        for task in late:
            task.cancel()
        for task in done:
            if (error := task.exception()) is not None:
                self._log.error("drain failed", exc_info=(type(error), error, error.__traceback__))
        self._log.info("drained", extra={"late": len(late)})

    async def _release(self) -> None:
        """Close what is open, however far the boot came: the bus, Redis, the metrics; the log is the caller's
        (S1-H5d)."""
        self._pulse.stop()
        for bus in self._buses.values():
            await self._close("NATS", bus.close())
        if self._state is not None:
            await self._close("Redis", self._state.close())
        if self._server is not None:
            await self._close("metrics", self._server.close())

    async def _close(self, what: str, closing: Coroutine[Any, Any, None]) -> None:
        try:
            await asyncio.wait_for(closing, CLOSE_S)
        except TimeoutError:
            self._log.warning("could not close %s in time", what)


def _reach(state: State) -> Callable[[], tuple[bool, bool]]:
    return lambda: (state.registry.ready, state.available)


def _count_alive(roster: Roster) -> int:
    return len(roster.alive(time.monotonic()))


def new_instance() -> str:
    """A new instance id: 60 random bits as 12 characters of a-z and 2-7."""
    return base64.b32encode(secrets.token_bytes(8))[:12].decode().lower()
