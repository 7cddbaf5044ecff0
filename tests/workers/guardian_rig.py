"""One worker in this process: MemoryBus, a real Valkey, and the test as everybody else on the bus."""

import asyncio
import contextlib
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import orjson

from shared import catalog, settings
from shared.bus.memory import Broker, MemoryBus
from shared.bus.memory_jetstream import MemoryJetStream
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.core.overload import Queue
from shared.service import Context, Role
from shared.state.base import StateUnavailable
from shared.state.redis import State
from shared.telemetry.metrics import Metrics
from shared.wire import subjects
from shared.wire.messages import Admit, Ask, Beat, Failed, ReplyTo, decode_batch, decode_frame, encode

CATALOG = """
[[endpoints]]
id = "one"
provider = "openai"
base_url = "https://one.example/v1"
[[endpoints]]
id = "two"
provider = "openai"
base_url = "https://two.example/v1"
[[models]]
name = "m"
endpoints = [
    { endpoint = "one", model = "m-1" },
    { endpoint = "two", model = "m-2", price = { input = "0.4", output = "4" } },
]
max_output_tokens = 1000
price = { input = "1", cached_input = "0.5", output = "10" }
[[models]]
name = "free"
endpoints = [{ endpoint = "one", model = "m-1" }]
max_output_tokens = 1000
price = "free"
"""
SECRETS = {"GATEWAY_API_KEY": "g" * 32, "KEY_PEPPER": "p" * 32, "ADMIN_API_KEY": "a" * 32}
WAIT_S = 3.0


class Away:
    """A ledger whose Redis is away: every call fails, and is noted."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*_args: Any, **_fields: Any) -> Any:
            self.calls.append(name)
            raise StateUnavailable("away")

        return call


class Rig:
    """A started role, who listens behind it, and who is answered."""

    def __init__(self, ctx: Context, role: Role, broker: Broker) -> None:
        self.ctx = ctx
        self.role = role
        self.broker = broker
        self.jetstream = MemoryJetStream(broker)
        self.outside: MemoryBus = broker.client("outside")
        self.forwarded: asyncio.Queue[bytes] = asyncio.Queue()
        self.failed: asyncio.Queue[Failed] = asyncio.Queue()

    async def start(self, follower: str) -> None:
        """Let a `follower` instance live, listen to what is answered, start the role."""
        await self.outside.subscribe(
            subjects.worker(follower, "next"), lambda _s, _r, p, _n: self.forwarded.put_nowait(p)
        )
        for asker in ("ingress", "loadgen"):
            await self.outside.subscribe(subjects.reply(asker, "asker"), self._on_batch)
        self.beat(follower)
        await self.ctx.sender.start()
        await self.role.start(self.ctx)

    def beat(self, follower: str, instance: str = "next") -> None:
        """An instance of the following role says that it lives."""
        self.ctx.rosters[follower].on_beat(Beat(role=follower, instance=instance, capacity=10), time.monotonic())

    def _on_batch(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        for raw in decode_batch(payload).frames:
            frame = decode_frame(raw)
            assert isinstance(frame, Failed)
            self.failed.put_nowait(frame)

    async def next_forwarded(self) -> bytes:
        """What the role handed on."""
        return await asyncio.wait_for(self.forwarded.get(), WAIT_S)

    async def next_failed(self) -> Failed:
        """What the role told the asker."""
        return await asyncio.wait_for(self.failed.get(), WAIT_S)

    def to_role(self, payload: bytes) -> None:
        """Publish to the role's own subject, as its peers do."""
        self.outside.publish(subjects.worker(self.role.name, self.ctx.instance), payload)

    def direct(self, payload: bytes) -> None:
        """Publish to the admit subject, as loadgen does."""
        self.outside.publish(subjects.ADMIT, payload)


@contextlib.asynccontextmanager
async def running(role: Role, valkey_url: str, follower: str, **env: str) -> AsyncIterator[Rig]:
    """A started role; drained at the end."""
    spool = tempfile.TemporaryDirectory(prefix="hotpath-spool-")
    config = settings.load({**SECRETS, "REDIS_URL": valkey_url, "SPOOL_DIR": spool.name, **env})
    state = await State.connect(config)
    broker = Broker()
    bus = broker.client(role.name)
    rosters = {follower: Roster(follower)}
    ctx = Context(
        settings=config,
        catalog=catalog.parse(CATALOG.encode(), {}, Path()),
        bus=bus,
        state=state,
        rosters=rosters,
        sender=Sender(bus, role.name, "self", rosters),
        role=role.name,
        instance="self",
        pid=1,
        log=logging.getLogger(f"hotpath.{role.name}"),
        metrics=Metrics(),
        started_at=time.monotonic(),
    )
    rig = Rig(ctx, role, broker)
    await rig.start(follower)
    try:
        yield rig
    finally:
        await role.drain()
        await state.close()
        spool.cleanup()


def without_redis(rig: Rig) -> Away:
    """Take the ledger away from a role that is running."""
    away = Away()
    cast("Any", rig.ctx.state).ledger = away
    cast("Any", rig.role)._behind._ledger = away
    return away


def standing() -> Queue:
    """A process's queue in which everybody has waited too long for a while."""

    class Standing(Queue):
        def begin(self, since: float, now: float) -> bool:
            self.shed += 1
            assert 0 <= now - since < WAIT_S  # of one clock
            return False

    return Standing()


def ask(tenant: str, key: str, **fields: Any) -> Ask:
    """A request as the ingress hands it over."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hello world"}]}
    given: dict[str, Any] = {
        "rid": secrets.token_hex(16),
        "tenant": tenant,
        "key": key,
        "reply": ReplyTo("ingress", "asker", 7),
        "model": "m",
        "max_output": 100,
        "body": orjson.dumps(body),
    }
    return Ask(**{**given, **fields})


def admit(request: Ask) -> bytes:
    """Its message."""
    return encode(Admit(ask=request))
