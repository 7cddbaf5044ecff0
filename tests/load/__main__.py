"""`python -m tests.load http|nats|overload ...`: load on a running Hotpath, with progress, a table, and JSON.

    python -m tests.load http --run .hotpath/run.json --requests 2000 --concurrency 64
    python -m tests.load nats --run .hotpath/run.json --tenant ID --key-id ID --seconds 10 --mix whole=1,stream=3

    python -m tests.load overload --run .hotpath/run.json --times 3 --seconds 10

NATS mode publishes as the user `loadgen`, for a synthetic tenant: `hotpath keys create --tenant load --synthetic
--json` tells the two ids. Exit code 0 when every request ended well or left on purpose, else 1.
Overload mode has options of its own: `overload --help`.

    python -m tests.load slow-reader      one client of 1 KiB/s beside 200 streams
    python -m tests.load stalled          2,000 clients that never read
    python -m tests.load soak             200,000 requests, and whether anything grows
    python -m tests.load edge             a thousand reservations at once at a limit, from four processes

start a Hotpath of their own (flow.py, soak.py); exit code 0 when the figures of the acceptance are met.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tests.load import edge, flow, overload, report, soak
from tests.load.callers import Caller, HttpCaller, NatsCaller
from tests.load.nats_client import NatsClient
from tests.load.work import Mix, jobs, parse_weights

TIMEOUT_S = 120.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__, formatter_class=shape)
    parser.add_argument("mode", choices=["http", "nats"], help="through the HTTP front, or straight to NATS")
    parser.add_argument("--run", type=Path, help="run.json of a running `hotpath up`: fills in URLs and the demo key")
    parser.add_argument("--url", default="", help="http: base URL; nats: nats://loadgen:PASSWORD@HOST:PORT")
    parser.add_argument("--key", default="", help="http: the API key")
    parser.add_argument("--tenant", default="", help="nats: tenant id (a synthetic one)")
    parser.add_argument("--key-id", default="", help="nats: key id")
    parser.add_argument("--requests", type=int, default=0, help="how many; default 1000 unless --seconds is given")
    parser.add_argument("--seconds", type=float, default=0, help="or for how long")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--mix", type=parse_weights, default=parse_weights("whole=5,stream=4,tools=1"))
    parser.add_argument("--model", default="sim-fast", help="of whole and streamed requests")
    parser.add_argument("--tools-model", default="sim-tools")
    parser.add_argument("--chunks", type=int, default=0, help="tokens the simulator shall answer with")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--leave", type=float, default=0.0, help="share of the streams that the client leaves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here; - for standard output instead of the table")
    chosen = parser.parse_args(argv)
    if chosen.run:
        told = json.loads(chosen.run.read_text())
        chosen.url = chosen.url or told["url" if chosen.mode == "http" else "loadgen_nats_url"]
        chosen.key = chosen.key or told["api_key"]
    if not chosen.url:
        parser.error("give --url or --run")
    if chosen.mode == "nats" and not (chosen.tenant and chosen.key_id):
        parser.error("nats needs --tenant and --key-id: hotpath keys create --tenant load --synthetic --json")
    if not chosen.requests and not chosen.seconds:
        chosen.requests = 1000
    return chosen


@asynccontextmanager
async def caller(chosen: argparse.Namespace) -> AsyncIterator[Caller]:
    if chosen.mode == "nats":
        async with NatsClient(chosen.url, timeout_s=TIMEOUT_S) as client:
            yield NatsCaller(client, chosen.tenant, chosen.key_id)
        return
    connector = aiohttp.TCPConnector(limit=chosen.concurrency)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield HttpCaller(chosen.url, chosen.key, session)


class Run:
    """One run: the requests still to be made, and what those made came to."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._jobs = jobs(mix(chosen))
        self._made = 0
        self._began = 0.0
        self.results = report.Report()

    def _more(self) -> bool:
        chosen = self._chosen
        if chosen.seconds and time.perf_counter() - self._began >= chosen.seconds:
            return False
        return not chosen.requests or self._made < chosen.requests

    async def _worker(self, calls: Caller) -> None:
        while self._more():
            self._made += 1
            self.results.add(await calls.call(next(self._jobs)))

    def _show(self, bar: Progress, task: TaskID) -> None:
        ended, seconds = self.results.ended, time.perf_counter() - self._began
        bad = ended - self.results.by_status["ok"]
        bar.update(task, completed=ended, rate=ended / seconds if seconds else 0.0, bad=bad)

    async def _progress(self, bar: Progress, task: TaskID) -> None:
        while True:
            await asyncio.sleep(0.2)
            self._show(bar, task)

    async def make(self, calls: Caller, bar: Progress) -> dict[str, Any]:
        """Make the requests; the report."""
        task = bar.add_task("", total=self._chosen.requests or None, rate=0.0, bad=0)
        self._began = time.perf_counter()
        ticking = asyncio.create_task(self._progress(bar, task))
        async with asyncio.TaskGroup() as group:
            for _ in range(self._chosen.concurrency):
                group.create_task(self._worker(calls))
        ticking.cancel()
        self._show(bar, task)
        return self.results.show(time.perf_counter() - self._began)


def mix(chosen: argparse.Namespace) -> Mix:
    return Mix(
        weights=chosen.mix,
        model=chosen.model,
        tools_model=chosen.tools_model,
        chunks=chosen.chunks,
        max_tokens=chosen.max_tokens,
        leave=chosen.leave,
        seed=chosen.seed,
    )


async def run(chosen: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Connect, make the requests, report."""
    columns = (
        TextColumn("{task.completed} of {task.total} requests"),
        BarColumn(),
        TextColumn("{task.fields[rate]:.0f}/s  {task.fields[bad]} not ok"),
        TimeElapsedColumn(),
    )
    async with caller(chosen) as calls:
        with Progress(*columns, console=console) as bar:
            return await Run(chosen).make(calls, bar)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["overload"]:
        return overload.main(words[1:])
    console = Console(stderr=True)
    if words[:1] in (["slow-reader"], ["stalled"]):
        return flow.main(words, console)
    if words[:1] == ["soak"]:
        return soak.main(words, console)
    if words[:1] == ["edge"]:
        return edge.main(words, console)
    chosen = arguments(words)
    shown = uvloop.run(run(chosen, console))
    if chosen.json and str(chosen.json) == "-":
        print(json.dumps(shown, indent=2))
    else:
        report.table(shown, Console())
        if chosen.json:
            report.write(shown, chosen.json)
    return 0 if shown["ok"] + shown["status"].get("left", 0) == shown["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
