"""The guardian as a reader of the usage stream: a real Valkey, and JetStream's twin (see tests/bus)."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from shared.bus.jetstream import JetStream, inboxes
from shared.service.usage import plan
from shared.state import keys, late
from shared.state.base import NotApplied, StateUnavailable
from shared.wire.messages import encode
from shared.wire.records import BalanceSnapshot, UsageBatch, UsageRecord, decode_stored
from tests.workers.guardian_rig import Rig, running
from workers.guardian import alerts, learn, sweep
from workers.guardian.admit import Guardian
from workers.guardian.webhook import Webhook, WebhookFailed

DAY_MS = 86_400_000


class Books:
    """A guardian, and the test as the providers that publish and as whoever looks."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.tenant = "t" + secrets.token_hex(6)
        self.ledger = rig.ctx.state.ledger
        self.stream = JetStream(rig.outside, plan(rig.ctx.settings), inboxes("provider", "test")[0])
        self._number = 0

    @property
    def now(self) -> int:
        return self.rig.ctx.state.clock.now()

    def record(self, **fields: Any) -> UsageRecord:
        given: dict[str, Any] = {
            "tenant": self.tenant, "rid": secrets.token_hex(16), "call": 1, "key": "k", "user": "", "model": "m",
            "day": self.now // DAY_MS, "endpoint": "one", "cost": 1000, "estimated": False, "line": "", "at": self.now,
            "input_tokens": 10, "output_tokens": 5, "input_estimate": 10,
        }  # fmt: skip
        return UsageRecord(**{**given, **fields})

    async def publish(self, *records: UsageRecord, at: int | None = None, number: int = 0) -> None:
        self._number += 1
        batch = UsageBatch(
            instance="test", number=number or self._number, at=self.now if at is None else at, records=records
        )
        await self.stream.publish(encode(batch), 5)

    async def settled(self) -> int:
        """The tenant's lifetime, nano-USD."""
        return (await self.ledger.balances(tenant=self.tenant))[2].settled

    async def until_settled(self, amount: int) -> None:
        async with asyncio.timeout(5):
            while await self.settled() != amount:
                await asyncio.sleep(0.01)

    async def stored(self) -> list[UsageBatch]:
        reader = self.stream.read("r" + secrets.token_hex(4), inboxes("operator", "test")[1])
        found = [decode_stored(each.payload) async for each in reader]
        return [each for each in found if isinstance(each, UsageBatch)]

    async def ops(self) -> list[tuple[str, str]]:
        return [(line.op, line.rid) for line in await self.ledger.journal(tenant=self.tenant) if line.rid]

    async def idle(self) -> None:
        """Everything published was acknowledged."""
        stream = next(iter(self.rig.jetstream.streams.values()))
        async with asyncio.timeout(5):
            while True:
                consumer = stream.consumers.get("guardian")
                if consumer is not None and not consumer.timers and consumer.cursor > stream.last:
                    return
                await asyncio.sleep(0.01)


@pytest.fixture
async def books(valkey_url: str) -> AsyncIterator[Books]:
    async with running(Guardian(), valkey_url, "routing") as rig:
        made = Books(rig)
        await made.stream.start()
        await made.stream.ensure()
        yield made
        await made.stream.close()


async def test_what_redis_did_not_take_is_posted_once_and_published_with_its_line(books: Books) -> None:
    """However often it is stored: by a provider whose acknowledgement was lost, and out of a spool."""
    record = books.record()
    for _ in range(3):
        await books.publish(record)
    await books.until_settled(1000)
    await books.idle()
    assert await books.settled() == 1000
    [(op, rid)] = await books.ops()
    assert (op, rid) == ("opened", record.rid)
    [line] = await books.ledger.journal(tenant=books.tenant)
    anew = [each for batch in await books.stored() if batch.instance != "test" for each in batch.records]
    assert anew
    assert {each.line for each in anew} == {line.id}
    assert msgspec.structs.replace(anew[0], line="") == record


async def test_its_own_levels_and_day_are_charged(books: Books) -> None:
    """Issue 4: a self-contained record: levels, period, amount."""
    yesterday = books.now // DAY_MS - 1
    await books.publish(books.record(key="kk", user="uu", day=yesterday, cost=7))
    await books.until_settled(7)
    fields = await books.ledger.levels(tenant=books.tenant)
    date = keys.bucket("day", yesterday * DAY_MS)
    assert {name: text for name, text in fields.items() if name.endswith(date)} == {
        f"t:{date}": "7 0 0", f"k:kk:{date}": "7 0 0", f"u:uu:{date}": "7 0 0",
    }  # fmt: skip


async def test_what_was_settled_meanwhile_is_not_posted_again(books: Books) -> None:
    """The provider's try was applied after all: its answer was lost."""
    record = books.record()
    settled = await books.ledger.settle(tenant=books.tenant, rid=record.rid, call=1, cost=1000, key="k")
    await books.publish(record)
    await books.idle()
    assert await books.settled() == 1000
    [anew] = [batch for batch in await books.stored() if batch.instance != "test"]
    assert anew.records[0].line == settled.line


async def test_a_reservation_that_is_still_open_is_closed_by_it(books: Books) -> None:
    record = books.record(cost=300)
    ledger, tenant = books.ledger, books.tenant
    fields: dict[str, Any] = {"tenant": tenant, "rid": record.rid, "delivery": 1}
    await ledger.reserve(**fields, amount=500, deadline=books.now + 9000, not_after=books.now + 5000, key="k")
    await ledger.dispatch(**fields, instance="p", lost="", amount=500, max_calls=1, not_after=books.now + 5000)
    await books.publish(record)
    await books.until_settled(300)
    assert (await ledger.balances(tenant=tenant))[2].pending == 0


async def test_a_damaged_tenant_does_not_stop_the_others(
    books: Books, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "LATER_S", 0.1)
    real, bad = books.ledger.settle, {"bad"}

    async def settle(**fields: Any) -> Any:
        if fields["tenant"] in bad:
            raise NotApplied("NOTINTEGER")
        return await real(**fields)

    monkeypatch.setattr(books.ledger, "settle", settle)
    other = books.tenant
    await books.publish(books.record(tenant="bad"))
    await books.publish(books.record())
    await books.until_settled(1000)
    assert other == books.tenant
    bad.clear()
    await books.idle()
    assert "Redis refuses what is to be posted" in [record.getMessage() for record in caplog.records]


async def test_while_redis_is_away_it_is_held_and_then_posted(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(books.rig.ctx.state), "available", False)
    records = [books.record(cost=n) for n in range(1, 201)]
    for record in records:
        await books.publish(record)
    await asyncio.sleep(0.2)
    assert await books.settled() == 0
    monkeypatch.undo()
    await books.until_settled(sum(range(1, 201)))
    await books.idle()


async def test_half_way_to_being_dropped_it_is_published_anew(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may be away for longer than JetStream keeps a message."""
    monkeypatch.setattr(type(books.rig.ctx.state), "available", False)
    record = books.record()
    retention = books.rig.ctx.settings.usage_retention_ms
    await books.publish(record, at=books.now - retention // 2 - 1000)
    async with asyncio.timeout(5):
        while len(batches := await books.stored()) < 2:
            await asyncio.sleep(0.01)
    assert batches[1].records == (record,)
    assert batches[1].at > books.now - 5000
    await asyncio.sleep(0.1)
    assert len(await books.stored()) == 2  # not again and again
    monkeypatch.undo()
    await books.until_settled(1000)


async def test_a_snapshot_of_the_balances_is_in_the_stream_too(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `hotpath ledger rebuild` begins with; a large one comes in parts."""
    monkeypatch.setattr(sweep, "PART_BYTES", 60)
    await books.ledger.settle(tenant=books.tenant, rid="ab" * 16, call=1, cost=5, key="k")
    _, line = await books.ledger.expire(tenant=books.tenant)
    if not line:  # its time had not come
        monkeypatch.setattr(books.ledger, "_expiring", (*books.ledger._expiring[:-2], 1, 1))
        _, line = await books.ledger.expire(tenant=books.tenant)
    await books.rig.role._sweeper.publish(books.tenant, line)  # type: ignore[attr-defined]
    reader = books.stream.read("snap", inboxes("operator", "snap")[1])
    parts = [decode_stored(each.payload) async for each in reader]
    fields: dict[str, str] = {}
    for number, part in enumerate(parts):
        assert isinstance(part, BalanceSnapshot)
        assert (part.tenant, part.line, part.part, part.parts) == (books.tenant, line, number, len(parts))
        fields |= part.fields
    assert len(parts) > 1  # two or three: Redis gives the fields in any order
    stands = await books.ledger.levels(tenant=books.tenant)
    assert {name: text for name, text in stands.items() if name != "snap"} == fields
    assert fields["t:lifetime"] == "5 0 0"


# ---- older than its tombstone ----------------------------------------------------------------------------------------


async def forget(books: Books, record: UsageRecord) -> None:
    """As the sweep does when the tombstone's time is over."""
    pipeline = books.ledger._pipeline
    await pipeline.execute(b"HDEL", keys.entries(books.tenant), bytes.fromhex(record.rid), within=1)
    await pipeline.execute(b"ZREM", keys.leases(books.tenant), bytes.fromhex(record.rid), within=1)


@pytest.mark.parametrize("known", [True, False])
async def test_an_old_record_that_was_posted_is_found_in_the_journal(books: Books, known: bool) -> None:
    record = books.record(at=books.now - 560_000)
    settled = await books.ledger.settle(tenant=books.tenant, rid=record.rid, call=1, cost=1000, key="k")
    if not known:
        await forget(books, record)
    await books.publish(record)
    await books.idle()
    assert await books.settled() == 1000
    [anew] = [batch for batch in await books.stored() if batch.instance != "test"]
    assert anew.records[0].line == settled.line


async def test_an_old_record_that_was_not_posted_is(books: Books) -> None:
    await books.publish(books.record(at=books.now - 560_000), books.record(at=books.now - 60_000_000))
    await books.until_settled(2000)


async def test_one_that_the_journal_cannot_tell_of_is_left_to_reconcile(
    books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    """It was cut behind a snapshot: neither billed twice nor passed over in silence."""
    first = books.record(cost=1)
    await books.publish(first)
    await books.until_settled(1)
    pipeline, journal = books.ledger._pipeline, keys.journal(books.tenant)
    packed = msgspec.msgpack.encode(["snap", 0, 0, "", "", 0, 0, 0, []])
    snap = await pipeline.execute(b"XADD", journal, b"*", b"r", b"", b"l", packed, within=1)
    await pipeline.execute(b"XTRIM", journal, b"MINID", snap, within=1)
    lost = books.record(at=books.now - 560_000, cost=77)
    await books.publish(lost)
    await books.idle()
    assert await books.settled() == 1
    [line] = [each for each in caplog.records if each.levelno == logging.CRITICAL]
    assert (line.rid, line.cost_nano_usd) == (lost.rid, 77)  # type: ignore[attr-defined]
    assert books.rig.role._usage.unposted == 1  # type: ignore[attr-defined]


async def test_what_was_posted_at_its_bound_is_put_right(books: Books) -> None:
    """24 h later and its tombstone gone, the journal still says what was posted for it."""
    record = books.record(at=books.now - 560_000, cost=300)
    packed = msgspec.msgpack.encode(["post", 1, record.day, "k", "", 500, 0, -500, 500, 1])
    await books.ledger.settle(tenant=books.tenant, rid="ab" * 16, call=1, cost=500, key="k")  # the bound, as posted
    await books.ledger._pipeline.execute(
        b"XADD", keys.journal(books.tenant), b"*", b"r", bytes.fromhex(record.rid), b"l", packed, within=1
    )
    await books.publish(record)
    await books.until_settled(300)


async def test_no_record_of_ours_is_told_and_acknowledged(books: Books, caplog: pytest.LogCaptureFixture) -> None:
    await books.publish(books.record(rid="zz", at=0), books.record(cost=-1), books.record(call=0), books.record())
    await books.stream.publish(b"\xc1", 5)
    await books.until_settled(1000)
    await books.idle()
    assert len([each for each in caplog.records if each.levelno == logging.CRITICAL]) == 4


async def test_what_was_settled_is_learned_once(books: Books) -> None:
    """Each batch once for each of its tenants, whoever reads it, however often; what is still to be posted, not yet."""
    other = "t" + secrets.token_hex(6)
    records = [books.record(line="1-1", model="a"), books.record(line="1-2", tenant=other), books.record(cost=77)]
    for _ in range(3):
        await books.publish(*records, number=7)
    await books.until_settled(77)  # published anew by the guardian: learned from that batch
    state = books.rig.ctx.state
    async with asyncio.timeout(5):
        while (await state.costs(books.tenant)).total.requests < 2:
            await asyncio.sleep(0.01)
    await books.idle()
    found = await state.costs(books.tenant)
    counts = {name: (spent.requests, spent.cost) for name, spent in found.models.items()}
    assert counts == {"a": (1, 1000), "m": (1, 77)}
    assert (await state.costs(other)).total.requests == 1


async def test_an_alert_is_logged_and_posted(
    books: Books, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-M1b: "Daily spend limit exceeded" with date, spend and limit; the webhook gets the same as JSON."""
    monkeypatch.setattr(alerts, "PAUSE_S", 0.01)
    async with receiver(503, 200) as (url, bodies):
        told = books.rig.role._learner._alerts  # type: ignore[attr-defined]
        monkeypatch.setattr(told, "_webhook", Webhook(url, private=True))
        today = books.now // DAY_MS
        await books.publish(books.record(line="1-1", cost=5_130_000_000, day=today))
        async with asyncio.timeout(5):
            while len(bodies) < 2:
                await asyncio.sleep(0.01)
    date = keys.bucket("day", today * DAY_MS)
    assert msgspec.json.decode(bodies[1]) == {
        "id": f"{books.tenant}:{date}:5", "event": "daily_limit_exceeded", "tenant": books.tenant,
        "tenant_name": books.tenant, "date": date, "limit_usd": "$5.00", "limit_nano_usd": 5_000_000_000,
        "spend_usd": "$5.13", "spend_nano_usd": 5_130_000_000,
    }  # fmt: skip
    [line] = [each for each in caplog.records if each.getMessage() == "Daily spend limit exceeded"]
    assert (line.date, line.spend, line.limit) == (date, "$5.13", "$5.00")  # type: ignore[attr-defined]
    assert line.levelno == logging.WARNING


@contextlib.asynccontextmanager
async def receiver(*statuses: int) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A webhook of the test's own, which answers with these, then with 200: its URL, and what it was sent."""
    bodies: list[bytes] = []
    answers = list(statuses)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /hook?token=x HTTP/1.1\r\nHost: 127.0.0.1:")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        bodies.append(await reader.readexactly(length))
        status = answers.pop(0) if answers else 200
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status if status else b"gibberish\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?token=x", bodies
    finally:
        server.close()


async def test_a_webhook_whose_first_address_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is ::1 first on most machines, and the receiver listens on 127.0.0.1."""

    async def both(*_args: object, **_fields: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (address, 0)) for address in ("::1", "127.0.0.1")]

    async with receiver() as (url, bodies):
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
        await Webhook(url, private=True).post(b"{}")
        assert bodies == [b"{}"]


async def test_what_a_webhook_may_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.guardian.webhook.POST_S", 0.3)
    async with receiver(204, 500, 429, 400, 302, 0) as (url, bodies):
        webhook = Webhook(url, private=True)
        await webhook.post(b"{}")
        again = []
        for _ in range(5):
            with pytest.raises(WebhookFailed) as failed:
                await webhook.post(b"{}")
            again.append(failed.value.again)
            assert "token" not in str(failed.value)
        assert again == [True, True, False, False, True]
        with pytest.raises(WebhookFailed, match="not allowed"):  # faults 74
            await Webhook(url, private=False).post(b"{}")
        with pytest.raises(WebhookFailed):
            await Webhook(url.replace("http:", "https:"), private=True).post(b"{}")
        assert bodies == [b"{}"] * 6
    with pytest.raises(WebhookFailed):
        await Webhook(url, private=True).post(b"{}")


async def test_late_post_says_what_is_to_be_tried_again(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(**_fields: Any) -> Any:
        raise StateUnavailable("away")

    monkeypatch.setattr(books.ledger, "entry", gone)
    results = await late.post(
        books.ledger, [books.record(at=0), books.record(tenant="another")], books.now, tombstone_ms=600_000
    )
    assert isinstance(results[0], StateUnavailable)
    assert isinstance(results[1], str)
