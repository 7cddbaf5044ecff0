"""What one request costs guardian and routing themselves: CPU per message, with everything behind them stubbed.

    python -m tests.bench.workers [--prompt 2048] [--messages 20000]

Not a test. Redis, NATS and the event loop's wake-ups are not in these figures (tests/bench/ledger.py has the ledger);
a task per request, decode, registry, token count, prices, encode and the sender are.
"""

import argparse
import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import uvloop

from shared import catalog, settings
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.service import Context, Role
from shared.state.base import Principal, Reserved
from shared.telemetry.metrics import Metrics
from shared.wire import openai, subjects
from shared.wire.messages import Admit, Ask, Beat, Hop, ReplyTo, encode
from tests.workers.guardian_rig import CATALOG, SECRETS
from workers.guardian.admit import Guardian
from workers.routing.route import Routing

Deliver = Callable[[str, str, bytes, bool], None]


class NoBus:
    """Keeps the subscriptions and the last thing published."""

    connected = True
    max_payload = 2**21

    def __init__(self) -> None:
        self.handlers: dict[str, Deliver] = {}
        self.last = b""

    def publish(self, _subject: str, payload: bytes, _reply: str = "") -> None:
        """Note it."""
        self.last = payload

    async def subscribe(self, pattern: str, handler: Deliver, _queue: str = "") -> None:
        """Note it."""
        self.handlers[pattern] = handler


class Yes:
    """A ledger, registry and clock that say yes."""

    fresh = ready = True

    async def reserve(self, **fields: Any) -> Reserved:
        """Reserved."""
        return Reserved(status="ok", amount=fields["amount"])

    async def sweep(self, _tenants: Iterable[str]) -> int:
        """Nothing is due."""
        return 0

    def lookup(self, tenant: str, key: str) -> Principal:
        """Known."""
        return Principal(tenant=tenant, key=key, tenant_name=tenant, limited=True)

    def tenants(self) -> list[str]:
        """Nobody."""
        return []

    def now(self) -> int:
        """Milliseconds."""
        return time.monotonic_ns() // 1_000_000

    def look(self, _endpoint: str) -> None:
        """Closed."""


async def started(role: Role, follower: str) -> tuple[NoBus, Deliver]:
    """The role's bus and its handler."""
    bus, yes = NoBus(), Yes()
    rosters = {follower: Roster(follower)}
    for number in range(3):
        rosters[follower].on_beat(Beat(role=follower, instance=f"i{number}", capacity=9), time.monotonic() + 1e6)
    ctx = Context(
        settings=settings.load(SECRETS),
        catalog=catalog.parse(CATALOG.encode(), {}, Path()),
        bus=cast("Any", bus),
        state=cast("Any", SimpleNamespace(ledger=yes, registry=yes, clock=yes, circuits=yes)),
        rosters=rosters,
        sender=Sender(cast("Any", bus), role.name, "self", rosters),
        role=role.name,
        instance="self",
        pid=1,
        log=logging.getLogger("bench"),
        metrics=Metrics(),
        started_at=0.0,
    )
    await role.start(ctx)
    return bus, bus.handlers[subjects.worker(role.name, "self")]


def request(prompt: int) -> bytes:
    """A request as the ingress hands it over."""
    words = ("the quick brown fox jumps over the lazy dog " * (prompt // 44 + 1))[:prompt]
    body = {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": words}]}
    parsed = openai.parse_chat(orjson.dumps({**body, "max_tokens": 200, "stream": True}))
    ask = Ask(
        rid=secrets.token_hex(16),
        tenant="t",
        key="k",
        reply=ReplyTo("ingress", "asker", 7),
        model=parsed.model,
        stream=True,
        max_output=parsed.max_output,
        deadline=time.monotonic_ns() // 1_000_000 + 500_000,
        body=parsed.body,
    )
    return encode(Admit(ask=ask, hops=(Hop("ingress", "i", 1, 1, 1),)))


async def measure(deliver: Deliver, payload: bytes, messages: int, in_flight: int = 64) -> float:
    """Microseconds of CPU a message."""
    began = time.process_time()
    for _ in range(messages // in_flight):
        for _ in range(in_flight):
            deliver("", "", payload, False)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return (time.process_time() - began) / messages * 1e6


async def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=2048, help="bytes of prompt")
    parser.add_argument("--messages", type=int, default=20_000)
    options = parser.parse_args()
    payload = request(options.prompt)
    guardian, routing = Guardian(), Routing()
    guardian_bus, to_guardian = await started(guardian, "routing")
    _, to_routing = await started(routing, "provider")
    for _ in range(3):
        spent = await measure(to_guardian, payload, options.messages)
        print(f"guardian {spent:6.1f} us", end="   ")
        print(f"routing {await measure(to_routing, guardian_bus.last, options.messages):6.1f} us")
    parse = openai.parse_chat
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * options.prompt}]})
    began = time.process_time()
    for _ in range(options.messages):
        parse(body)
    print(f"parse_chat {(time.process_time() - began) / options.messages * 1e6:6.1f} us for {len(body)} bytes")
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


if __name__ == "__main__":
    uvloop.run(main())
