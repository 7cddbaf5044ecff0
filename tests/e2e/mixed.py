"""The mixed load of the money test: what is asked, what is expected of it, and a driver with bounded concurrency."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from msgspec import Struct

from tests.e2e.drive import Client, Seen
from tests.interop.target import TOOLS


class Case(Struct, kw_only=True):
    """One request. `cut`: the upstream breaks it off; `leaves`: the client may go before the end."""

    kind: str
    prompt: str
    model: str = "sim-fast"
    body: dict[str, Any] = {}
    leave_after: float | None = None
    leave_at: int | None = None
    cut: bool = False

    @property
    def leaves(self) -> bool:
        """Whether this client may leave before the end."""
        return self.leave_after is not None or self.leave_at is not None


def _whole(dice: random.Random) -> Case:
    cached = dice.choice(("", "", f" cached={dice.randrange(1, 10)}"))
    return Case(kind="whole", prompt=f"[[sim chunks={dice.randrange(1, 60)}{cached}]]")


def _streamed(dice: random.Random) -> Case:
    options = dice.choice(({}, {"stream_options": {"include_usage": True}}))
    prompt = f"[[sim chunks={dice.randrange(1, 120)} mixed={dice.randrange(2)}]]"
    return Case(kind="streamed", prompt=prompt, body={"stream": True, **options})


def _choices(dice: random.Random) -> Case:
    body = {"n": dice.randrange(2, 5), "stream": dice.random() < 0.5, "max_tokens": 20}
    return Case(kind="several choices", prompt=f"[[sim chunks={dice.randrange(10, 30)}]]", body=body)


def _tools(dice: random.Random) -> Case:
    body: dict[str, Any] = {"tools": TOOLS, "stream": dice.random() < 0.5}
    prompt = f"[[sim tools={dice.randrange(1, 5)} interleave={dice.randrange(2)}]]"
    return Case(kind="tools", model="sim-tools", prompt=prompt, body=body)


def _refused_upstream(dice: random.Random) -> Case:
    status = dice.choice((400, 401, 404, 422, 429, 500, 503))
    return Case(kind="error before", prompt=f"[[sim status={status}]]", body={"stream": dice.random() < 0.5})


def _refused_here(dice: random.Random) -> Case:
    body: dict[str, Any] = dice.choice(({"max_tokens": -1}, {"stream": "true"}, {"messages": 5}, {"n": 0}))
    return Case(kind="refused here", prompt="x", body=body)


def _cut(dice: random.Random) -> Case:
    fault = dice.choice(("cut_after", "malformed_after", "error_after"))
    prompt = f"[[sim chunks={dice.randrange(40, 80)} {fault}={dice.randrange(40)}]]"
    return Case(kind="error during", prompt=prompt, body={"stream": True}, cut=True)


def _cut_whole(dice: random.Random) -> Case:
    return Case(kind="error during, whole", prompt=f"[[sim chunks={dice.randrange(4, 40)} cut_after=1]]", cut=True)


def _left_stream(dice: random.Random) -> Case:
    pace = dice.choice((1, 3, 10))
    prompt = f"[[sim chunks={dice.randrange(100, 300)} pace={pace}]]"
    return Case(kind="left, stream", prompt=prompt, body={"stream": True}, leave_at=dice.randrange(1, 30_000))


def _left_early(dice: random.Random) -> Case:
    prompt = f"[[sim chunks={dice.randrange(50, 100)} pace=5]]"
    return Case(
        kind="left, any time", prompt=prompt, body={"stream": dice.random() < 0.5}, leave_after=dice.random() * 0.4
    )


_MIX: list[tuple[int, Callable[[random.Random], Case]]] = [
    (34, _whole), (24, _streamed), (3, _choices), (11, _tools), (6, _refused_upstream), (3, _refused_here),
    (7, _cut), (2, _cut_whole), (5, _left_stream), (5, _left_early),
]  # fmt: skip


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` cases in a random order that the seed repeats."""
    dice = random.Random(seed)
    weights, makers = zip(*_MIX, strict=True)
    for maker in dice.choices(makers, weights, k=count):
        yield maker(dice)


async def run(client: Client, wanted: Iterator[Case], concurrency: int) -> AsyncIterator[tuple[Case, Seen]]:
    """Ask everything, `concurrency` at a time; each pair as it is done."""
    done: asyncio.Queue[tuple[Case, Seen] | None] = asyncio.Queue()

    async def worker() -> None:
        for case in wanted:
            seen = await client.chat(
                case.prompt, model=case.model, leave_after=case.leave_after, leave_at=case.leave_at,
                headers={"X-Timeout-Ms": "10000"}, **case.body,
            )  # fmt: skip
            await done.put((case, seen))
        await done.put(None)

    workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
    try:
        left = concurrency
        while left:
            pair = await done.get()
            if pair is None:
                left -= 1
            else:
                yield pair
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
