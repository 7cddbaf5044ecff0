"""`python -m tests.bench.money`: was every call of the benchmark settled at what the mock upstream's usage costs?

The mock says 42 prompt tokens, and 40 completion tokens for a whole answer or 60 for a stream. So each settled call
costs one of two amounts; a stream that the load generator left at its end is marked estimated and counted apart; the
balance of the day is the sum of all; nothing is pending or unconfirmed; and no request that the harness counted is
missing. Starts the Valkey of each run's data directory for as long as it looks.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from deploy import servers
from deploy.cli import where
from shared.state.base import Level, StateUnavailable
from shared.state.ledger import Entry
from shared.state.redis import State
from tests.bench.start import KEY

TENANT: Final = "default"
#: Nano-USD at the catalogue's prices (start.py): 42 x $0.15 and the output x $0.60, per million.
WHOLE: Final = 42 * 150 + 40 * 600
STREAM: Final = 42 * 150 + 60 * 600
#: The ledger forgets a settled call after ten minutes; a longer run's balance can only be compared one way.
MAX_CALLS: Final = 10_000_000
LOADING_S: Final = 60


class Books(Struct, kw_only=True):
    """One run: how many calls of each kind, and everything that is wrong."""

    calls: Counter[str]
    settled: int
    wrong: list[str]


def audit(entries: list[Entry], levels: list[Level], *, whole: int = WHOLE, stream: int = STREAM) -> Books:
    """Compare. Pure: what the ledger says in, the findings out."""
    calls: Counter[str] = Counter()
    wrong: list[str] = []
    for entry in entries:
        if entry.state == "voided":
            kind = "voided"
        elif entry.state != "settled":
            kind = entry.state
            wrong.append(f"{entry.rid} call {entry.call} is {entry.state}")
        elif entry.estimated:
            kind = "estimated"
        elif entry.cost in {whole, stream}:
            kind = "whole" if entry.cost == whole else "stream"
        else:
            kind = "odd"
            wrong.append(f"{entry.rid} call {entry.call} was settled at {entry.cost} nano-USD")
        calls[kind] += 1
    days = [level for level in levels if level.period == "day"]
    settled = sum(level.settled for level in days)
    total = sum(entry.cost for entry in entries if entry.state == "settled")
    if settled != total:
        wrong.append(f"the day says {settled} nano-USD, its calls add up to {total}")
    if not any(level.limit for level in days):
        wrong.append("the tenant had no limit per day: another case was measured")
    wrong += [f"{level.period}: {level.pending} pending" for level in levels if level.pending]
    wrong += [f"{level.period}: {level.unconfirmed} unconfirmed" for level in levels if level.unconfirmed]
    return Books(calls=calls, settled=settled, wrong=wrong)


async def _connect(found: where.Where) -> State:
    """Valkey accepts connections while it still loads what a run has left (a hundred thousand calls take seconds)."""
    until = time.monotonic() + LOADING_S
    while True:
        try:
            return await State.connect(found.settings())
        except StateUnavailable as error:
            if "LOADING" not in str(error) or time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


async def _read(found: where.Where) -> tuple[list[Entry], list[Level]]:
    state = await _connect(found)
    try:
        entries = await state.ledger.entries(tenant=TENANT, at_most=MAX_CALLS)
        return entries, await state.ledger.balances(tenant=TENANT)
    finally:
        await state.close()


def _redis_conf(path: Path) -> dict[str, str]:
    """`name value` lines of a Valkey configuration."""
    pairs = [line.split(maxsplit=1) for line in path.read_text().splitlines()]
    return {pair[0]: pair[1].strip('"') for pair in pairs if len(pair) == 2}


def look(data: Path) -> Books:
    """The books of one run's data directory."""
    conf = _redis_conf(data / "redis.conf")
    port, command = int(conf["port"]), [servers.valkey_binary(), str(data / "redis.conf")]
    with servers.running(command, port, data / "money.log"):
        url = f"redis://:{conf['requirepass']}@127.0.0.1:{port}/0"
        found = where.find(str(data), {"GATEWAY_API_KEY": KEY, "REDIS_URL": url})
        return audit(*asyncio.run(_read(found)))


def counted(results: Path) -> int:
    """Requests and streams of Hotpath that the harness saw to their end, over all repeats."""
    total = 0
    for line in results.read_text().splitlines():
        run: dict[str, Any] = json.loads(line)
        if run["name"] == "hotpath":
            total += sum(case.get("requests") or case.get("ok") or 0 for case in run["cases"].values())
    return total


def main(argv: list[str] | None = None) -> int:
    out = os.environ.get("BENCH_OUT") or str(Path(tempfile.gettempdir()) / "bench-out")
    parser = argparse.ArgumentParser(prog="python -m tests.bench.money", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(out), help="the harness's output folder")
    chosen = parser.parse_args(argv)
    runs = sorted((chosen.out / "hotpath").glob("[0-9]*"), key=lambda path: int(path.name))
    calls: Counter[str] = Counter()
    wrong: list[str] = []
    for data in runs:
        began = time.perf_counter()
        books = look(data)
        calls += books.calls
        wrong += [f"run {data.name}: {line}" for line in books.wrong]
        print(f"run {data.name}: {dict(books.calls)}, {books.settled} nano-USD ({time.perf_counter() - began:.1f} s)")
    results = chosen.out / "results.jsonl"
    expected = counted(results) if results.exists() else 0
    if calls["whole"] + calls["stream"] < expected:
        wrong.append(f"the harness counted {expected} answers, the ledger only {calls['whole'] + calls['stream']}")
    print(f"{len(runs)} runs: {dict(calls)}; the harness counted {expected}")
    for line in wrong[:20]:
        print("WRONG", line)
    return 1 if wrong or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
