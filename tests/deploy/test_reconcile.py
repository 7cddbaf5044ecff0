"""`hotpath reconcile`: after it the books are the bill, and a second run finds nothing (I1); real Lua, real files."""

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from deploy.cli.admin import Failed
from deploy.cli.bill import Bill
from deploy.cli.reconcile import Options, Report, run, span
from shared.state import keys, ledger
from shared.state.audit import audit
from shared.state.redis import State
from tests.state.rig import DAY, HOUR, KEY, MINUTE, Money, new_rid, settings_for


@pytest.fixture
async def money(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Money]:
    """The ledger of a tenant of its own, which the registry knows."""
    monkeypatch.setattr(ledger, "POST_TIMEOUT", 10.0)
    state = await State.connect(settings_for(valkey_url))
    made = await state.create_key(f"reconcile-{new_rid()[:8]}")
    yield Money(state, made.tenant_id)
    await state.close()


@pytest.fixture
def name(money: Money) -> str:
    return money.tenant


def line(rid: str, cost: int, call: int = 1) -> str:
    return json.dumps(
        {"request_id": f"{rid}.{call}", "model": "m", "endpoint": "e", "input_tokens": 1, "output_tokens": 1,
         "cost_nano_usd": cost}
    )  # fmt: skip


class Office:
    """Reconciles the tenant's books with bills."""

    def __init__(self, money: Money, folder: Path) -> None:
        self.money = money
        self.file = folder / "bill.jsonl"
        self.settings = settings_for("redis://127.0.0.1:1/0", NATS_URL="nats://127.0.0.1:1")
        self.said: list[str] = []

    async def __call__(self, lines: Iterable[str], **options: Any) -> Report:
        self.file.write_text("".join(each + "\n" for each in lines))
        (name,) = [each.tenant for each in await self.money.state.admin.list_tenants(self.money.tenant)]
        return await run(self.money.state, self.settings, self.file, Options(tenant=name, **options), self.said.append)


@pytest.fixture
def office(money: Money, tmp_path: Path) -> Office:
    return Office(money, tmp_path)


def kinds(report: Report) -> dict[str, tuple[int, int]]:
    return {kind: (each.calls, each.difference) for kind, each in report.kinds.items() if each.calls}


async def call(
    money: Money, cost: int | None = 60, *, estimated: bool = False, ttl: int = HOUR, amount: int = 100
) -> str:
    """A request with one call, settled or left open."""
    rid = new_rid()
    await money.reserve(rid, amount=amount, ttl=ttl, user="")
    await money.dispatch(rid)
    if cost is not None:
        await money.settle(rid, cost=cost, estimated=estimated)
    return rid


async def test_each_kind_is_put_right_and_a_second_run_finds_nothing(money: Money, office: Office) -> None:
    """Every state a call can be left in; afterwards journal, balances and entries agree with the bill."""
    bound, _ = await call(money, None, ttl=MINUTE), await call(money, None, ttl=MINUTE)
    await money.age(MINUTE + 10_001)
    await money.expire()
    await money.age(DAY + 1)
    await money.expire()
    doubtful = await call(money, None, ttl=MINUTE)
    await money.age(MINUTE + 10_001)
    await money.expire()
    voided = new_rid()
    await money.reserve(voided)
    await money.void(voided)
    twice = await call(money)
    right, wrong = await call(money), await call(money)
    guessed, misjudged = await call(money, estimated=True), await call(money, estimated=True)
    bill = {
        (right, 1): 60, (guessed, 1): 60, (misjudged, 1): 45, (wrong, 1): 70, (doubtful, 1): 33, (bound, 1): 90,
        (voided, 1): 20, (twice, 1): 60, (twice, 2): 5,
    }  # fmt: skip
    running = await call(money, None)
    lines = [line(rid, cost, n) for (rid, n), cost in bill.items()]
    before = await money.held()
    tried = await office([*lines, line(running, 9)], dry_run=True)
    assert await money.held() == before
    found = await office([*lines, line(running, 9)])
    assert kinds(found) == kinds(tried) == {
        "right": (2, 0), "estimated": (2, -15), "wrong": (1, 10), "unconfirmed": (1, 33), "bound": (1, -10),
        "unbooked": (2, 25), "running": (1, 0),
    }  # fmt: skip
    assert (found.difference, found.lines, found.billed) == (43, 10, sum(bill.values()) + 9)
    assert [(each["request"], each["why"]) for each in found.waiting.told] == [(f"{running}.1", "running")]
    again = await office([*lines, line(running, 9)])
    assert (again.difference, kinds(again)) == (0, {"right": (9, 0), "running": (1, 0)})
    # one call at its bound is not on the bill: it is told, and left
    assert [(each["why"], each["amount"]) for each in again.unbilled.told] == [("bound", 100)]
    assert await money.held() == (sum(bill.values()) + 100, 100, 0)
    assert (await audit(money.state.ledger, money.tenant)).differences == []


async def test_calls_whose_entry_is_forgotten(money: Money, office: Office) -> None:
    """The bill comes a day later: the journal's last line on the call says what was posted, to whom and when."""
    wrong, guessed, right, voided = await call(money), await call(money, estimated=True), await call(money), new_rid()
    await money.reserve(voided)
    await money.void(voided)
    await money.age(25 * HOUR)  # what was estimated is remembered for a day
    await money.expire()
    assert await money.entries() == []
    lines = [line(wrong, 61), line(guessed, 50), line(right, 60), line(voided, 7)]
    found = await office(lines)
    assert kinds(found) == {"right": (1, 0), "wrong": (1, 1), "estimated": (1, -10), "unbooked": (1, 7)}
    assert (await office(lines)).difference == 0
    await money.age(2 * HOUR)
    await money.expire()
    again = await office(lines)
    assert (again.difference, kinds(again)) == (0, {"right": (4, 0)})
    assert await money.held() == (178, 0, 0)
    assert (await money.levels(f"k:{KEY}"))["day"].settled == 178
    assert (await audit(money.state.ledger, money.tenant)).differences == []


async def test_a_call_that_was_posted_twice_is_given_back(money: Money, office: Office) -> None:
    """A settlement that came after its tombstone: verify names it, reconcile takes the second one back."""
    rid = await call(money)
    for _ in range(2):
        await money.age(2 * HOUR)
        await money.expire()
        await money.settle(rid, cost=60)
    waiting = await office([line(rid, 60)])  # the entry knows of the last one alone: not right, and not by how much
    assert (kinds(waiting), waiting.waiting.calls) == ({"later": (1, 0)}, 1)
    await money.age(2 * HOUR)
    await money.expire()
    assert (await money.held())[0] == 180
    found = await office([line(rid, 60)])
    assert (kinds(found), await money.held()) == ({"wrong": (1, -120)}, (60, 0, 0))
    assert (await office([line(rid, 60)])).difference == 0


async def test_unknown_calls_are_never_posted_unasked(money: Money, office: Office) -> None:
    """Another gateway's, or of before the journal: listed; charged to a tenant only when told to."""
    known, strange = await call(money), new_rid()
    lines = [line(known, 60), line(strange, 500)]
    found = await office(lines)
    assert (found.difference, kinds(found)) == (0, {"right": (1, 0), "unknown": (1, 500)})
    assert [each[:20] for each in office.said] == ["NATS does not answer"]  # the second copy may have known it
    assert [each["request"] for each in found.unknown.told] == [f"{strange}.1"]
    assert (await money.held())[0] == 60
    (name,) = [each.tenant for each in await money.state.admin.list_tenants(money.tenant)]
    assert (await office(lines, post_unknown=name)).difference == 500
    assert (await money.held())[0] == 560
    assert kinds(await office(lines, post_unknown=name)) == {"right": (2, 0)}


async def test_a_call_that_may_be_known_is_not_posted_as_an_unknown_one(money: Money, office: Office) -> None:
    """One of another tenant's, when the bill is held against one tenant's books; and one that was forgotten."""
    (name,) = [each.tenant for each in await money.state.admin.list_tenants(money.tenant)]
    other = Money(money.state, (await money.state.create_key(f"other-{new_rid()[:8]}")).tenant_id)
    theirs = line(await call(other), 60)
    assert (await office([theirs], post_unknown=name)).difference == 0
    assert (await money.held(), await other.held()) == ((0, 0, 0), (60, 0, 0))
    ledger_ = money.state.ledger
    ledger_._expiring = (*ledger_._expiring[:-1], 0)
    await money.settle(new_rid(), cost=5)
    await money.expire()
    await money.raw("XTRIM", keys.journal(money.tenant), "MINID", (await money.journal())[-1].id)
    with pytest.raises(Failed, match="may be forgotten ones"):
        await office([line(new_rid(), 7)], post_unknown=name)
    await money.raw("DEL", keys.journal(money.tenant))  # of the session's server: other tests post unknown calls
    assert (await money.held())[0] == 5


async def test_a_complete_bill_closes_what_it_does_not_mention(money: Money, office: Office) -> None:
    """Only what began and ended within its time, and was never certain. What was settled by the provider's own usage
    stays, as does a running call."""
    await call(money)
    await call(money, 50, estimated=True)
    doubtful = await call(money, None, ttl=MINUTE)
    await money.age(MINUTE + 10_001)
    await money.expire()
    await call(money, None)
    found = await office([])
    assert sorted((each["why"], each["amount"]) for each in found.unbilled.told) == [
        ("estimated", 50), ("unconfirmed", 100),
    ]  # fmt: skip
    assert (found.difference, found.closed.calls) == (0, 0)
    now = money.now
    early = await office([], complete=(0, now - 2 * HOUR))
    assert early.closed.calls == 0
    before = await office([], complete=(now + 1, now + 2 * HOUR))
    assert before.closed.calls == 0
    whole = await office([], complete=(0, now + 2 * HOUR), dry_run=True)
    assert (whole.closed.calls, whole.difference) == (2, -50)
    await office([], complete=(0, now + 2 * HOUR))
    assert await money.held() == (60, 100, 0)
    assert await money.settle(doubtful, cost=60) == "duplicate"
    assert (await office([], complete=(0, now + 2 * HOUR))).closed.calls == 0


async def test_a_bad_line_stops_everything(money: Money, office: Office) -> None:
    """Hostile files: each bad line is named; nothing is applied, unless they are to be left out."""
    rid = await call(money)
    lines = [line(rid, 61), "{", line(rid, 99), "", line(new_rid(), -5), "x" * 200_000, line(rid, 3, 2)]
    with pytest.raises(Failed) as failed:
        await office(lines)
    said = str(failed.value)
    assert said.startswith("4 bad lines in ")
    assert [each.strip().partition(":")[0] for each in said.splitlines()[1:]] == [
        "line 2",
        "line 3",
        "line 5",
        "line 6",
    ]
    assert "is on the bill before" in said
    assert (await money.held())[0] == 60
    found = await office(lines, skip_bad=True)
    assert (found.lines, found.bad, await money.held()) == (2, 4, (64, 0, 0))


async def test_one_at_a_time(money: Money, office: Office) -> None:
    """Two runs that correct a forgotten call by the same line of the journal would do it twice."""
    assert await money.state.ledger.claim("other", 60_000)
    try:
        with pytest.raises(Failed, match="another `hotpath reconcile`"):
            await office([])
        assert (await office([], dry_run=True)).difference == 0
        assert not await money.state.ledger.claim("third", 60_000)
        assert await money.state.ledger.claim("other", 60_000)
        await money.state.ledger.release("third")
    finally:
        await money.state.ledger.release("other")
    assert (await office([])).difference == 0


def test_a_million_lines_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Rows go to disk; whatever nobody asked for comes back in order, page by page."""
    file = tmp_path / "bill"
    rids = sorted(f"{n:032x}" for n in range(3000))
    file.write_text("".join(line(rid, n) + "\r\n" for n, rid in enumerate(rids)))
    bill = Bill()
    with file.open("rb") as lines:
        loaded = bill.load(lines, print)
    assert (loaded.lines, loaded.bad, loaded.total) == (3000, 0, sum(range(3000)))
    assert bill.of(rids[7]) == {1: 7}
    assert bill.of(rids[7]) == {}
    assert [each.rid for each in bill.rest()] == [rid for rid in rids if rid != rids[7]]
    bill.close()


@pytest.mark.parametrize(
    "text", ["", "now", "2026-11-26", "2026-11-26/2026-11-25", "2026-11-25/2999-01-01", "a/b", "1/2/3"]
)
def test_a_time_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="--complete"):
        span(text, 1_800_000_000_000)


def test_a_time() -> None:
    assert span("all", 5) == (0, 5)
    assert span("1970-01-02/1970-01-03T00:00:01+01:00", 10**12) == (86_400_000, 2 * 86_400_000 - 3_599_000)
