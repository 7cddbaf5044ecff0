"""`python -m tests.load overload --run RUN.json`: more than a running Hotpath can serve, and what becomes of it.

First a closed loop finds its capacity on this machine, then requests are sent on time whether or not answers come
(an open loop), at `--times` that rate. What is shown: how many were accepted and refused and how long both took, the
longest wait in any process's own queue, and whether everything is back to where it was afterwards. Exit code 0 when
every answer was a 200, a 503 or a 429 with Retry-After, and everything is.
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from tests.load.report import percentile

CLOSED: Final = 64  # callers that find the capacity
DIALS: Final = 64  # connections opened at once
REFUSALS: Final = (429, 503)
SETTLE_S: Final = 10.0
_LENGTH: Final = re.compile(rb"\r\nContent-Length: (\d+)\r\n", re.IGNORECASE)
_SAMPLE: Final = re.compile(
    r"^(hotpath_\w+_queue_(?:wait_ms|shed)|hotpath_in_flight|process_(?:resident_memory_bytes|open_fds))"
    r"(?:\{[^}]*\})? (\S+)$",
    re.MULTILINE,
)


class Line(asyncio.Protocol):
    """One kept-alive connection, one request at a time: as cheap as can be, since it runs beside what it measures."""

    def __init__(self, ended: Callable[["Line", int, bool, float], None]) -> None:
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._data = b""
        self._sent = 0.0  # 0: idle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def ask(self, request: bytes, due: float) -> None:
        """Send; its time counts from when it was due."""
        assert self._transport is not None
        self._sent = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data = data = self._data + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or len(data) < end + 4 + int(length[1]):
            return
        self._data = b""
        sent, self._sent = self._sent, 0.0
        self._ended(self, int(data[9:12]), b"\r\nRetry-After: " in data[:end], time.perf_counter() - sent)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent:
            self._ended(self, 0, False, time.perf_counter() - self._sent)
        self._transport = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Seen:
    """What came back: seconds by status; 0 is a connection that ended without an answer."""

    def __init__(self) -> None:
        self.times: dict[int, list[float]] = {}
        self.bare = 0  # refusals that do not say when to come back
        self.unsent = 0  # due while every connection was waiting

    def add(self, status: int, told: bool, seconds: float) -> None:
        self.times.setdefault(status, []).append(seconds)
        self.bare += status in REFUSALS and not told

    def count(self, *statuses: int) -> int:
        return sum(len(self.times.get(status, ())) for status in statuses)

    def row(self, *statuses: int) -> dict[str, float | int | None]:
        values = sorted(value * 1000 for status in statuses for value in self.times.get(status, ()))
        return {"n": len(values), "p50": percentile(values, 50), "p99": percentile(values, 99),
                "max": values[-1] if values else None}  # fmt: skip


class Crowd:
    """Callers of one key against one URL."""

    def __init__(self, url: str, key: str, chunks: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        text = f"Tell me something. [[sim chunks={chunks}]]"
        body = json.dumps({"model": "sim-fast", "max_tokens": 64, "messages": [{"role": "user", "content": text}]})
        self._request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        self._idle: list[Line] = []
        self._lines: list[Line] = []
        self._again = False
        self.seen = Seen()

    async def dial(self, count: int) -> None:
        """Open so many connections."""
        gate = asyncio.Semaphore(DIALS)

        async def one() -> None:
            async with gate:
                _, line = await asyncio.get_running_loop().create_connection(
                    lambda: Line(self._ended), self._host, self._port
                )
                self._lines.append(line)
                self._idle.append(line)

        await asyncio.gather(*(one() for _ in range(count)))

    def _ended(self, line: Line, status: int, told: bool, seconds: float) -> None:
        self.seen.add(status, told, seconds)
        if not line.open:
            return
        if self._again:
            line.ask(self._request, time.perf_counter())
        else:
            self._idle.append(line)

    async def closed(self, seconds: float, callers: int) -> float:
        """Each caller asks again as soon as it is answered; answers a second."""
        self.seen, self._again, begun = Seen(), True, time.perf_counter()
        for _ in range(callers):
            self._idle.pop().ask(self._request, time.perf_counter())
        await asyncio.sleep(seconds)
        self._again = False
        rate = self.seen.count(200) / (time.perf_counter() - begun)
        await self.rest()
        return rate

    async def open(self, rate: float, seconds: float) -> None:
        """Ask at this rate, whatever comes back."""
        self.seen, begun, due = Seen(), time.perf_counter(), 0
        while (now := time.perf_counter()) - begun < seconds:
            for number in range(due, int((now - begun) * rate)):
                while self._idle and not self._idle[-1].open:
                    self._idle.pop()
                if self._idle:
                    self._idle.pop().ask(self._request, begun + number / rate)
                else:
                    self.seen.unsent += 1
            due = int((now - begun) * rate)
            await asyncio.sleep(0.001)

    async def rest(self) -> None:
        """Until every answer is there."""
        async with asyncio.timeout(60):
            while len(self._idle) < sum(line.open for line in self._lines):
                await asyncio.sleep(0.01)

    def close(self) -> None:
        for line in self._lines:
            line.close()


class Watch:
    """The metrics of every process, by way of the ingress's list of them."""

    def __init__(self, session: aiohttp.ClientSession, run: dict[str, Any]) -> None:
        self._session = session
        self._url = run["url"]
        self._admin = {"Authorization": f"Bearer {run['admin_key']}"}
        self._targets: list[str] = []
        self.worst: Counter[str] = Counter()  # ms in the queue, by role
        self.shed: dict[str, int] = {}
        self.in_flight = 0
        self.most = 0
        self.memory = 0.0
        self.descriptors = 0

    async def look(self) -> None:
        """Read them all once."""
        if not self._targets:
            async with self._session.get(f"{self._url}/metrics/targets", headers=self._admin) as got:
                self._targets = [target for row in await got.json() for target in row["targets"]]
        in_flight, memory, descriptors = 0.0, 0.0, 0.0
        for target in self._targets:
            async with self._session.get(f"http://{target}/metrics", headers=self._admin) as got:
                for name, value in _SAMPLE.findall(await got.text()):
                    number = float(value)
                    if name.endswith("_queue_wait_ms"):
                        role = name.split("_")[1]
                        self.worst[role] = max(self.worst[role], int(number))
                    elif name.endswith("_queue_shed"):
                        self.shed[f"{name.split('_')[1]} {target}"] = int(number)
                    elif name == "hotpath_in_flight":
                        in_flight += number
                        self.most = max(self.most, int(number))
                    elif name == "process_open_fds":
                        descriptors += number
                    else:
                        memory += number
        self.in_flight, self.memory, self.descriptors = int(in_flight), memory / 2**20, int(descriptors)

    async def keep_looking(self, say: Callable[[], None]) -> None:
        """Every half second, for ever."""
        while True:
            await self.look()
            say()
            await asyncio.sleep(0.5)


def arguments(argv: list[str]) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.load overload", description=__doc__, formatter_class=shape)
    parser.add_argument("--run", type=Path, required=True, help="run.json of a running `hotpath up`")
    parser.add_argument("--times", type=float, default=3.0, help="of the capacity found")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second instead of finding the capacity")
    parser.add_argument("--connections", type=int, default=3000)
    parser.add_argument("--chunks", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--json", type=Path, help="write the report here too")
    return parser.parse_args(argv)


async def run(chosen: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Find the capacity, go over it, see that it passes."""
    told = json.loads(chosen.run.read_text())
    crowd = Crowd(told["url"], told["api_key"], chosen.chunks)
    async with aiohttp.ClientSession() as session:
        watch = Watch(session, told)
        console.print(f"opening {chosen.connections} connections")
        await crowd.dial(chosen.connections)
        await crowd.closed(1.0, CLOSED)
        rate = chosen.rate / chosen.times or await crowd.closed(3.0, CLOSED)
        console.print(f"capacity {rate:.0f}/s with {CLOSED} callers; now {rate * chosen.times:.0f}/s")
        await crowd.closed(1.0, 1)
        before = crowd.seen.row(200)
        await watch.look()
        watch.worst.clear()
        descriptors, memory = watch.descriptors, watch.memory
        looking = asyncio.create_task(watch.keep_looking(lambda: _say(console, crowd.seen, watch)))
        await crowd.open(rate * chosen.times, chosen.seconds)
        over = crowd.seen
        await crowd.rest()
        looking.cancel()
        await watch.look()
        worst = dict(watch.worst)
        end = time.monotonic() + SETTLE_S
        while watch.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.1)
            await watch.look()
        await crowd.closed(1.0, 1)
        crowd.close()
    shed: Counter[str] = Counter()
    for name, count in watch.shed.items():
        shed[name.split()[0]] += count
    return {
        "capacity": round(rate), "offered": round(rate * chosen.times), "seconds": chosen.seconds,
        "accepted": over.row(200), "refused": over.row(*REFUSALS),
        "statuses": {str(status): len(times) for status, times in sorted(over.times.items())},
        "without_retry_after": over.bare, "unsent": over.unsent, "queue_wait_ms": worst, "shed": dict(shed),
        "most_in_flight": watch.most, "in_flight_after": watch.in_flight, "alone_before": before,
        "alone_after": crowd.seen.row(200), "descriptors": [descriptors, watch.descriptors],
        "memory_mib": [round(memory), round(watch.memory)],
    }  # fmt: skip


def _say(console: Console, seen: Seen, watch: Watch) -> None:
    counts = f"{seen.count(200)} accepted, {seen.count(*REFUSALS)} refused, {seen.unsent} not sent"
    console.print(f"  {counts}; in flight {watch.in_flight}; queue {dict(watch.worst)} ms")


def good(shown: dict[str, Any]) -> bool:
    """Nothing but answers and honest refusals, and nothing left."""
    return (
        not set(shown["statuses"]) - {"200", "429", "503"}
        and not shown["without_retry_after"]
        and not shown["in_flight_after"]
        and shown["accepted"]["n"] > 0
    )


def show(shown: dict[str, Any], console: Console) -> None:
    """The report for people."""
    table = Table(
        title=f"{shown['offered']}/s for {shown['seconds']:g} s, capacity {shown['capacity']}/s; milliseconds"
    )
    for column in ("", "n", "p50", "p99", "max"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("alone_before", "accepted", "refused", "alone_after"):
        row = shown[name]
        table.add_row(name, str(row["n"]), *("-" if row[p] is None else f"{row[p]:.2f}" for p in ("p50", "p99", "max")))
    console.print(table)
    for name in ("statuses", "without_retry_after", "unsent", "queue_wait_ms", "shed", "most_in_flight",
                 "in_flight_after", "descriptors", "memory_mib"):  # fmt: skip
        console.print(f"{name}: {shown[name]}")


def main(argv: list[str]) -> int:
    chosen = arguments(argv)
    shown = uvloop.run(run(chosen, Console(stderr=True)))
    show(shown, Console())
    if chosen.json:
        chosen.json.write_text(json.dumps(shown, indent=1) + "\n")
    return 0 if good(shown) else 1
