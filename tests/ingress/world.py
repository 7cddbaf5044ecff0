"""A whole ingress on a MemoryBus, with a scripted worker side: what the tests of this folder stand on."""

import asyncio
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from ingress.app import Ingress
from shared import settings as environment
from shared.bus.memory import Broker, MemoryBus
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.service import Context
from shared.state.base import Principal, StateUnavailable
from shared.state.costs import Costs, Spent
from shared.telemetry.metrics import Metrics, MetricsServer
from shared.wire import subjects
from shared.wire.errors import HotpathError
from shared.wire.messages import (
    VERSION,
    Accepted,
    Ask,
    Batch,
    Beat,
    Cancel,
    Credit,
    Delta,
    End,
    Failed,
    Frame,
    Hop,
    Refused,
    Summary,
    decode_admit,
    decode_control,
    encode,
)

KEY = "gateway-key-gateway-key-gateway-key-0"
ADMIN = "admin-key-admin-key-admin-key-admin-key"
ENV = {
    "GATEWAY_API_KEY": KEY,
    "KEY_PEPPER": "pepper-pepper-pepper-pepper-pepper-1",
    "ADMIN_API_KEY": ADMIN,
    "GATEWAY_PORT": "0",
    "ADMIN_PORT": "0",
}
SUMMARY = Summary(call=1, endpoint="sim", model="sim-fast", cost=1000, input_tokens=5, output_tokens=7)
HEAD = {"X-BR-Guardian-Status": "on", "X-BR-Calls": "1", "X-BR-Endpoint": "sim"}
PAYLOAD = b'{"request_id":"r","actual_cost":"$0.000001"}'
HOPS = (Hop("guardian", "g1", 2, 1), Hop("routing", "r1", 3, 1), Hop("provider", "p1", 4, 1))


class FakeRegistry:
    """Two keys; everything a test wants to change is an attribute."""

    def __init__(self) -> None:
        self.known = {KEY.encode(): Principal(tenant="default", key="bootstrap", tenant_name="default")}
        self.fresh = True
        self.ready = True
        self.away = False

    def refresh_soon(self) -> None:
        """Polls nothing."""

    def authenticate(self, token: bytes) -> Principal | None:
        return self.known.get(token)

    def tenants(self) -> list[str]:
        return [f"t{number:03}" for number in range(60)]

    def name_of(self, tenant: str) -> str:
        return f"name of {tenant}"

    async def costs(self, tenant: str) -> Costs:
        """The tracker's part: only t001 has any."""
        if self.away:
            raise StateUnavailable
        spent = Spent(2, 1_500_000_000, 10, 5)
        if tenant != "t001":
            return Costs()
        day = "2026-11-21"
        return Costs(
            total=spent, models={"m": spent}, days={day: spent}, by_day={day: {"m": spent}}, alerts={"lifetime:10": 7},
            since=5,
        )  # fmt: skip

    async def fetch(self, token: bytes) -> Principal | None:
        if self.away:
            raise StateUnavailable
        return self.known.get(token)


class Worker:
    """One worker instance as the ingress sees it: it takes admits or sends frames, hears control, may be killed."""

    def __init__(self, world: "World", role: str, instance: str) -> None:
        self.world = world
        self.role = role
        self.instance = instance
        self.bus: MemoryBus = world.broker.client(instance)
        self.controls: list[Cancel | Credit] = []
        self.heard = asyncio.Event()
        self.asks: list[Ask] = []
        self.offset = 0
        self.seqs: dict[tuple[int, int], int] = {}
        self.frozen = False
        self.subscriptions: list[Any] = []

    async def start(self) -> "Worker":
        await self.bus.subscribe(subjects.control(self.instance), self._on_control)
        await self.bus.subscribe(subjects.worker(self.role, self.instance), self._on_request)
        self.beat()
        return self

    def beat(self, **more: Any) -> None:
        beat = Beat(
            role=self.role, instance=self.instance, pid=1, metrics=f"http://127.0.0.1:1/{self.instance}", **more
        )
        self.world.ctx.rosters[self.role].on_beat(beat, time.monotonic())

    def kill(self) -> None:
        """Gone, as after kill -9: NATS answers 503 from now on."""
        self.bus.cut()

    def _on_control(self, _subject: str, reply: str, payload: bytes, _none: bool) -> None:
        if self.frozen:
            return
        if not payload:
            self.bus.publish(reply, b"")
            return
        self.controls.append(decode_control(payload))
        self.heard.set()

    def _on_request(self, _subject: str, _reply: str, payload: bytes, _none: bool) -> None:
        if self.frozen:
            return
        admit = decode_admit(payload)
        self.asks.append(admit.ask)
        self.world.admitted(admit.ask, self)

    async def wait_control(self, test: Callable[[Cancel | Credit], bool]) -> Cancel | Credit:
        """The first control message, past or to come, that `test` likes."""
        while True:
            for message in self.controls:
                if test(message):
                    return message
            self.heard.clear()
            async with asyncio.timeout(5):
                await self.heard.wait()

    async def cancelled(self) -> Cancel:
        message = await self.wait_control(lambda m: isinstance(m, Cancel))
        assert isinstance(message, Cancel)
        return message

    # ---- frames

    def send(self, ask: Ask, *frames: Frame) -> None:
        """One batch."""
        self.offset += sum(len(frame.data) for frame in frames if isinstance(frame, Delta))
        raw = [msgspec.Raw(encode(frame)) for frame in frames]
        batch = Batch(VERSION, self.role, self.instance, self.offset, raw)
        self.bus.publish(subjects.reply(ask.reply.role, ask.reply.instance), encode(batch))

    def _seq(self, ask: Ask) -> tuple[int, int, int]:
        key = (ask.reply.stream, ask.delivery)
        seq = self.seqs.get(key, 0)
        self.seqs[key] = seq + 1
        return (*key, seq)

    def accepted(self, ask: Ask, call: int = 1) -> Accepted:
        return Accepted(*self._seq(ask), self.instance, call)

    def refused(self, ask: Ask, holder: str, delivery: int) -> Refused:
        return Refused(*self._seq(ask), holder, delivery)

    def delta(self, ask: Ask, data: bytes, head: dict[str, str] | None = None) -> Delta:
        return Delta(*self._seq(ask), data, head)

    def end(self, ask: Ask, summary: Summary = SUMMARY) -> End:
        return End(*self._seq(ask), summary, HOPS)

    def failed(self, ask: Ask, error: HotpathError, head: dict[str, str] | None = None) -> Failed:
        return Failed(*self._seq(ask), error.body(), head, HOPS)


def event(text: str) -> bytes:
    """One chunk as a provider would send it, ready to write."""
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()


class World:
    """The ingress under test and its workers. `script(ask, provider)` says what the worker side does with a request."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.registry = FakeRegistry()
        self.workers: list[Worker] = []
        self.asks: asyncio.Queue[Ask] = asyncio.Queue()
        self.script: Callable[[Ask, Worker], None] = answer
        self.deaf = False  # the worker side takes requests and does nothing

    async def start(self, models: tuple[str, ...] = ("sim-fast", "vendor/model:v1@eu"), **env: str) -> "World":
        settings = environment.load({**ENV, **env})
        self.metrics = Metrics()
        self.server = MetricsServer(self.metrics, "127.0.0.1", 0, ADMIN)
        self.bus = self.broker.client("ingress")
        rosters = {role: Roster(role) for role in Ingress.watches}
        sender = Sender(self.bus, "ingress", "in1", rosters)
        catalog = SimpleNamespace(models={name: SimpleNamespace(name=name, owned_by="sim") for name in models}, epoch=7)
        self.ctx = Context(
            settings=settings,
            catalog=catalog,  # type: ignore[arg-type]
            bus=self.bus,
            state=SimpleNamespace(
                registry=self.registry,
                operations=None,
                clock=SimpleNamespace(now=lambda: int(time.monotonic() * 1000)),
                costs=self.registry.costs,
            ),  # type: ignore[arg-type]
            rosters=rosters,
            sender=sender,
            role="ingress",
            instance="in1",
            pid=4242,
            log=logging.getLogger("hotpath.ingress"),
            metrics=self.metrics,
            started_at=time.monotonic(),
            _server=self.server,
        )
        self.guardian = await self.add("guardian", "g1")
        self.routing = await self.add("routing", "r1")
        self.provider = await self.add("provider", "p1")
        await sender.start()
        self.ingress = Ingress()
        await self.ingress.start(self.ctx)
        self.bus._on_change = lambda connected: [listen(connected) for listen in self.ctx.bus_listeners]  # type: ignore[assignment]
        self.url = f"http://127.0.0.1:{self.ingress.port}"
        self._beats = asyncio.get_running_loop().call_later(0.3, self._beat)
        return self

    async def add(self, role: str, instance: str) -> Worker:
        worker = await Worker(self, role, instance).start()
        self.workers.append(worker)
        return worker

    def _beat(self) -> None:
        for worker in self.workers:
            if worker.bus.connected and not worker.frozen:
                worker.beat()
        self._beats = asyncio.get_running_loop().call_later(0.3, self._beat)

    def admitted(self, ask: Ask, guardian: Worker) -> None:
        """A guardian took a request: the scripted provider answers (or nobody does)."""
        _ = guardian
        self.asks.put_nowait(ask)
        if not self.deaf:
            self.script(ask, self.provider)

    async def ask(self) -> Ask:
        """The next request handed over."""
        async with asyncio.timeout(5):
            return await self.asks.get()

    async def close(self) -> None:
        self._beats.cancel()
        for worker in self.workers:
            if worker.role == "ingress":
                worker.beat(draining=True)  # what a failed test left open is not waited for
        for exchange in list(self.ingress._desk.exchanges.values()):
            exchange.leave()
        await self.ingress.drain()
        await self.server.close()


def answer(ask: Ask, provider: Worker) -> None:
    """The plainest worker side: text in three chunks, or a whole answer."""
    if not ask.stream:
        body = b'{"object":"chat.completion","choices":[]}'
        provider.send(ask, provider.accepted(ask), provider.delta(ask, body, HEAD), provider.end(ask))
        return
    summary = SUMMARY if ask.done == "inline" else msgspec.structs.replace(SUMMARY, payload=PAYLOAD)
    provider.send(ask, provider.accepted(ask), provider.delta(ask, event("a"), HEAD))
    provider.send(ask, provider.delta(ask, event("b")), provider.delta(ask, event("c")), provider.end(ask, summary))
