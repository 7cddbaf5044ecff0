"""The provider in this process: MemoryBus, a real Valkey, the real simulator, and the test as the asker."""

import asyncio
import contextlib
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from msgspec import Struct

from deploy.simulator.server import application
from deploy.simulator.wanted import Defaults
from shared import catalog, settings
from shared.bus.memory import Broker, MemoryBus
from shared.bus.memory_jetstream import MemoryJetStream
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.service import Context
from shared.state.ledger import Entry
from shared.state.redis import State
from shared.telemetry.metrics import Metrics
from shared.wire import subjects
from shared.wire.messages import (
    Accepted,
    Admission,
    Ask,
    Beat,
    Call,
    Cancel,
    Credit,
    Delta,
    End,
    Failed,
    Frame,
    Hop,
    Outcome,
    Plan,
    Price,
    Refused,
    ReplyTo,
    Step,
    decode_batch,
    decode_frame,
    decode_outcomes,
    encode,
)
from shared.wire.records import UsageBatch, UsageRecord, decode_stored
from workers.provider.call import Provider

SECRETS = {"GATEWAY_API_KEY": "g" * 32, "KEY_PEPPER": "p" * 32, "ADMIN_API_KEY": "a" * 32}
WAIT_S = 8.0
PRICE = Price(150_000_000, 75_000_000, 600_000_000)  # the simulator's
TERMINALS = (End, Failed, Refused)
LINEAR = {"CANCEL_DRAIN_MS": "250", "ROUTING_RETRY_BACKOFF_MS": "60"}


class Answer(Struct):
    """All frames of one delivery, in order, each checked: seq without gaps, one terminal."""

    frames: list[Frame]

    @property
    def body(self) -> bytes:
        return b"".join(frame.data for frame in self.frames if isinstance(frame, Delta))

    @property
    def head(self) -> dict[str, str]:
        found = [frame.head for frame in self.frames if isinstance(frame, Delta | Failed) and frame.head]
        assert len(found) == 1, found
        return found[0]

    @property
    def terminal(self) -> Frame:
        return self.frames[-1]

    @property
    def end(self) -> End:
        assert isinstance(self.terminal, End), self.terminal
        return self.terminal

    @property
    def failed(self) -> Failed:
        assert isinstance(self.terminal, Failed), self.terminal
        return self.terminal

    @property
    def calls(self) -> list[int]:
        return [frame.call for frame in self.frames if isinstance(frame, Accepted)]

    def chunks(self) -> list[dict[str, Any]]:
        events = self.body.split(b"\n\n")
        assert events.pop() == b""
        return [orjson.loads(event.removeprefix(b"data: ")) for event in events]

    def text(self) -> str:
        return "".join(c["delta"].get("content") or "" for chunk in self.chunks() for c in chunk["choices"])


class Asker:
    """Plays one ingress instance: takes frames, gives credit (unless told not to)."""

    def __init__(self, bus: MemoryBus, provider: str) -> None:
        self.bus = bus
        self.provider = provider
        self.instance = "asker" + secrets.token_hex(3)
        self.credits = True
        self.read = 0
        self.batches: list[int] = []  # their sizes
        self.frames: dict[tuple[int, int], list[Frame]] = {}
        self.taken: dict[tuple[int, int], int] = {}
        self.changed = asyncio.Event()

    async def start(self) -> None:
        await self.bus.subscribe(subjects.reply("ingress", self.instance), self._on_batch)

    def _on_batch(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        batch = decode_batch(payload)
        self.batches.append(len(payload))
        self.read = max(self.read, batch.offset)
        for raw in batch.frames:
            frame = decode_frame(raw)
            key = (frame.stream, frame.delivery)
            frames = self.frames.setdefault(key, [])
            assert frame.seq == len(frames), "a gap or a repeat"
            assert not frames or not isinstance(frames[-1], TERMINALS), "after the terminal"
            frames.append(frame)
            if isinstance(frame, Delta):
                assert len(frame.data) <= 32 * 1024
                self.taken[key] = self.taken.get(key, 0) + len(frame.data)
        if self.credits:
            self.give_credit()
        self.changed.set()

    def give_credit(self) -> None:
        streams = tuple((stream, delivery, taken) for (stream, delivery), taken in self.taken.items())
        self._control(Credit(role="ingress", instance=self.instance, read=self.read, streams=streams))

    def cancel(self, stream: int, delivery: int = 1) -> None:
        self._control(Cancel(role="ingress", instance=self.instance, stream=stream, delivery=delivery))

    def _control(self, message: Cancel | Credit) -> None:
        self.bus.publish(subjects.control(self.provider), encode(message))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def answer(self, stream: int, delivery: int = 1) -> Answer:
        key = (stream, delivery)
        await self.until(lambda: key in self.frames and isinstance(self.frames[key][-1], TERMINALS))
        return Answer(self.frames[key])

    async def deltas(self, stream: int, count: int, delivery: int = 1) -> None:
        key = (stream, delivery)
        await self.until(lambda: sum(isinstance(f, Delta) for f in self.frames.get(key, [])) >= count)


class Rig:
    """Everything at hand."""

    def __init__(self, ctx: Context, provider: Provider, broker: Broker, simulator: str) -> None:
        self.ctx = ctx
        self.provider = provider
        self.broker = broker
        self.simulator = simulator
        self.jetstream = MemoryJetStream(broker)
        self.outside = broker.client("outside")
        self.asker = Asker(self.outside, ctx.instance)
        self.outcomes: list[Outcome] = []
        self._stream = 0
        self.http = aiohttp.ClientSession()

    async def start(self) -> None:
        await self.asker.start()
        await self.outside.subscribe(subjects.OUTCOME, self._on_outcomes)
        await self.outside.subscribe(subjects.control(self.ctx.instance), self._on_control)
        await self.provider.start(self.ctx)

    def _on_outcomes(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        self.outcomes += decode_outcomes(payload).calls

    def _on_control(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        from shared.wire.messages import decode_control  # noqa: PLC0415

        self.provider.control(decode_control(payload))

    def beat(self) -> None:
        beat = Beat(role="ingress", instance=self.asker.instance)
        self.ctx.rosters["ingress"].on_beat(beat, time.monotonic())

    # ---- the simulator

    async def bill(self, rid: str) -> list[dict[str, Any]]:
        async with self.http.get(f"{self.simulator}/_sim/bill", params={"request_id": rid}) as response:
            calls: list[dict[str, Any]] = (await response.json())["calls"]
            return calls

    async def fault(self, fault: dict[str, Any], times: int = 1, **match: Any) -> None:
        rule = {"fault": fault, "times": times, "match": match}
        async with self.http.post(f"{self.simulator}/_sim/faults", json=rule) as response:
            assert response.status < 300, await response.text()

    async def sim(self, verb: str, path: str, **params: Any) -> Any:
        url = f"{self.simulator}/_sim/{path}"
        async with self.http.request(verb, url, params=params if verb == "GET" else None, json=params or None) as found:
            return await found.json(content_type=None)

    # ---- the second copy

    def published(self) -> list[UsageRecord]:
        """Every usage record in the stream."""
        found: list[UsageRecord] = []
        for message in self.jetstream.streams[subjects.USAGE_STREAM].messages.values():
            stored = decode_stored(message.payload)
            assert isinstance(stored, UsageBatch)
            found += stored.records
        return found

    # ---- requests

    async def send(
        self, prompt: str = "hi", *, stream: bool = True, steps: tuple[Step, ...] = (Step("sim", "sim-fast"),),
        max_calls: int = 3, reserved: bool = True, cap: int = 1000, extra: dict[str, Any] | None = None,
        wait_s: float = 0, age_ms: int = 0, amount: int = 1_000_000, hard: bool = False, price: Price = PRICE,
        prices: dict[str, Price] | None = None, **fields: Any,
    ) -> Ask:  # fmt: skip
        """Reserve as a guardian does and hand the request to the provider."""
        request = self.ask(prompt, stream=stream, extra=extra or {}, **fields)
        admission = Admission(
            reserved=reserved, amount=amount, estimate=30_000_000, input_tokens=100, output_cap=cap, price=price,
            overhead_us=1234, hard=hard, prices=prices or {},
        )  # fmt: skip
        if reserved and request.delivery == 1:
            clock = self.ctx.state.clock
            found = await self.ctx.state.ledger.reserve(
                tenant=request.tenant, rid=request.rid, delivery=1, amount=admission.amount,
                deadline=request.deadline or clock.now() + 30_000, not_after=clock.now() + 1000, key=request.key,
            )  # fmt: skip
            assert found.status == "ok"
        await asyncio.sleep(wait_s)
        at = self.ctx.state.clock.now() - age_ms
        hops = tuple(Hop(role, role, 1, at) for role in ("ingress", "guardian", "routing"))
        self.publish(Call(ask=request, admission=admission, plan=Plan(steps=steps, max_calls=max_calls), hops=hops))
        return request

    def publish(self, message: Call) -> None:
        self.outside.publish(subjects.worker("provider", self.ctx.instance), encode(message))

    def ask(self, prompt: str, *, stream: bool, extra: dict[str, Any], **fields: Any) -> Ask:
        self._stream += 1
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "stream": stream, **extra}
        given: dict[str, Any] = {
            "rid": secrets.token_hex(16),
            "tenant": "default",
            "key": "bootstrap",
            "reply": ReplyTo("ingress", self.asker.instance, self._stream),
            "model": "m",
            "stream": stream,
            "deadline": self.ctx.state.clock.now() + 30_000,
            "body": orjson.dumps(body),
        }
        return Ask(**{**given, **fields})

    async def answer(self, request: Ask) -> Answer:
        return await self.asker.answer(request.reply.stream, request.delivery)

    async def entries(self, rid: str) -> list[Entry]:
        """The ledger's calls of a request."""
        return [entry for entry in await self.ctx.state.ledger.entries(tenant="default") if entry.rid == rid]

    async def settled(self, rid: str) -> list[Entry]:
        """The same, when none is open any more."""
        async with asyncio.timeout(WAIT_S):
            while True:
                entries = await self.entries(rid)
                if entries and all(entry.state in ("settled", "unconfirmed", "voided") for entry in entries):
                    return entries
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def simulator() -> AsyncIterator[str]:
    """The real one, in this process."""
    runner = web.AppRunner(application(Defaults()), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def catalogue(url: str, other: str = "") -> catalog.Catalog:
    """Endpoints `sim` and `two` (the same simulator under another name), `other` (a scripted server), `gone`."""
    rows = {
        "sim": f"{url}/v1",
        "two": f"{url}/e/two/v1",
        "other": f"{other or url}/v1",
        "gone": "http://127.0.0.1:1/v1",
    }
    text = "".join(
        f'[[endpoints]]\nid = "{name}"\nprovider = "openai"\nbase_url = "{base}"\nallow_private = true\n'
        'api_key_env = "SIM_KEY"\n'
        for name, base in rows.items()
    )
    steps = ", ".join(
        f'{{ endpoint = "{name}", model = "{model}" }}'
        for name in rows
        for model in ("sim-fast", "sim-paced", "sim-tools")
    )
    text += f'[[models]]\nname = "m"\nendpoints = [{steps}]\nmax_output_tokens = 100000\nencoding = "o200k"\n'
    text += 'price = { input = "0.15", cached_input = "0.075", output = "0.60" }\n'
    return catalog.parse(text.encode(), {"SIM_KEY": "sim-key-0123456789"}, Path())


@contextlib.asynccontextmanager
async def running(valkey_url: str, *, other: str = "", drain: bool = True, **env: str) -> AsyncIterator[Rig]:
    """A started provider; drained at the end, with nothing left open."""
    spool = tempfile.TemporaryDirectory(prefix="hotpath-spool-")
    config = settings.load({**SECRETS, **LINEAR, "REDIS_URL": valkey_url, "SPOOL_DIR": spool.name, **env})
    state = await State.connect(config)
    broker = Broker()
    rosters = {name: Roster(name) for name in ("ingress", "loadgen")}
    bus = broker.client("provider")
    instance = "prov" + secrets.token_hex(4)
    async with simulator() as url:
        ctx = Context(
            settings=config, catalog=catalogue(url, other), bus=bus, state=state, rosters=rosters,
            sender=Sender(bus, "provider", instance, rosters), role="provider", instance=instance, pid=4242,
            log=logging.getLogger("hotpath.provider"), metrics=Metrics(), started_at=time.monotonic(),
        )  # fmt: skip
        rig = Rig(ctx, Provider(), broker, url)
        await rig.start()
        try:
            yield rig
        finally:
            if drain:
                await rig.provider.drain()
                assert rig.provider.in_flight() == 0
                assert rig.provider.mux.open_channels == 0
            await rig.http.close()
            await state.close()
            spool.cleanup()
