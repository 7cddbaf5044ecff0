"""Where a settlement goes (DESIGN 4): Redis, else JetStream, else the spool, else memory; and its second copy."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.bus import spool
from shared.bus.base import PayloadTooLarge
from shared.state.base import Settled, StateUnavailable
from shared.wire import subjects
from shared.wire.records import UsageBatch, UsageRecord, decode_stored
from tests.workers.provider.rig import Rig, running

STREAM = "[[sim chunks=3]]"


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running(valkey_url) as made:
        yield made


def away(rig: Rig, monkeypatch: pytest.MonkeyPatch, times: int = 1_000_000) -> list[int]:
    """Redis takes no settlement so many times; what is popped is left of them."""
    ledger, real = rig.ctx.state.ledger, rig.ctx.state.ledger.settle
    left = list(range(times))

    async def settle(**fields: Any) -> Settled:
        if left:
            left.pop()
            raise StateUnavailable("away")
        return await real(**fields)

    monkeypatch.setattr(ledger, "settle", settle)
    return left


def without_jetstream(rig: Rig) -> None:
    rig.broker.service = lambda _subject, _payload, _reply: False
    rig.provider._usage.stream.there = False


async def too_large(_payload: bytes, _within_s: float) -> int:
    raise PayloadTooLarge


async def records(rig: Rig, count: int) -> list[UsageRecord]:
    async with asyncio.timeout(5):
        while len(rig.published()) < count:
            await asyncio.sleep(0.01)
    return rig.published()


async def test_what_redis_settled_is_in_the_stream_a_moment_later(rig: Rig) -> None:
    """The record is complete: whom, when, how much, what for, and the line of the journal that says so."""
    requests = [await rig.send(STREAM) for _ in range(5)]
    for request in requests:
        assert (await rig.answer(request)).end.summary.settled
    found = {record.rid: record for record in await records(rig, 5)}
    since = min(found[request.rid].at for request in requests) - 1000  # others used this tenant before
    journal = {line.id: line for line in await rig.ctx.state.ledger.journal(tenant="default", after=str(since))}
    for request in requests:
        record, [entry], [bill] = found[request.rid], await rig.entries(request.rid), await rig.bill(request.rid)
        line = journal[record.line]
        assert (line.op, line.rid, line.call, line.settled) == ("settle", request.rid, 1, record.cost)
        assert record.cost == bill["cost_nano_usd"]
        assert (record.input_tokens, record.output_tokens) == (bill["input_tokens"], bill["output_tokens"])
        assert (record.tenant, record.key, record.model, record.endpoint) == ("default", "bootstrap", "m", "sim")
        assert (record.day, record.estimated) == (entry.day, False)
        assert msgspec.json.decode(record.raw)["prompt_tokens"] == record.input_tokens
    stored = [decode_stored(each.payload) for each in rig.jetstream.streams[subjects.USAGE_STREAM].messages.values()]
    assert all(isinstance(each, UsageBatch) and each.instance == rig.ctx.instance for each in stored)
    assert len({each.number for each in stored if isinstance(each, UsageBatch)}) == len(stored) <= 5


async def test_a_batch_that_jetstream_does_not_take_is_sent_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.provider.usage.AGAIN_S", 0.02)
    await rig.answer(await rig.send(STREAM))
    await records(rig, 1)
    server = rig.broker.service
    without_jetstream(rig)
    await rig.answer(await rig.send(STREAM))
    await asyncio.sleep(0.2)
    assert rig.provider._usage_log.waiting == 1
    rig.broker.service = server
    await records(rig, 2)
    async with asyncio.timeout(5):
        while rig.provider._usage_log.waiting:
            await asyncio.sleep(0.01)
    assert rig.provider._usage_log.lost == 0


async def test_without_redis_it_is_in_jetstream_before_the_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await rig.answer(await rig.send(STREAM))  # the stream is there
    before = len(await records(rig, 1))
    away(rig, monkeypatch)
    request = await rig.send(STREAM)
    answer = await rig.answer(request)
    assert answer.end.summary.settled is False
    [record] = rig.published()[before:]
    [entry], [bill] = await rig.entries(request.rid), await rig.bill(request.rid)
    assert (record.rid, record.call, record.cost, record.line) == (request.rid, 1, bill["cost_nano_usd"], "")
    assert (record.day, entry.state) == (entry.day, "dispatched")
    assert rig.provider._behind.settles == 0


async def test_what_was_never_reserved_is_charged_to_the_day_it_was_used(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    away(rig, monkeypatch)
    await rig.answer(await rig.send(STREAM, reserved=False))
    [record] = await records(rig, 1)
    assert record.day == rig.ctx.state.clock.now() // 86_400_000


async def test_without_both_it_is_on_disk_before_the_end_and_published_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then it is nowhere else: the file is gone."""
    monkeypatch.setattr(spool, "LOOK_S", 0.05)
    server = rig.broker.service
    without_jetstream(rig)
    left = away(rig, monkeypatch)
    monkeypatch.setattr(type(rig.ctx.state), "available", False)
    request = await rig.send(STREAM)
    assert (await rig.answer(request)).end.summary.settled is False
    [path] = [each for each in rig.ctx.settings.spool.iterdir() if each.stat().st_size]
    assert request.rid.encode() in path.read_bytes()
    assert left
    rig.broker.service = server
    [record] = await records(rig, 1)
    assert (record.rid, record.line) == (request.rid, "")
    async with asyncio.timeout(5):
        while any(rig.ctx.settings.spool.iterdir()):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("small", [False, True])
async def test_without_any_jetstream_the_spool_is_posted_to_redis_itself(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """A NATS that has none, or that takes no message of that size: no second copy, and no settlement lost."""
    if small:
        monkeypatch.setattr(rig.provider._usage.stream, "publish", too_large)
    else:
        without_jetstream(rig)
    away(rig, monkeypatch, times=1)
    request = await rig.send(STREAM)
    assert (await rig.answer(request)).end.summary.settled is False
    [entry], [bill] = await rig.settled(request.rid), await rig.bill(request.rid)
    assert (entry.state, entry.cost) == ("settled", bill["cost_nano_usd"])


async def test_without_disk_it_is_in_memory_and_loud(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    async with running(valkey_url, SPOOL_DIR=str(tmp_path / "file" / "spool")) as rig:
        without_jetstream(rig)
        left = away(rig, monkeypatch)
        request = await rig.send(STREAM)
        assert (await rig.answer(request)).end.summary.settled is False
        assert rig.provider._behind.settles == 1
        assert [r.requestId for r in caplog.records if r.levelno == logging.CRITICAL] == [request.rid]  # type: ignore[attr-defined]
        left.clear()
        [entry], [bill] = await rig.settled(request.rid), await rig.bill(request.rid)
        assert entry.cost == bill["cost_nano_usd"]


async def test_a_drain_waits_for_what_is_in_memory_alone(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    async with running(valkey_url, drain=False, SPOOL_DIR=str(tmp_path / "file" / "spool")) as rig:
        without_jetstream(rig)
        left = away(rig, monkeypatch)
        request = await rig.send(STREAM)
        await rig.answer(request)
        draining = asyncio.ensure_future(rig.provider.drain())
        await asyncio.sleep(0.1)
        assert not draining.done()
        left.clear()
        await draining
        assert [entry.state for entry in await rig.entries(request.rid)] == ["settled"]


async def test_a_drain_leaves_the_last_batch_on_disk_when_jetstream_has_gone(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.provider.usage.CLOSE_S", 0.1)
    async with running(valkey_url, drain=False) as rig:
        await rig.answer(await rig.send(STREAM))
        await records(rig, 1)
        rig.broker.service = lambda _subject, _payload, _reply: True  # takes it and never answers
        request = await rig.send(STREAM)
        assert (await rig.answer(request)).end.summary.settled
        await rig.provider.drain()
        [path] = rig.ctx.settings.spool.iterdir()
        assert request.rid.encode() in path.read_bytes()
