"""The ledger on a Redis that is slow, full, read-only, forgetful or gone (faults 42-50, DESIGN 5)."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from deploy import servers
from shared.state.base import Reserved, StateUnavailable
from shared.state.redis import State
from tests.state.conftest import Connect
from tests.state.rig import Money, new_rid

pytestmark = pytest.mark.alone  # each answer has its time


async def timed(call: Awaitable[object]) -> tuple[float, object]:
    """Seconds until it was refused, or its answer."""
    began = time.monotonic()
    try:
        answer = await call
    except StateUnavailable as error:
        answer = error
    return time.monotonic() - began, answer


async def until_available(state: State, within: float = 2.0) -> float:
    began = time.monotonic()
    async with asyncio.timeout(within):
        while not (state.available and await state.ping()):
            await asyncio.sleep(0.005)
    return time.monotonic() - began


@pytest.mark.usefixtures("real_timeouts")
async def test_a_paused_redis_is_refused_in_time_then_at_once_then_back(own_valkey: str, connect: Connect) -> None:
    """CLIENT PAUSE 2 s: each answer within its timeout, the gate fails fast, nothing stale runs, recovery is quick."""
    state = await connect(own_valkey)
    money, rid = Money(state, "paused"), new_rid()
    await money.reserve(rid)
    await money.raw("CLIENT", "PAUSE", 2000, "ALL")
    took, answer = await timed(money.settle(rid))
    assert isinstance(answer, StateUnavailable)
    assert 0.140 < took < 0.250
    for _ in range(2):
        not_after = state.clock.now() + 100
        reserve = state.ledger.reserve(
            tenant="paused",
            rid=new_rid(),
            delivery=1,
            amount=5,
            deadline=not_after + 30_000,
            not_after=not_after,
            key="k",
        )
        took, answer = await timed(reserve)
        assert isinstance(answer, StateUnavailable)
        assert 0.090 < took < 0.250  # D4: 503 within 250 ms
    assert not state.available
    took, answer = await timed(money.reserve(new_rid()))
    assert isinstance(answer, StateUnavailable)
    assert took < 0.010
    assert await state.ping() is False
    await until_available(state, within=4.0)
    # the reserves ran late and wrote nothing; the settle, which has none, did its work unless the connection was
    # given up before (1.5 s of silence): either way it may be sent again
    assert await money.settle(rid) in {"settled", "duplicate"}
    assert await money.held() == (60, 0, 0)


@pytest.mark.usefixtures("real_timeouts")
async def test_a_frozen_redis_that_thaws(tmp_path: Path, connect: Connect) -> None:
    """SIGSTOP (faults 44): no hang, and back within 2 s of its return."""
    port = servers.free_port()
    with servers.running(servers.valkey_command(tmp_path / "valkey", port), port, tmp_path / "log") as process:
        state = await connect(f"redis://127.0.0.1:{port}/0")
        money = Money(state, "frozen")
        await money.reserve(new_rid())
        os.kill(process.pid, signal.SIGSTOP)
        try:
            results = await asyncio.gather(*(timed(money.reserve(new_rid())) for _ in range(100)))
            assert all(isinstance(answer, StateUnavailable) and took < 0.25 for took, answer in results)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert await until_available(state) < 0.5
        assert (await money.reserve(new_rid())).status == "ok"


@pytest.mark.usefixtures("real_timeouts")
async def test_a_killed_redis_that_comes_back(tmp_path: Path, connect: Connect) -> None:
    """Faults 42: refused at once while it is away, reconnected within 2 s, what the AOF kept is there."""
    port, data = servers.free_port(), tmp_path / "valkey"
    command = servers.valkey_command(data, port)
    with servers.running(command, port, tmp_path / "log") as process:
        state = await connect(f"redis://127.0.0.1:{port}/0")
        money, rid = Money(state, "killed"), new_rid()
        await money.raw("CONFIG", "SET", "appendfsync", "always")
        await money.reserve(rid)
        process.kill()
        process.wait()
        async with asyncio.timeout(1):
            while state.available:
                await asyncio.sleep(0.005)
        took, answer = await timed(money.settle(rid))
        assert isinstance(answer, StateUnavailable)
        assert took < 0.010
    with servers.running(command, port, tmp_path / "log"):
        await until_available(state)
        assert await money.settle(rid) == "settled"
        await state.close()


async def test_scripts_flushed_under_load_are_loaded_again(own_valkey: str, connect: Connect) -> None:
    """Faults 49: no error, nothing twice."""
    money = Money(await connect(own_valkey), "flushed")

    async def request() -> None:
        rid = new_rid()
        assert await money.reserve(rid) == Reserved(status="ok", amount=100)
        assert (await money.dispatch(rid)).status == "won"
        assert await money.settle(rid) == "settled"

    async def flush() -> None:
        for _ in range(5):
            await money.raw("SCRIPT", "FLUSH")
            await asyncio.sleep(0.01)

    await asyncio.gather(flush(), *(request() for _ in range(500)))
    assert await money.held() == (500 * 60, 0, 0)
    await money.raw("SCRIPT", "FLUSH")
    await money.raw("CONFIG", "RESETSTAT")
    await asyncio.gather(*(money.reserve(new_rid()) for _ in range(50)))
    stats = await money.raw("INFO", "commandstats")
    assert b"cmdstat_script|load:calls=1," in stats  # one load served them all, and none sent the whole text
    assert b"cmdstat_eval:" not in stats


async def test_a_full_redis_still_settles_and_voids(own_valkey: str, connect: Connect) -> None:
    """Faults 46: with noeviction and no memory new reserves are refused, settle, void and expire work (allow-oom)."""
    state = await connect(own_valkey)
    money, first, second = Money(state, "full"), new_rid(), new_rid()
    for rid in (first, second):
        await money.reserve(rid)
    await money.dispatch(first)
    await money.raw("CONFIG", "SET", "maxmemory", 1)
    for call in (money.reserve(new_rid()), money.dispatch(second), money.topup(first, 2)):
        with pytest.raises(StateUnavailable, match="OOM"):
            await call
    assert await money.settle(first) == "settled"
    assert await money.void(second) == "voided"
    assert await money.expire() == 0
    assert await money.held() == (60, 0, 0)
    assert state.available  # an error reply is an answer: the gate stays open
    await money.raw("CONFIG", "SET", "maxmemory", 0)
    assert (await money.reserve(new_rid())).status == "ok"


async def test_a_read_only_redis_is_typed(own_valkey: str, connect: Connect) -> None:
    """Faults 47: READONLY (failover) and NOREPLICAS are StateUnavailable with their kind, not a crash."""
    money = Money(await connect(own_valkey), "readonly")
    await money.reserve(new_rid())
    await money.raw("REPLICAOF", "127.0.0.1", servers.free_port())
    for call in (money.reserve(new_rid()), money.settle(new_rid())):
        with pytest.raises(StateUnavailable, match="READONLY"):
            await call
    await money.raw("REPLICAOF", "NO", "ONE")
    await money.raw("CONFIG", "SET", "min-replicas-to-write", 1)
    with pytest.raises(StateUnavailable, match="NOREPLICAS"):
        await money.reserve(new_rid())


@pytest.mark.usefixtures("real_timeouts")
async def test_a_busy_redis_is_typed(own_valkey: str, connect: Connect) -> None:
    """Faults 50: somebody's endless script."""
    state = await connect(own_valkey)
    money = Money(state, "busy")
    await money.raw("CONFIG", "SET", "busy-reply-threshold", 20)
    with pytest.raises(StateUnavailable):
        await state._side.execute(b"EVAL", b"while true do end", 0, within=0.1)
    with pytest.raises(StateUnavailable, match="BUSY"):
        await money.reserve(new_rid())
    await state._hot.execute(b"SCRIPT", b"KILL", within=1.0)
    await until_available(state)
    assert (await money.reserve(new_rid())).status == "ok"
