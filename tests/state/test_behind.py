"""What waits for Redis behind the answer: kept, tried, bounded, and never lost without a word (DESIGN 5, faults 44)."""

import asyncio
import logging
from typing import Any, cast

import pytest

from shared.state import behind as module
from shared.state.base import Ledger, NotApplied, StateUnavailable
from shared.state.behind import Behind, Settle
from shared.wire.messages import Ask, ReplyTo


class Redis:
    """A ledger that takes nothing, or everything, or all but one tenant's; every try is noted."""

    def __init__(self) -> None:
        self.away: StateUnavailable | None = NotApplied("away")
        self.damaged = ""
        self.tried: list[tuple[str, str]] = []
        self.taken: list[tuple[str, str]] = []
        self.at_once = 0
        self._now = 0

    async def _call(self, kind: str, tenant: str, rid: str) -> str:
        self._now += 1
        self.at_once = max(self.at_once, self._now)
        self.tried.append((kind, rid))
        await asyncio.sleep(0)
        self._now -= 1
        if self.away is not None:
            raise self.away
        if tenant == self.damaged:
            raise NotApplied("a balance is damaged")
        self.taken.append((kind, rid))
        return "settled"

    async def settle(self, *, tenant: str, rid: str, **_: Any) -> str:
        return await self._call("settle", tenant, rid)

    async def void(self, *, tenant: str, rid: str, **_: Any) -> str:
        return await self._call("void", tenant, rid)


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Redis:
    """Pauses are short."""
    monkeypatch.setattr(module, "PAUSE_FIRST_S", 0.001)
    monkeypatch.setattr(module, "PAUSE_LAST_S", 0.002)
    return Redis()


def behind(redis: Redis, tombstone_ms: int = 600_000) -> Behind:
    return Behind(cast("Ledger", redis), logging.getLogger("hotpath.test"), tombstone_ms=tombstone_ms)


def settle(number: int, tenant: str = "t") -> Settle:
    return Settle(tenant, f"{number:032x}", 1, 100, estimated=False, key="k", user="", day=0, tokens=0)


def ask(number: int) -> Ask:
    return Ask(rid=f"{number:032x}", tenant="t", key="k", reply=ReplyTo("ingress", "i", 1), body=b"")


async def until_tried(redis: Redis, count: int) -> None:
    async with asyncio.timeout(5):
        while len(redis.tried) < count:
            await asyncio.sleep(0.001)


async def test_it_is_tried_until_it_is_taken(redis: Redis) -> None:
    """However long Redis is away: no number of tries ends it. Then each exactly once, and no task is left."""
    waiting, before = behind(redis), len(asyncio.all_tasks())
    for number in range(100):
        waiting.settle(settle(number), NotApplied("away"))
    waiting.void(ask(200))
    assert (waiting.settles, waiting.under_way) == (100, 101)
    await until_tried(redis, 1000)
    assert (waiting.settles, waiting.given_up) == (100, 0)
    redis.away = None
    await waiting.drain(5)
    assert sorted(redis.taken) == sorted([*(("settle", f"{n:032x}") for n in range(100)), ("void", f"{200:032x}")])
    assert (waiting.settles, waiting.under_way, waiting.given_up) == (0, 0, 0)
    assert redis.at_once <= module.AT_ONCE
    assert len(asyncio.all_tasks()) == before


async def test_one_that_is_refused_for_ever_does_not_stop_the_others(redis: Redis) -> None:
    waiting = behind(redis)
    redis.away, redis.damaged = None, "bad"
    for number in range(module.AT_ONCE):
        waiting.settle(settle(number, "bad"), NotApplied("damaged"))
    for number in range(1000, 1010):
        waiting.settle(settle(number), NotApplied("away"))
    async with asyncio.timeout(5):
        while len(redis.taken) < 10 or waiting.settles > module.AT_ONCE:
            await asyncio.sleep(0.001)
    assert waiting.settles == module.AT_ONCE
    await waiting.drain(0)


async def test_what_may_have_been_applied_is_not_tried_beyond_its_tombstone(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Later it would be posted a second time; one that was certainly never applied has no such end."""
    waiting = behind(redis, tombstone_ms=50)
    waiting.settle(settle(1), StateUnavailable("no answer in time"))
    waiting.settle(settle(2), NotApplied("not connected"))
    await asyncio.sleep(0.1)
    await until_tried(redis, len(redis.tried) + 3)
    assert (waiting.settles, waiting.given_up) == (1, 1)
    [line] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert (line.rid, line.call, line.cost_nano_usd) == (f"{1:032x}", 1, 100)  # type: ignore[attr-defined]
    redis.away = None
    await waiting.drain(5)
    assert redis.taken == [("settle", f"{2:032x}")]


async def test_the_bounds(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Voids beyond theirs are left to the lease; settlements beyond theirs are not begun at all (`full`)."""
    monkeypatch.setattr(module, "MAX_VOIDS", 3)
    monkeypatch.setattr(module, "MAX_SETTLES", 5)
    waiting = behind(redis)
    for number in range(4):
        waiting.void(ask(number))
    assert (waiting.under_way, waiting.given_up) == (3, 1)
    for number in range(3):
        waiting.settle(settle(number), NotApplied("away"))
    assert not waiting.full(1)
    assert waiting.full(2)
    monkeypatch.setattr(module, "VOID_S", 0.0)
    await waiting.drain(0)


async def test_a_drain_writes_down_what_is_left(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing goes without a word: the amounts are in the log when the process must end before Redis is back."""
    waiting = behind(redis)
    for number in range(3):
        waiting.settle(settle(number), NotApplied("away"))
    waiting.void(ask(9))
    await waiting.drain(0.02)
    lines = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert {line.rid for line in lines} == {f"{n:032x}" for n in range(3)}  # type: ignore[attr-defined]
    assert (waiting.given_up, waiting.settles, waiting.under_way) == (4, 0, 0)
    await waiting.drain(0.02)
