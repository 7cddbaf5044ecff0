"""What must be true of a tenant's books when all has come to rest, by Hotpath's own commands and the provider's bill.

verify        journal == balances, entries == what is held, no lease too old, no admission past a limit at any line
the bill      no call below it, those whose usage was seen exactly at it; unconfirmed only calls whose worker died
reconcile     closes and corrects the rest; the second time there is nothing left to do
the bill      settled == the bill, to the nano-USD, and nothing is held any more
"""

import asyncio
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e import books
from tests.e2e.rig import Up
from tests.e2e.sim import until

#: Of the longest request in these tests, and the grace of its lease.
LAST_DEADLINE_S = 15.0


def verify(up: Up, tenant: str) -> dict[str, Any]:
    """`hotpath ledger verify`: what it says. Raises AssertionError with its differences."""
    done = up.cli_run("ledger", "verify", tenant, "--json")
    assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def reconcile(up: Up, tenant: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """`hotpath reconcile --bill` with the provider's export of these calls: what it says."""
    names = ("request_id", "model", "endpoint", "input_tokens", "output_tokens", "cost_nano_usd")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bill.jsonl")
        rows = ({"endpoint": "sim", **{name: line[name] for name in names if name in line}} for line in lines)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found: dict[str, Any] = up.cli("reconcile", "--bill", str(path), "--tenant", tenant, "--complete", "all")
    return found


def closed(found: dict[str, Any]) -> bool:
    """Whether nothing is left that the bill does not mention."""
    open_calls: int = found["unbilled"]["calls"] - found["closed"]["calls"]
    return open_calls == 0


async def prove(up: Up, tenant: str, bill: list[dict[str, Any]]) -> Counter[str]:
    """All of the above, in this order, for a tenant whose calls are these; what was closed and corrected, counted."""
    counts: Counter[str] = Counter()
    await asyncio.to_thread(verify, up, tenant)
    first = await asyncio.to_thread(reconcile, up, tenant, bill)
    # a lost call may have been running until its deadline: no bill is complete before
    await asyncio.to_thread(until, lambda: reconcile(up, tenant, bill), closed, LAST_DEADLINE_S, 1.0)
    again = await asyncio.to_thread(reconcile, up, tenant, bill)
    assert again["difference"] == 0, again
    await asyncio.to_thread(verify, up, tenant)
    row = await asyncio.to_thread(books.level, up, tenant)
    assert row["settled"] == sum(line["cost_nano_usd"] for line in bill), ("not the bill", row, first, again)
    assert (row["pending"], row["unconfirmed"]) == (0, 0), (row, first)
    counts["nano-USD put right by reconcile"] = abs(first["difference"])
    return counts
