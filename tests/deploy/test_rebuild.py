"""`hotpath ledger rebuild`: Redis loses what it had, in each way it can, and has it back from the second copy. Real
Valkey, real NATS; the records are written as a provider writes them (issue 4, acceptance 2)."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from deploy import servers
from deploy.cli.copy import opened, scan, snapshots
from deploy.cli.rebuild import Rebuilt, run
from deploy.cli.reconcile import Options
from deploy.cli.reconcile import run as reconcile
from deploy.cli.verify import examine
from shared.bus.jetstream import JetStream, inboxes
from shared.bus.nats import NatsBus
from shared.bus.stored import StreamPlan
from shared.core.transitions import POSTING
from shared.state import keys, late, ledger
from shared.state.base import StateUnavailable
from shared.state.redis import State
from shared.wire import subjects
from shared.wire.messages import encode
from shared.wire.records import BalanceSnapshot, UsageBatch, UsageRecord
from tests.state.rig import DAY, HOUR, KEY, Money, new_rid, settings_for


class Server:
    """A Valkey of this test's own, which can be killed and come back with other files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = servers.free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._stack = AsyncExitStack()

    def start(self) -> None:
        command = servers.valkey_command(self.folder, self.port)
        self._stack.enter_context(servers.running(command, self.port, self.folder.parent / "valkey.log"))

    async def stop(self) -> None:
        await self._stack.aclose()
        self._stack = AsyncExitStack()


class World:
    """A tenant whose settlements are copied, and the bill as the provider has it."""

    def __init__(self, server: Server, nats_url: str, stream: JetStream) -> None:
        self.server = server
        self.settings = settings_for(server.url, NATS_URL=nats_url)
        self.stream = stream
        self.bill: dict[str, int] = {}
        self.tenant = f"r{new_rid()[:10]}"
        self.money: Money
        self._number = 0

    async def connect(self) -> None:
        async with asyncio.timeout(10):
            while True:
                try:
                    self.money = Money(await State.connect(self.settings), self.tenant)
                except StateUnavailable:  # it listens before it has read its files
                    await asyncio.sleep(0.01)
                else:
                    return

    async def call(self, cost: int, *, day: int = 0, user: str = "", reserve: bool = True) -> str:
        """A call as a provider makes it: settled in Redis, its record in the copy."""
        rid = new_rid()
        if reserve:
            await self.money.reserve(rid, user=user)
            await self.money.dispatch(rid)
        settled = await self.money.state.ledger.settle(
            tenant=self.tenant, rid=rid, call=1, cost=cost, key=KEY, user=user, day=day
        )
        self.bill[rid] = cost
        await self.copy(rid, cost, settled.line, day=day, user=user)
        return rid

    async def copy(self, rid: str, cost: int, line: str, *, day: int = 0, user: str = "") -> None:
        self._number += 1
        record = UsageRecord(
            tenant=self.tenant, rid=rid, call=1, key=KEY, user=user, day=day or self.money.now // DAY, model="m",
            endpoint="e", cost=cost, estimated=False, line=line, at=self.money.now,
        )  # fmt: skip
        batch = UsageBatch(instance="p", number=self._number, at=self.money.now, records=(record,))
        await self.stream.publish(encode(batch), 5.0)

    async def snapshot(self) -> None:
        """As a guardian does it: written to the journal, and its copy to the stream, here in two parts."""
        ledger_ = self.money.state.ledger
        ledger_._expiring = (*ledger_._expiring[:-1], 0)
        _, line = await ledger_.expire(tenant=self.tenant)
        if not line:
            return
        fields = list((await ledger_.levels(tenant=self.tenant)).items())
        for part, some in enumerate((fields[::2], fields[1::2])):
            message = BalanceSnapshot(tenant=self.tenant, line=line, at=1, part=part, parts=2, fields=dict(some))
            await self.stream.publish(encode(message), 5.0)

    async def rebuild(self, tenant: str = "", *, dry_run: bool = False) -> Rebuilt:
        async with opened(self.settings) as copy:
            _, found = await run(self.money.state, copy, tenant or self.tenant, dry_run=dry_run)
        (rebuilt,) = found
        return rebuilt

    async def is_the_bill(self, *, held: int = 0) -> None:
        """I1: journal == balances == copy == bill, and a second run does nothing."""
        again = await self.rebuild()
        assert (again.balances, again.snapshot, again.settlements) == (False, "", 0)
        found = await examine(self.money.state, self.settings, {self.tenant: "name"})
        assert (found["right"], found["copy"]) == (True, ""), found
        assert await self.money.held() == (sum(self.bill.values()), held, 0)

    async def posted(self) -> dict[str, int]:
        return {line.rid: line.more[0] for line in await self.money.journal() if line.op in POSTING}


@pytest.fixture
async def world(tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name in ("ADMIT_TIMEOUT", "POST_TIMEOUT"):
        monkeypatch.setattr(ledger, name, 10.0)
    server = Server(tmp_path / "valkey")
    server.start()
    bus = await NatsBus.connect(nats_url, "provider")
    plan = StreamPlan(name=subjects.USAGE_STREAM, subject=subjects.USAGE, max_age_ms=HOUR, max_bytes=10**9)
    stream = JetStream(bus, plan, inboxes("provider", new_rid())[0])
    await stream.start()
    await stream.ensure()
    made = World(server, nats_url, stream)
    await made.connect()
    yield made
    await made.money.state.close()
    await stream.close()
    await bus.close()
    await server.stop()


async def come_back(world: World, files: Path | None) -> None:
    """Redis dies with its host, and is there again with a copy of its files, or with none."""
    await world.money.state.close()
    await world.server.stop()
    shutil.rmtree(world.server.folder)
    if files is None:
        world.server.folder.mkdir()
    else:
        shutil.copytree(files, world.server.folder)
    world.server.start()
    await world.connect()


async def test_redis_comes_back_from_a_copy_a_second_old(world: World, tmp_path: Path) -> None:
    """What was settled since is posted again, in its own day, at every level; what is running goes on."""
    await world.money.limit("month", 10_000)
    await world.money.limit("month", 10_000, "u:u1")
    for cost in (10, 20):
        await world.call(cost)
    open_then, settled_since = new_rid(), new_rid()
    for rid in (open_then, settled_since):
        await world.money.reserve(rid)
        await world.money.dispatch(rid)
    copy = tmp_path / "copy"
    shutil.copytree(world.server.folder, copy)  # the append-only file, as of now
    yesterday = world.money.now // DAY - 1
    await world.call(40, user="u1")
    await world.call(80, day=yesterday, reserve=False)
    line = (
        await world.money.state.ledger.settle(tenant=world.tenant, rid=settled_since, call=1, cost=160, key=KEY)
    ).line
    world.bill[settled_since] = 160
    await world.copy(settled_since, 160, line)
    taken = new_rid()  # Redis did not take it, and a guardian has yet to
    await world.copy(taken, 5, "")
    await come_back(world, copy)
    assert (await world.money.held())[0] < sum(world.bill.values())
    found = await examine(world.money.state, world.settings, {world.tenant: "name"})
    assert [(each["kind"], each["do"]) for each in found["tenants"][0]["differences"]] == [
        ("copy", "hotpath ledger rebuild")
    ] * 3
    tried = await world.rebuild(dry_run=True)
    assert (tried.settlements, (await world.money.held())[0]) == (3, 30)
    await world.call(7)  # it is served meanwhile
    done = await world.rebuild()
    assert (done.settlements, done.amount, done.waiting, done.snapshot) == (3, 280, 1, "")
    await world.is_the_bill(held=100)
    assert await world.posted() == world.bill
    assert (await world.money.levels("u:u1"))["lifetime"].settled == 40
    day = await world.money.raw("HGET", keys.balances(world.tenant), f"t:{keys.bucket('day', yesterday * DAY)}")
    assert day == b"80 0 0"
    assert await world.money.settle(settled_since, cost=160) == "duplicate"


async def test_redis_comes_back_empty(world: World) -> None:
    """The newest whole snapshot and what was settled after it; limits too. The tenant is not in the registry any more:
    its id names it."""
    await world.money.limit("month", 1000)
    await world.money.limit("day", 500, "u:u1")
    for cost in (10, 20):
        await world.call(cost, user="u1")
    doubtful, held = new_rid(), new_rid()
    await world.money.reserve(held)
    await world.money.reserve(doubtful, amount=70)
    await world.money.dispatch(doubtful, 1, "A", amount=70)
    await world.money.dispatch(doubtful, 2, "B", lost="A", max_calls=1)
    await world.snapshot()
    for cost in (40, 80):
        await world.call(cost, user="u1")
    part = BalanceSnapshot(
        tenant=world.tenant, line="9999999999999-0", at=1, part=0, parts=2, fields={"t:lifetime": "9 9 9"}
    )
    await world.stream.publish(encode(part), 5.0)  # its second part was lost
    await come_back(world, None)
    done = await world.rebuild()
    assert (done.settlements, done.amount, done.unconfirmed, bool(done.snapshot)) == (2, 120, 70, True)
    world.bill[doubtful] = 70
    await world.is_the_bill()
    assert (await world.money.levels())["month"].limit == 1000
    user = (await world.money.levels("u:u1"))["day"]
    assert (user.settled, user.limit) == (150, 500)
    assert (await world.money.reserve(new_rid(), amount=781)).status == "denied"
    assert await world.money.raw("HGET", keys.balances(world.tenant), "users") == b"1"


async def test_redis_comes_back_empty_and_goes_on(world: World) -> None:
    """Nobody noticed for a while: what was spent since stands, and what was lost is added to it, once."""
    await world.money.limit("month", 1000)
    await world.call(10)
    await world.snapshot()
    await world.call(20)
    await come_back(world, None)
    await world.call(40)
    assert (await world.money.held())[0] == 40
    await world.snapshot()  # a guardian's sweep wrote one of what there is now, and the copy has it
    await world.call(160)
    await world.money.limit("day", 900)
    done = await world.rebuild()
    assert (done.settlements, bool(done.snapshot)) == (1, True)
    found = await world.money.levels()
    assert (found["day"].limit, found["month"].limit) == (900, 1000)
    await world.is_the_bill()
    await world.call(80)
    await world.is_the_bill()


async def test_the_balances_alone_are_lost(world: World) -> None:
    """Faults 52: nobody is admitted until the journal was replayed."""
    await world.money.limit("month", 1000)
    await world.call(10)
    await world.snapshot()
    open_then = new_rid()
    await world.money.reserve(open_then)
    await world.money.raw("DEL", keys.balances(world.tenant))
    assert (await world.money.reserve(new_rid())).status == "lost"
    await world.call(20, reserve=False)
    await world.snapshot()  # a guardian's sweep comes by
    assert (await world.rebuild(dry_run=True)).balances is True
    assert (await world.money.reserve(new_rid())).status == "lost"
    done = await world.rebuild()
    assert (done.balances, done.settlements, done.snapshot) == (True, 0, "")
    assert (await world.money.reserve(new_rid(), amount=871)).status == "denied"
    await world.is_the_bill(held=100)


async def test_no_snapshot_is_left(world: World) -> None:
    """A tenant younger than its first snapshot: what was settled is posted, and the missing limits are told."""
    await world.call(10)
    await come_back(world, None)
    done = await world.rebuild()
    assert (done.settlements, [note[:11] for note in done.notes]) == (1, ["no snapshot"])
    await world.is_the_bill()


async def test_nothing_is_lost(world: World) -> None:
    """On a healthy Hotpath it does nothing, whatever the journal was trimmed to; snapshots of now change nothing."""
    await world.call(10)
    await world.snapshot()
    await world.call(20)
    await world.snapshot()
    await world.is_the_bill()


async def test_the_journal_alone_is_lost(world: World) -> None:
    """That is no empty Redis: what is in the balances already is not posted twice, also when it went on since, and the
    tombstones are gone."""
    await world.call(10)
    await world.snapshot()
    await world.call(20)
    await world.money.raw("DEL", keys.journal(world.tenant), keys.entries(world.tenant), keys.leases(world.tenant))
    for total in (30, 70):
        done = await world.rebuild()
        assert (done.snapshot, done.settlements, len(done.notes)) == ("", 0, 1)
        assert await world.money.held() == (total, 0, 0)
        if total == 30:
            await world.call(40)


async def test_what_the_copy_tells(world: World) -> None:
    """The newest whole snapshot; of two records of one call the one that has its line."""
    rid = new_rid()
    await world.copy(rid, 5, "")
    await world.copy(rid, 5, "7-1")
    await world.copy(rid, 5, "")
    await world.stream.publish(b"\xc1 no record", 5.0)
    async with opened(world.settings) as copy:
        found = await scan(copy, {world.tenant})
        assert world.tenant not in await snapshots(copy)
    ((call, told),) = found.settlements[world.tenant].items()
    assert (call, told.cost, told.line) == ((rid, 1), 5, "7-1")


# ---- reconcile, which asks the copy too ------------------------------------------------------------------------------


async def test_a_bill_of_calls_that_the_copy_alone_knows(world: World, tmp_path: Path) -> None:
    """Trimmed and right; trimmed and off: told, since what was put right before is not known any more; lost: posted;
    not posted yet: left to the guardians."""
    world.tenant = (await world.money.state.create_key(f"copied-{new_rid()[:6]}")).tenant_id
    world.money = Money(world.money.state, world.tenant)
    right, off = await world.call(10), await world.call(20)
    await world.money.raw("DEL", keys.entries(world.tenant), keys.leases(world.tenant))
    await world.snapshot()
    last = (await world.money.journal())[-1].id
    await world.money.raw("XTRIM", keys.journal(world.tenant), "MINID", last)
    lost, waiting = new_rid(), new_rid()
    await world.copy(lost, 30, f"{world.money.now + 5}-0")
    await world.copy(waiting, 40, "")
    file = tmp_path / "bill"
    costs = {right: 10, off: 21, lost: 31, waiting: 40, new_rid(): 50}
    file.write_text(
        "".join(
            f'{{"request_id": "{rid}.1", "model": "m", "endpoint": "e", "input_tokens": 1, "output_tokens": 1,'
            f' "cost_nano_usd": {cost}}}\n'
            for rid, cost in costs.items()
        )
    )
    for unbooked in ((1, 31), (0, 0)):
        found = await reconcile(world.money.state, world.settings, file, Options(), print)
        kinds = {kind: (each.calls, each.difference) for kind, each in found.kinds.items()}
        assert (kinds["trimmed"], kinds["later"], kinds["unknown"]) == ((1, 1), (1, 0), (1, 50))
        assert (kinds["unbooked"], found.difference) == (unbooked, unbooked[1])
        assert {(each["request"][:32], each["why"]) for each in found.waiting.told} == {
            (off, "trimmed"), (waiting, "later"),
        }  # fmt: skip
    assert (await world.money.held())[0] == 61


async def test_a_bill_of_calls_that_were_lost_and_given_back(world: World, tmp_path: Path) -> None:
    """They are in the snapshot's sum, or posted again: the copy tells of them too, and nothing is posted once more;
    neither by a guardian that has an old record delivered again."""
    world.tenant = (await world.money.state.create_key(f"lost-{new_rid()[:6]}")).tenant_id
    world.money = Money(world.money.state, world.tenant)
    before = await world.call(10)
    at = world.money.now
    await world.snapshot()
    await world.call(20)
    await world.money.raw("DEL", *keys.ledger(world.tenant))
    await world.call(40)  # it goes on
    await world.rebuild()
    file = tmp_path / "bill"
    file.write_text(
        "".join(
            f'{{"request_id": "{rid}.1", "model": "m", "endpoint": "e", "input_tokens": 1, "output_tokens": 1,'
            f' "cost_nano_usd": {cost}}}\n'
            for rid, cost in world.bill.items()
        )
    )
    found = await reconcile(world.money.state, world.settings, file, Options(), print)
    assert (found.difference, found.kinds["right"].calls) == (0, 3)
    record = UsageRecord(
        tenant=world.tenant, rid=before, call=1, key=KEY, user="", day=0, model="m", endpoint="e", cost=10,
        estimated=False, line="", at=at,
    )  # fmt: skip
    (again,) = await late.post(world.money.state.ledger, [record], at + HOUR, HOUR)
    assert isinstance(again, late.Untold)
    await world.is_the_bill()
