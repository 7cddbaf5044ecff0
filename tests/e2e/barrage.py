"""An open-loop load of mixed requests with known text and known times: what a fault cost whom can be told afterwards.

Open loop: the next request goes out when its time has come, however slow the answers are, as real clients do; a closed
loop would ask less just when something is wrong.
"""

import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

from msgspec import Struct

from tests.e2e.drive import Client, Seen
from tests.e2e.invariants import Asked, prompt
from tests.interop.target import TOOLS

RATE = 50.0
#: With LEDGER_LEASE_GRACE_MS=1000 every lease ends 11 s after its request began.
TIMEOUT_MS = 10_000


class Order(Struct, kw_only=True):
    """What to ask. `takes`: seconds the upstream needs by itself."""

    kind: str
    prompt: str
    takes: float = 0.0
    model: str = "sim-fast"
    body: dict[str, Any] = {}


def whole_fast(dice: random.Random) -> Order:
    """A whole answer at once."""
    return Order(kind="whole", prompt=prompt(dice.randrange(2, 30)))


def whole_slow(dice: random.Random) -> Order:
    """A whole answer that the model thinks about for 0.3 to 1.5 s."""
    delay = dice.randrange(300, 1500)
    return Order(kind="whole, slow", prompt=prompt(12, delay_ms=delay), takes=delay / 1000)


def short_stream(dice: random.Random) -> Order:
    """A stream that is over at once."""
    return Order(kind="stream", prompt=prompt(dice.randrange(2, 60)), body={"stream": True})


def slow_stream(dice: random.Random) -> Order:
    """A stream whose first token takes 0.2 to 1 s."""
    delay = dice.randrange(200, 1000)
    return Order(
        kind="stream, slow", prompt=prompt(20, delay_ms=delay), takes=delay / 1000, body={"stream": True}
    )  # fmt: skip


def paced_stream(dice: random.Random) -> Order:
    """A stream of 2 to 4 s."""
    chunks = dice.randrange(40, 80)
    return Order(
        kind="stream, paced", prompt=prompt(chunks, pace=50), takes=chunks * 0.05, body={"stream": True}
    )  # fmt: skip


def tools(dice: random.Random) -> Order:
    """Calls of tools, whole or streamed."""
    return Order(
        kind="tools", model="sim-tools", prompt=prompt(1, tools=dice.randrange(1, 4)),
        body={"tools": TOOLS, "stream": dice.random() < 0.5},
    )  # fmt: skip


MIX: list[tuple[int, Callable[[random.Random], Order]]] = [
    (34, whole_fast), (14, whole_slow), (22, short_stream), (8, slow_stream), (12, paced_stream), (10, tools),
]  # fmt: skip


class Shot(Struct):
    """One request and what came of it; `at` in monotonic seconds."""

    order: Order
    at: float
    seen: Seen

    @property
    def end(self) -> float:
        """When it was over."""
        return self.at + self.seen.took

    @property
    def first(self) -> float:
        """When its first event had reached the client; inf for a whole answer, or none."""
        return self.at + self.seen.first

    @property
    def beyond(self) -> float:
        """Seconds it took beyond what the upstream needed."""
        return self.seen.took - self.order.takes

    @property
    def asked(self) -> Asked:
        """For the checker."""
        return Asked(prompt=self.order.prompt, seen=self.seen, at=self.at)


class Barrage:
    """`async with Barrage(client, seed):` the load runs; at the end every answer is waited for."""

    def __init__(self, client: Client, dice: random.Random, rate: float = RATE, timeout_ms: int = TIMEOUT_MS) -> None:
        self.shots: list[Shot] = []
        self._client = client
        self._dice = dice
        self._rate = rate
        self._headers = {"X-Timeout-Ms": str(timeout_ms)}
        self._going = True
        self._open: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def open(self) -> int:
        """Requests without an answer yet."""
        return len(self._open)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._fire())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._going = False
        assert self._task is not None
        await self._task
        if self._open:
            await asyncio.gather(*self._open)

    async def _fire(self) -> None:
        weights, makers = [weight for weight, _ in MIX], [maker for _, maker in MIX]
        due = time.monotonic()
        while self._going:
            (maker,) = self._dice.choices(makers, weights)
            task = asyncio.create_task(self._one(maker(self._dice)))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            due += 1 / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _one(self, order: Order) -> None:
        at = time.monotonic()
        seen = await self._client.chat(order.prompt, model=order.model, headers=self._headers, **order.body)
        self.shots.append(Shot(order, at, seen))


def normal(shots: list[Shot], before: float) -> dict[str, float]:
    """The median time beyond the upstream's own, by kind, of what was over before the first fault."""
    found: dict[str, list[float]] = defaultdict(list)
    for shot in shots:
        if shot.end < before:
            found[shot.order.kind].append(shot.beyond)
    return {kind: statistics.median(times) for kind, times in found.items()}
