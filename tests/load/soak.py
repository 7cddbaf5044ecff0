"""`python -m tests.load soak`: many requests at full speed, and whether anything grows (I8).

It starts a Hotpath with a NATS of its own (for /varz) that forgets settled requests after 20 s, asks 200,000 requests
(hammer.py) in twenty batches, and looks after each, a moment later, at every process, Redis and NATS: what follows the
load is then at rest. A number is flat when its growth over the last half, by the Theil-Sen estimator (the median of the
slopes of all pairs of samples: one garbage collection, one busy neighbour do not bend it) times the length of that
half, is within the allowance of its kind:

    RSS            32 bytes a request of that half, at least 3 MiB: the smallest object Python can leak has 48
    descriptors,   4: beats, polls, the scrape itself (without the upstream connections, which are the next line)
      tasks, ...
    upstream       64, the requests in flight: a burst's connections are kept idle for 15 s, some rests find more;
      connections  at the end all of them must be given back, within EMPTY_S
    Redis          entries and leases for each request of the last 20 s (not those shed with 503): 0.25;
                   used_memory a quarter of its median and 2 MiB; keys 0
    NATS           connections and subscriptions 0, memory as RSS

The usage stream of JetStream is meant to grow, up to its own bounds (USAGE_RETENTION_MS, USAGE_MAX_BYTES).
"""

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Final

import redis
import uvloop
from rich.console import Console
from rich.table import Table

from deploy import servers
from tests.e2e.rig import Up
from tests.load.hammer import Hammer

ROLES: Final = ("ingress", "guardian", "routing", "provider")
TOMBSTONE_S: Final = 20.0
#: Settled requests are forgotten after that, and the journal is as long as it becomes; no circuit opens for the faults
#: that are asked for.
SETTINGS: Final = {
    "LEDGER_TOMBSTONE_MS": "20000", "LEDGER_UNCONFIRMED_MS": "20000", "LEDGER_LEASE_GRACE_MS": "1000",
    "CIRCUIT_FAILURE_THRESHOLD": "1000000", "LEDGER_JOURNAL_LINES": "1000",
}  # fmt: skip
MIB: Final = 1024 * 1024
BATCHES: Final = 20
UPSTREAM: Final = "provider upstream connections"
EMPTY_S: Final = 30.0  # idle upstream connections are kept for 15 s and looked at every 5
REST_S: Final = 1.5  # a sent message is kept for 1 s, in case it comes back
_HELD: Final = re.compile(r'^hotpath_held\{what="([^"]+)"\} ([0-9.e+]+)$', re.MULTILINE)

Sample = dict[str, float]


@contextmanager
def running(folder: Path, **env: str) -> "Iterator[tuple[Up, int]]":
    """A Hotpath and the monitoring port of its NATS."""
    port, monitor = servers.free_port(), servers.free_port()
    config = folder / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\nhttp: "127.0.0.1:{monitor}"\nmax_payload: 2MB\n'
        f'jetstream {{ store_dir: "{folder}/jetstream" }}\n'
    )
    with servers.running(servers.nats_command(config), port, folder / "nats.log"):
        settings = {**SETTINGS, **env, "NATS_URL": f"nats://127.0.0.1:{port}"}
        with Up(folder / "data", env=settings) as up:
            yield up, monitor


def look(up: Up, monitor: int) -> Sample:
    """Every number that is to come back to where it was."""
    found: Sample = {}
    run = up.run
    for role in ROLES:
        for number, pid in enumerate(run["pids"][role]):
            name = f"{role}{number}" if number else role
            found[f"{name} RSS MiB"] = _rss(pid)
            found[f"{name} descriptors"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        for url in run["metrics"][role]:
            for what, value in _HELD.findall(_get(url).decode()):
                found[f"{role} {what}"] = found.get(f"{role} {what}", 0) + float(value)
    varz = json.loads(_get(f"http://127.0.0.1:{monitor}/varz"))
    for name in ("connections", "subscriptions", "slow_consumers"):
        found[f"nats {name}"] = varz[name]
    found["nats RSS MiB"] = varz["mem"] / MIB
    return found | _redis(run["redis_url"])


def _rss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def _redis(url: str) -> Sample:
    with redis.Redis.from_url(url) as server:
        found: Sample = {"redis keys": server.dbsize(), "redis used MiB": server.info("memory")["used_memory"] / MIB}
        found["redis entries"] = sum(server.hlen(key) for key in server.scan_iter("hp:{*}:ent"))
        found["redis leases"] = sum(server.zcard(key) for key in server.scan_iter("hp:{*}:lease"))
        return found


def growth(times: list[float], values: list[float]) -> float:
    """By Theil and Sen: the median slope of all pairs, times the span."""
    slopes = [
        (b - a) / (s - r) for (r, a), (s, b) in combinations(zip(times, values, strict=True), 2) if s > r
    ]  # fmt: skip
    return statistics.median(slopes) * (times[-1] - times[0]) if slopes else 0.0


def allowed(name: str, median: float, requests: int) -> float:
    """See the module: how much a number may grow over a span in which so many requests were served."""
    if name.endswith("RSS MiB"):
        return max(3.0, requests * 32 / MIB)
    if name in ("redis entries a request", "redis leases a request"):
        return 0.25
    if name == "redis used MiB":
        return median / 4 + 2
    if name in ("redis keys", "nats connections", "nats subscriptions", "nats slow_consumers"):
        return 0.0
    return 64.0 if name == UPSTREAM else 4.0


class Soak:
    """One run: its samples, and what it came to."""

    def __init__(self, up: Up, monitor: int, say: Callable[[str], None]) -> None:
        self._up = up
        self._monitor = monitor
        self._say = say
        self.times: list[float] = []
        self.asked: list[int] = []
        self.samples: list[Sample] = []
        self.ended: Counter[str] = Counter()

    async def run(self, requests: int, concurrency: int) -> None:
        """Ask a batch, rest, look; twenty times."""
        began = time.monotonic()
        for number in range(BATCHES):
            hammer = Hammer(self._up.url, self._up.run["api_key"], requests // BATCHES, concurrency, seed=number)
            await hammer.run()
            self.ended += hammer.ended
            await asyncio.sleep(REST_S)
            sample = await asyncio.to_thread(look, self._up, self._monitor)
            self.times.append(time.monotonic() - began)
            self.asked.append(self.ended.total() - self.ended["503"])
            self.samples.append(self._by_rate(sample))
            rss = " ".join(f"{role} {sample[f'{role} RSS MiB']:.0f}" for role in ROLES)
            self._say(f"{self.ended.total():7} of {requests} in {self.times[-1]:.0f} s; MiB: {rss}")

    async def emptied(self) -> float:
        """Upstream connections that are left once nobody asks any more: 0, or what was never given back."""
        end = time.monotonic() + EMPTY_S
        while True:
            left = (await asyncio.to_thread(look, self._up, self._monitor)).get(UPSTREAM, -1.0)
            if left == 0 or time.monotonic() > end:
                return left
            await asyncio.sleep(0.5)

    def _by_rate(self, sample: Sample) -> Sample:
        """Entries and leases for each request of the time that they are remembered."""
        since = self.times[-1] - TOMBSTONE_S
        before = max((asked for when, asked in zip(self.times, self.asked, strict=True) if when <= since), default=0)
        recent = max(1, self.asked[-1] - before)
        for name in ("redis entries", "redis leases"):
            sample[f"{name} a request"] = sample.pop(name) / recent
        sample["provider descriptors"] -= sample.get(UPSTREAM, 0.0)
        return sample

    def rows(self) -> list[tuple[str, float, float, float, float]]:
        """(what, in the middle, at the end, growth over the last half, allowed) of each number."""
        middle = len(self.asked) // 2
        times, half = self.times[middle:], self.samples[middle:]
        requests = self.asked[-1] - self.asked[middle]
        rows = []
        for name in sorted(half[-1]):
            values = [sample.get(name, 0.0) for sample in half]
            bound = allowed(name, statistics.median(values), requests)
            rows.append((name, values[0], values[-1], growth(times, values), bound))
        return rows


def show(soak: Soak, console: Console) -> bool:
    """The table; whether everything was flat."""
    seconds, total = soak.times[-1], soak.ended.total()
    table = Table(title=f"{total} requests in {seconds:.0f} s ({total / seconds:.0f}/s): growth over the last half")
    for column in ("", "in the middle", "at the end", "growth", "allowed"):
        table.add_column(column, justify="right" if column else "left")
    flat = True
    for name, first, last, grown, bound in soak.rows():
        good = grown <= bound
        flat = flat and good
        numbers = (f"{value:.2f}" for value in (first, last, grown, bound))
        table.add_row(name, *numbers, style=None if good else "bold red")
    console.print(table)
    console.print("ended: " + ", ".join(f"{how} {count}" for how, count in soak.ended.most_common()))
    return flat


def main(argv: list[str], console: Console) -> int:
    """0 when everything was flat."""
    parser = argparse.ArgumentParser(prog="python -m tests.load soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--concurrency", type=int, default=64)
    chosen = parser.parse_args(argv[1:])
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (up, monitor):
        soak = Soak(up, monitor, console.print)
        uvloop.run(soak.run(chosen.requests, chosen.concurrency))
        left = uvloop.run(soak.emptied())
        console.print(f"upstream connections left when nobody asks any more: {left:.0f}")
        return 0 if show(soak, console) and left == 0 else 1
