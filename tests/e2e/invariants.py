"""One checker for DESIGN 6 after any run: what clients saw, Hotpath's books, the simulator's bill, logs, processes.

    before = baseline(up)
    ... ask, kill, freeze; keep an Asked for every request, also for those that failed ...
    counts = await check(up, sim, made, asked, before, dead=instances_of(...))
    print(counts)

Each invariant that does not hold raises AssertionError with what is needed to look into it; what holds is counted, so
that a run that checked nothing shows. Prompts name their seed (`[[sim chunks=20 seed=7]]`, see `prompt`): the text that
the provider says is then known to the word (I5), and no two requests say the same (I6).
"""

import asyncio
import itertools
import json
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import redis
from msgspec import Struct

from deploy.cli import credentials
from deploy.simulator import words
from tests.e2e.books import Entry, entries, settled_level
from tests.e2e.drive import Seen
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

MAX_CALLS = 3  # ROUTING_MAX_RETRIES + 1
#: I3: no reservation outlives its lease by more.
LEASE_SLACK_S = 5.0
#: A trailing comparison of descriptors allows for a pool's idle connections and an open log.
SPARE_FDS = 24

_seeds = itertools.count(1000)
_DIRECTIVE = re.compile(r"\[\[sim ([^\]]*)\]\]")
_METRIC = re.compile(r"^hotpath_in_flight\{[^}]*\} ([0-9.]+)$", re.MULTILINE)


class Asked(Struct, kw_only=True):
    """One request and what came of it. `may_fail`: its error is not the gateway's fault (an injected upstream fault,
    a refusal that was asked for); its terminal and its money are checked all the same."""

    prompt: str
    seen: Seen
    at: float = 0.0  # monotonic seconds when it was asked
    may_fail: bool = False


class Baseline(Struct):
    """What the processes had before the run."""

    fds: dict[int, int]


def prompt(chunks: int, **options: int) -> str:
    """A prompt whose answer is known and nobody else's."""
    told = {"chunks": chunks, "seed": next(_seeds), **options}
    return "[[sim " + " ".join(f"{name}={value}" for name, value in told.items()) + "]]"


def text_of(asked: str) -> str | None:
    """What the simulator says to a prompt; None when its seed is not told, or it calls tools."""
    match = _DIRECTIVE.search(asked)
    told = dict(pair.split("=") for pair in match[1].split()) if match else {}
    if "seed" not in told or "tools" in told:
        return None
    return "".join(words.text(int(told["seed"]), int(told.get("chunks", 16)), mixed=told.get("mixed") == "1"))


def baseline(up: Up) -> Baseline:
    """Before the run, all quiet."""
    return Baseline({pid: descriptors(pid) for pid in _workers(up)})


async def check(
    up: Up, sim: Sim, made: dict[str, Any], asked: list[Asked], before: Baseline | None = None, *,
    dead: bool = False, lease_s: float = 16.0, spare_fds: int = SPARE_FDS,
) -> Counter[str]:  # fmt: skip
    """Wait until the money has come to rest, then check everything about one tenant's requests.

    `made`: the tenant, as the `tenant` fixture makes it; nobody else may have used it, and the simulator's bill starts
    with these requests. `dead`: a process died or stood still, so that calls may be unconfirmed, and requests may have
    been answered with an error where that was promised (the caller checks which). `lease_s`: the longest lease, the
    grace and I3's 5 s. `spare_fds`: so many descriptors more than before are no leak.
    """
    row = await asyncio.to_thread(settled_level, up, made["tenant"], lease_s)
    assert await asyncio.to_thread(sim.wait, 7000, in_flight=0), "an upstream call goes on for nobody"
    booked = await asyncio.to_thread(entries, up, made["tenant"])
    lines = await asyncio.to_thread(sim.bill)
    counts: Counter[str] = Counter()
    counts += check_clients(asked, dead=dead)
    counts += check_money(booked, lines, row, dead=dead)
    counts += check_calls(lines)
    await asyncio.to_thread(check_leases, up, made)
    counts += await asyncio.to_thread(check_secrets, up, made)
    await asyncio.to_thread(check_baseline, up, before, spare_fds=spare_fds)
    return counts


# ---- I4, I5, I6: what clients saw ------------------------------------------------------------------------------------


def check_clients(asked: list[Asked], *, dead: bool = False) -> Counter[str]:
    """Exactly one terminal each; the text a prefix of the provider's, all of it when it ended well."""
    counts: Counter[str] = Counter()
    for one in asked:
        seen = one.seen
        if seen.left:
            counts["left"] += 1
            continue
        assert not seen.broken, ("the connection ended before the answer did", one)
        if seen.streamed:
            assert seen.terminals == 1, ("terminals", seen.terminals, one.prompt, seen.rid, seen.body[-600:])
        counts["ended well" if seen.ended_well else f"{seen.status} {seen.error.get('code')}"] += 1
        if not seen.ended_well:
            assert seen.error.get("message"), (one, seen.body[-600:])
            assert seen.status != 500, one
            assert dead or one.may_fail, ("failed", one.prompt, seen.rid, seen.status, seen.error)
        check_text(one)
    return counts


def check_text(one: Asked) -> None:
    """I5, I6."""
    expected, seen = text_of(one.prompt), one.seen
    if expected is None or seen.status != 200 or not (seen.streamed or seen.ended_well):
        return
    got = seen.text
    assert expected.startswith(got), ("not the provider's text", one.prompt, seen.rid, got[-200:])
    if seen.ended_well:
        assert got == expected, ("cut in silence", one.prompt, seen.rid, len(got), len(expected))


# ---- I1, I2, I7: the bill --------------------------------------------------------------------------------------------


def check_money(
    booked: dict[str, Entry], lines: list[dict[str, Any]], row: dict[str, Any], *, dead: bool
) -> Counter[str]:
    """By class: seen usage is the bill to the nano-USD; the rest is held at no less; nothing is pending."""
    bill = {line["request_id"]: line for line in lines}
    assert len(bill) == len(lines), "two upstream calls with the same (rid, call)"
    assert bill.keys() <= booked.keys(), ("billed, but not in the ledger", list(bill.keys() - booked.keys())[:5])
    assert row["pending"] == 0, row
    counts: Counter[str] = Counter()
    for label, entry in booked.items():
        line = bill.get(label)
        billed = line["cost_nano_usd"] if line else 0
        if entry.state == "unconfirmed":
            assert dead, ("unconfirmed, but nobody died", entry, line)
            assert entry.amount >= billed, ("held below the bill", entry, line)
        elif entry.state == "settled":
            assert entry.cost >= billed, ("settled below the bill", entry, line)
            if not entry.estimated:
                assert entry.cost == billed, ("settled at another amount than the bill", entry, line)
        else:
            assert entry.state == "voided", entry
            assert line is None, ("voided, but billed", entry, line)
        counts[f"calls {entry.state}{' (estimated)' if entry.estimated else ''}"] += 1
    assert row["unconfirmed"] == sum(entry.amount for entry in booked.values() if entry.state == "unconfirmed"), row
    assert row["settled"] == sum(entry.cost for entry in booked.values() if entry.state == "settled"), row
    if row["limit"] is not None:
        assert row["settled"] + row["unconfirmed"] <= row["limit"], ("past the limit", row)
    counts["calls billed"] = len(bill)
    return counts


def check_calls(lines: list[dict[str, Any]]) -> Counter[str]:
    """I7: never more calls than the Plan allows, numbered from 1."""
    of: dict[str, list[int]] = {}
    for line in lines:
        rid, _, call = line["request_id"].rpartition(".")
        of.setdefault(rid, []).append(int(call))
    for rid, calls in of.items():
        assert len(calls) <= MAX_CALLS, (rid, calls)
        assert max(calls) <= MAX_CALLS, (rid, calls)
    return Counter({"requests with several calls": sum(len(calls) > 1 for calls in of.values())})


def check_leases(up: Up, made: dict[str, Any]) -> None:
    """I3: no lease that holds money is older than 5 s past its time. Looks at Redis itself."""
    with redis.Redis.from_url(up.run["redis_url"]) as server:
        seconds, micros = server.time()
        now = seconds * 1000 + micros // 1000
        key = f"hp:{{{made['tenant_id']}}}:lease"
        due = server.zrangebyscore(key, "-inf", now - LEASE_SLACK_S * 1000)
        held = {
            rid.hex(): raw for rid in due if (raw := server.hget(f"hp:{{{made['tenant_id']}}}:ent", rid)) is not None
        }
    assert not held, ("leases past their time", held)


# ---- I8, I9: what is left behind -------------------------------------------------------------------------------------


def check_baseline(up: Up, before: Baseline | None, within: float = 8.0, spare_fds: int = SPARE_FDS) -> None:
    """Nothing in flight anywhere; the processes that lived through it have their descriptors back."""
    end = time.monotonic() + within
    while True:
        busy = {url: number for url in _metrics(up) if (number := _in_flight(url))}
        grown = {
            pid: (count, now)
            for pid, count in (before.fds if before else {}).items()
            if (now := descriptors(pid)) > count + spare_fds
        }
        if not busy and not grown:
            return
        assert time.monotonic() < end, ("still in flight, or descriptors not given back", busy, grown)
        time.sleep(0.1)


def check_secrets(up: Up, made: dict[str, Any]) -> Counter[str]:
    """I9: no secret of ours, no tenant's key, no prompt in any log or in what `hotpath up` printed after its banner."""
    secrets = {name: value for name, value in credentials.read(up.data / "secrets.env").items() if len(value) >= 16}
    secrets["tenant key"] = made["key"]
    secrets["a prompt"] = "[[sim "
    logs = [path for path in (up.data / "logs").iterdir() if path.is_file()]
    for path in logs:
        text = path.read_text(errors="replace")
        found = [name for name, value in secrets.items() if value in text]
        assert not found, (path.name, found)
    return Counter({"logs searched": len(logs)})


def _workers(up: Up) -> list[int]:
    run = up.run["pids"]
    return [pid for role in ("ingress", "guardian", "routing", "provider") for pid in run[role]]


def _metrics(up: Up) -> list[str]:
    return [url for urls in up.run["metrics"].values() for url in urls]


def _in_flight(url: str) -> float:
    """Requests in flight in the process behind a metrics URL; 0 when it is gone."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return sum(map(float, _METRIC.findall(answer.read().decode())))
    except OSError:
        return 0.0


def descriptors(pid: int) -> int:
    """How many a process has open; 0 when it is gone."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def show(counts: Counter[str]) -> str:
    """One line a count."""
    return "\n".join(f"{number:8} {name}" for name, number in sorted(counts.items()))


def traced(up: Up, rid: str) -> Any:
    """`hotpath trace` of a request that went wrong, for an assert's message."""
    return json.dumps(up.cli_run("trace", rid).stdout)
