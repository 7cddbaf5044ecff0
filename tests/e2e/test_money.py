"""Acceptance 4: after a mixed load the ledger and the provider's own bill agree, call by call (I1, I3, D1..D3).

2,000 requests; HOTPATH_SOAK=1 makes it 20,000. `-s` shows progress and the counts per class.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Struct

from tests.e2e.books import OUTPUT_NANO, Entry, entries, settled_level
from tests.e2e.drive import Client, Seen
from tests.e2e.mixed import Case, cases, run
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

REQUESTS = 20_000 if os.environ.get("HOTPATH_SOAK") else 2_000
#: Output tokens that a stream may have had on its way when it was cut; of a whole answer all up to its cap.
IN_FLIGHT, CAP = 32, 4096
LEASE_S = 10 + 1 + 5  # X-Timeout-Ms, LEDGER_LEASE_GRACE_MS, and the 5 s of I3


class Tally(Struct):
    """What the load did."""

    done: list[tuple[Case, Seen]]

    def count(self) -> Counter[str]:
        """Requests per class and outcome."""
        return Counter(f"{case.kind}: {outcome(seen)}" for case, seen in self.done)


def outcome(seen: Seen) -> str:
    """How it went for the client."""
    if seen.left:
        return "left" if seen.status else "left before the head"
    if seen.ended_well:
        return "ended well"
    return f"{seen.status} {seen.error.get('code')}" if not seen.broken else "connection lost"


async def load(client: Client, count: int, seed: int) -> Tally:
    """Run the mixed load, with progress."""
    tally = Tally([])
    async for pair in run(client, cases(count, seed), concurrency=32):
        tally.done.append(pair)
        if len(tally.done) % (count // 10) == 0:
            print(f"{len(tally.done)} of {count}")
    return tally


def check_terminals(tally: Tally) -> None:
    """I4: who stayed saw exactly one end, a good one exactly where one was due."""
    for case, seen in tally.done:
        if seen.left:
            continue
        assert not seen.broken, (case, seen)
        if seen.streamed:
            assert seen.terminals == 1, (case, seen.body[-400:])
        if case.kind in ("whole", "streamed", "several choices", "tools"):
            assert seen.ended_well, (case, seen.status, seen.error, seen.body[-400:])
        elif not case.leaves:
            assert not seen.ended_well, (case, seen.body[-400:])
            assert seen.error["message"]


def check_call(entry: Entry, line: dict[str, Any], inexact: bool) -> None:
    """One call: exact unless it was cut or left; then at its bill or above, and marked."""
    assert entry.state == "settled", (entry, line)
    if line["complete"] and not inexact:
        assert not entry.estimated, (entry, line)
    if not entry.estimated:
        assert entry.cost == line["cost_nano_usd"], (entry, line)
    assert entry.cost >= line["cost_nano_usd"], (entry, line)


@pytest.mark.timeout(90 if REQUESTS == 2_000 else 1200)
async def test_settled_is_the_bill(up: Up, sim: Sim, tenant: Callable[..., Any], http: Any) -> None:
    """Settled == the bill to the nano-USD where usage was seen; the rest is estimated, above, and no more than cut."""
    made = await asyncio.to_thread(tenant)
    tally = await load(Client(http, up.url, made["key"]), REQUESTS, seed=20)
    for name, count in sorted(tally.count().items()):
        print(f"{count:6} {name}")
    check_terminals(tally)

    row = await asyncio.to_thread(settled_level, up, made["tenant"], LEASE_S)
    assert (row["pending"], row["unconfirmed"]) == (0, 0)
    assert await asyncio.to_thread(sim.wait, 5000, in_flight=0)
    booked = await asyncio.to_thread(entries, up, made["tenant"])
    lines = {line["request_id"]: line for line in await asyncio.to_thread(sim.bill)}
    assert lines.keys() <= booked.keys(), "the provider billed a call that the ledger does not know"

    by_rid = {seen.rid: (case, outcome(seen)) for case, seen in tally.done if seen.rid}
    ended = {seen.rid for _, seen in tally.done if seen.ended_well}
    for label, line in lines.items():
        rid = label.partition(".")[0]
        check_call(booked[label], line, inexact=rid not in ended)
    for label, entry in booked.items():
        if label not in lines:
            assert entry.cost == 0, (entry, by_rid.get(entry.rid))

    estimated = [label for label, entry in booked.items() if entry.estimated]
    billed = [label for label in estimated if label in lines]
    over = {label: (booked[label].cost - lines[label]["cost_nano_usd"]) // OUTPUT_NANO for label in billed}
    for label, tokens in over.items():
        assert tokens <= (IN_FLIGHT if lines[label]["stream"] else CAP), (booked[label], lines[label])
    off = [label for label, line in lines.items() if not line["complete"] or label.partition(".")[0] not in ended]
    states = Counter(entry.state for entry in booked.values())
    print(f"{len(booked)} calls booked {dict(states)}, {len(lines)} billed, {len(estimated)} estimated")
    print(f"{len(off)} cut or left; tokens held above the bill: {dict(sorted(Counter(over.values()).items()))}")
    for label in set(estimated) - set(off):
        raise AssertionError((booked[label], lines.get(label), by_rid.get(label.partition(".")[0])))
    assert 0 < len(estimated) <= REQUESTS / 4
    assert row["settled"] == sum(entry.cost for entry in booked.values())
    exact = [label for label in lines if not booked[label].estimated]
    assert sum(booked[label].cost for label in exact) == sum(lines[label]["cost_nano_usd"] for label in exact)
    assert len(exact) > REQUESTS / 2
