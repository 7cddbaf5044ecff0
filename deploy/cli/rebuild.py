"""What `hotpath ledger rebuild` does: gives Redis back what it lost with its host, from the second copy (DESIGN 4).

    the balances alone are gone          they are what the journal adds up to
    everything of a tenant is gone       the newest snapshot in the copy: what it had settled is added, its limits set
    lines of the journal are gone        (Redis came back from an older copy) each settlement that the copy has and the
                                         journal lacks is posted again, in its own period, as it was

Everything it does is an addition that is done once, or a settlement that its tombstone makes once; so the tenant may be
served meanwhile, and it may be run again. What was pending when everything went is not there any more: calls that were
under way post themselves; what was unconfirmed is posted, and named, for reconcile.
"""

from typing import Any, Final

import msgspec
from msgspec import Struct, field

from deploy.cli.admin import Failed, with_state
from deploy.cli.copy import Copy, CopyUnavailable, Snapshot, opened, snapshots
from deploy.cli.verify import examine
from deploy.cli.where import Where
from shared.core import money
from shared.core.journal import Replay, read_snapshot
from shared.core.transitions import POSTING, position
from shared.state.keys import OPAQUE
from shared.state.redis import State
from shared.wire.records import UsageRecord

#: A tenant that is served writes lines while its journal is replayed: so many times it is tried again.
TRIES: Final = 20


class Rebuilt(Struct):
    """What was done for one tenant; amounts in nano-USD. `snapshot`: the lost journal's line that was begun from."""

    tenant: str
    balances: bool = False  # the balances alone were lost, and are replayed
    snapshot: str = ""
    unconfirmed: int = 0  # posted from the snapshot: nobody knows any more whose calls they were
    settlements: int = 0
    amount: int = 0  # of these settlements
    waiting: int = 0  # settlements Redis never took: the guardians post them
    notes: list[str] = field(default_factory=list)


class _Books(Struct):
    """A tenant's books as they stand; of the journal's calls, those that are settled."""

    replay: Replay
    fields: dict[str, str]
    since: tuple[int, int]  # the line from which on the journal knows
    result: Rebuilt
    settled: set[bytes] = field(default_factory=set)
    bare: bool = False  # nothing is left to begin from
    trusted: bool = True  # the balances are what the journal adds up to

    def close(self) -> None:
        """Keep of the replay only what the records are held against."""
        self.trusted = not self.replay.differences(self.fields)
        self.settled = {_call(rid, n) for rid, n, call in self.replay.calls() if call.state == "settled"}
        last, self.replay = self.replay.last, Replay()
        self.replay.last = last

    def lacks(self, record: UsageRecord) -> bool:
        """Whether its settlement was lost."""
        return position(record.line) > self.since and _call(record.rid, record.call) not in self.settled


def _call(rid: str, number: int) -> bytes:
    return bytes.fromhex(rid) + bytes([number])


def rebuild(where: Where, tenant: str, *, dry_run: bool) -> dict[str, Any]:
    """{"dry_run", "tenants": [Rebuilt], "verify": what `ledger verify` says afterwards}. Raises Failed."""

    async def work(state: State) -> dict[str, Any]:
        try:
            async with opened(where.settings()) as copy:
                names, found = await run(state, copy, tenant, dry_run=dry_run)
        except CopyUnavailable as error:
            raise Failed(str(error)) from error
        checked = {} if dry_run else await examine(state, where.settings(), names)
        rows = [{**msgspec.to_builtins(each), "tenant": names[each.tenant]} for each in found]
        return {"dry_run": dry_run, "tenants": rows, "verify": checked}

    return with_state(where, work)


async def run(state: State, copy: Copy, tenant: str, *, dry_run: bool) -> tuple[dict[str, str], list[Rebuilt]]:
    """Rebuild a tenant by name or id, or all; names by id. Raises Failed, CopyUnavailable, StateUnavailable."""
    stored = await snapshots(copy)
    names = await _wanted(state, tenant, set(stored))
    if begun := await _begun(state, {each for each in names if each in stored}):
        stored |= await snapshots(copy, begun)
    books: dict[str, _Books] = {}
    for each in names:
        books[each] = await _begin(state, each, stored.get(each), dry_run=dry_run)
    async for record in copy.records():
        of_tenant = books.get(record.tenant)
        if of_tenant is None and record.tenant not in names and not tenant and OPAQUE.fullmatch(record.tenant):
            names[record.tenant] = record.tenant  # of a tenant of which nothing else is left
            of_tenant = books[record.tenant] = await _begin(state, record.tenant, None, dry_run=dry_run)
        if of_tenant is not None:
            await _post(state, of_tenant, record, dry_run=dry_run)
    return names, [each.result for each in books.values()]


async def _begun(state: State, tenants: set[str]) -> dict[str, str]:
    """The first lines of journals that began with nothing. A snapshot of before such a line is of a journal that was
    lost; those that the guardians wrote since must not stand before it."""
    found = {}
    for tenant in tenants:
        first = await state.ledger.journal(tenant=tenant, count=1)
        if first and first[0].op != "snap":
            found[tenant] = first[0].id
    return found


async def _wanted(state: State, tenant: str, stored: set[str]) -> dict[str, str]:
    """Ids and names; a tenant that the registry has lost goes by its id. Raises Failed."""
    names = {each.tenant_id: each.tenant for each in await state.admin.list_tenants()}
    names |= {each: each for each in stored if each not in names}
    if not tenant:
        return names
    found = {each: name for each, name in names.items() if tenant in {name, each}}
    if not found and OPAQUE.fullmatch(tenant):
        found = {tenant: tenant}
    if not found:
        raise Failed(f"there is no tenant {tenant}")
    return found


async def _begin(state: State, tenant: str, snapshot: Snapshot | None, *, dry_run: bool) -> _Books:
    """The tenant's balances, given back where they were lost. Raises Failed, StateUnavailable."""
    books = await _read(state, tenant)
    result = books.result
    if books.replay.lines and "about" not in books.fields:
        result.balances = True
        if not dry_run:
            await _until_still(state, tenant, _restore)
            books = await _read(state, tenant, result)
    if snapshot is not None and _was_lost(books, snapshot):
        result.snapshot = snapshot.line
        fields, result.unconfirmed = _of_snapshot(snapshot)
        if not dry_run:

            async def merge(state: State, books: _Books) -> str:
                if books.replay.restored:
                    return "merged"  # another rebuild was there first
                return await state.ledger.merge(
                    tenant=tenant, fields=fields, snapshot=snapshot.line, last=books.replay.last
                )

            await _until_still(state, tenant, merge)
            books = await _read(state, tenant, result)
        books.since = position(snapshot.line)
    bare = snapshot is None and not books.replay.lines
    books.close()
    books.bare = bare
    if not books.trusted:  # lines were lost whose money is in the balances: it would be posted twice
        result.notes.append("journal and balances differ, so nothing is posted: hotpath reconcile --bill FILE")
    return books


def _was_lost(books: _Books, snapshot: Snapshot) -> bool:
    """Whether the journal began anew, with nothing, after that snapshot was taken."""
    replay = books.replay
    if not replay.lines:
        return "about" not in books.fields
    anew = replay.whole and position(replay.first) > position(snapshot.line)
    return anew and replay.differences(books.fields) == []


async def _read(state: State, tenant: str, result: Rebuilt | None = None) -> _Books:
    """The books at one moment."""
    replay = Replay()
    while True:
        look = await state.ledger.look(tenant=tenant, after=replay.last)
        for line in look.lines:
            replay.feed(line)
        if look.whole:
            break
    return _Books(replay, look.fields, replay.since, result or Rebuilt(tenant))


async def _until_still(state: State, tenant: str, work: Any) -> None:
    """Try again while the journal moves on between its reading and the work. Raises Failed."""
    for _ in range(TRIES):
        if await work(state, await _read(state, tenant)) != "moved":
            return
    raise Failed(f"the journal of {tenant} does not stand still long enough; try again")


async def _restore(state: State, books: _Books) -> str:
    """The balances that the journal adds up to."""
    replay = books.replay
    fields = {name: " ".join(map(str, sums)) for name, sums in replay.balances.items()}
    fields |= {f"{level}:limit": " ".join(three) for level, three in replay.limits.items()}
    if users := sum(level.startswith("u:") for level in replay.limits):
        fields["users"] = str(users)
    return await state.ledger.restore(tenant=books.result.tenant, fields=fields, last=replay.last)


def _of_snapshot(snapshot: Snapshot) -> tuple[dict[str, str], int]:
    """Its balances without what was pending, and with what was unconfirmed posted; how much that was."""
    balances, limits = read_snapshot(snapshot.fields)
    fields = {name: f"{settled + unconfirmed} 0 0" for name, (settled, _, unconfirmed) in balances.items()}
    fields |= {f"{level}:limit": " ".join(three) for level, three in limits.items()}
    return fields, balances.get("t:lifetime", [0, 0, 0])[2]


async def _post(state: State, books: _Books, record: UsageRecord, *, dry_run: bool) -> None:
    """Its settlement again, if it was lost. Raises StateUnavailable."""
    result = books.result
    if not record.line:
        result.waiting += _call(record.rid, record.call) not in books.settled
        return
    if not books.trusted or not books.lacks(record):
        return
    if not dry_run:
        await _catch_up(state, books)  # a settlement that was tried again may have come meanwhile
        if not books.lacks(record):
            return
        done = await state.ledger.settle(
            tenant=record.tenant, rid=record.rid, call=record.call, cost=record.cost, estimated=record.estimated,
            key=record.key, user=record.user, day=record.day,
        )  # fmt: skip
        if not done.line:
            return
    if books.bare:
        books.bare = False
        result.notes.append("no snapshot is left: only what was settled lately is given back, and no limit")
    books.settled.add(_call(record.rid, record.call))
    result.settlements += 1
    result.amount += record.cost


async def _catch_up(state: State, books: _Books) -> None:
    """What the journal has got since."""
    while lines := await state.ledger.journal(tenant=books.result.tenant, after=books.replay.last):
        books.replay.last = lines[-1].id
        books.settled |= {_call(line.rid, line.call) for line in lines if line.op in POSTING}


def text(found: dict[str, Any]) -> str:
    """A line per tenant for which something was done, and what verify says."""
    lines = []
    would = "would be " if found["dry_run"] else ""
    for row in found["tenants"]:
        said = []
        if row["balances"]:
            said.append(f"the balances {would}replayed from the journal")
        if row["snapshot"]:
            said.append(f"the snapshot of line {row['snapshot']} {would}added")
        if row["settlements"]:
            said.append(f"{row['settlements']} settlements {would}posted again, {money.show_usd(row['amount'])}")
        lines.append(f"{row['tenant']}: {'; '.join(said) or 'nothing is lost'}")
        if row["unconfirmed"]:
            lines.append(
                f"  {money.show_usd(row['unconfirmed'])} was unconfirmed and is posted; nobody knows any more for which"
                " calls: look for them among the unknown ones of `hotpath reconcile`"
            )
        if row["waiting"]:
            lines.append(f"  {row['waiting']} settlements are on their way: the guardians post them")
        lines += [f"  {note}" for note in row["notes"]]
    return "\n".join(lines)
