"""A steady load across an outage, and what is to be said of it: answer times, recovery, nothing stale, nothing lost.

    async with Load(client) as load:      so many requests a second, whole and streamed, whatever comes of them
        ... strike ...; load.struck("frozen")
        ... heal ...;   load.healed()
        ... and perhaps another one
    print(load.report("no limit"))

`Servers` are a NATS and a Valkey of the test's own, each behind a fault proxy that every role goes through; `Extra` is
one more process of a role with its own way to them, which can be cut off alone.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from msgspec import Struct

from deploy import servers
from tests.e2e import invariants
from tests.e2e.drive import Client, Seen
from tests.e2e.invariants import Asked
from tests.e2e.proxy import Proxy
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

#: What every request of a load is allowed; leases end soon after it.
TIMEOUT_MS = 6000
#: A call that was on its way to the upstream when its client was told otherwise shows up within this.
UNDER_WAY_S = 0.25
SETTINGS = {"CIRCUIT_FAILURE_THRESHOLD": "1000000", "LEDGER_LEASE_GRACE_MS": "1000"}


class Server:
    """One server process that can be killed, frozen and started again."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self._command, self.port, self._log = command, port, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """And wait until it listens."""
        with self._log.open("ab") as sink:
            self.process = subprocess.Popen(self._command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
        servers.wait_port(self.port, self.process)

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        """STOP and CONT, mostly."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGKILL) -> None:
        """Kill it (or ask it to go) and wait."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(10)


class Servers:
    """NATS and Valkey of the test's own, and the proxies in front of them."""

    def __init__(self, folder: Path) -> None:
        nats, redis = servers.free_port(), servers.free_port()
        config = folder / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{nats}"\nmax_payload: 2MB\nwrite_deadline: "5s"\n'
            f'jetstream {{ store_dir: "{folder}/jetstream" }}\n'
        )
        self.nats = Server(servers.nats_command(config), nats, folder / "nats.log")
        self.redis_folder = folder / "valkey"
        self.redis = Server(servers.valkey_command(self.redis_folder, redis), redis, folder / "valkey.log")
        self.to_nats, self.to_redis = Proxy(nats), Proxy(redis)

    def __enter__(self) -> Self:
        self.nats.start()
        self.redis.start()
        self.to_nats.__enter__()
        self.to_redis.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in (self.to_nats, self.to_redis):
            proxy.__exit__()
        for server in (self.nats, self.redis):
            server.end()

    def env(self) -> dict[str, str]:
        """For an Up that goes through the proxies."""
        return {
            **SETTINGS,
            "NATS_URL": f"nats://127.0.0.1:{self.to_nats.port}",
            "REDIS_URL": f"redis://127.0.0.1:{self.to_redis.port}/0",
        }


def environment(up: Up, role: str) -> dict[str, str]:
    """What a running process of the role was started with."""
    raw = Path(f"/proc/{up.run['pids'][role][0]}/environ").read_bytes().split(b"\0")
    return dict(line.decode().split("=", 1) for line in raw if b"=" in line)


class Extra:
    """One more process of a role of a running Up, with some of its environment changed."""

    def __init__(self, up: Up, role: str, **env: str) -> None:
        read, write = os.pipe()
        self.log = up.data / "logs" / f"{role}.{write}.extra.log"
        self.port = servers.free_port()
        own = {"HOTPATH_LISTEN_FD": "-1", "GATEWAY_PORT": str(self.port), "HOTPATH_READY_FD": str(write)}
        own |= {"HOTPATH_ADMIN_FD": "-1", "ADMIN_PORT": "0"}
        command = [sys.executable, "-m", "ingress" if role == "ingress" else f"workers.{role}"]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, env={**environment(up, role), **own, **env}, pass_fds=(write,), stdin=subprocess.DEVNULL,
                stdout=sink, stderr=sink,
            )  # fmt: skip
        os.close(write)
        with os.fdopen(read) as ready:
            lines = [json.loads(line) for line in ready]
        assert lines, self.log.read_text()
        self.instance = lines[0]["instance"]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Only:
    """The simulator as one tenant sees it."""

    def __init__(self, sim: Sim, asked: list[Asked]) -> None:
        self._sim = sim
        self._rids = {one.seen.rid for one in asked}

    def bill(self) -> list[dict[str, Any]]:
        """Its calls."""
        return [line for line in self._sim.bill() if line["request_id"].partition(".")[0] in self._rids]

    def wait(self, *args: Any, **counts: Any) -> bool:
        """All of them."""
        return self._sim.wait(*args, **counts)


def shapes() -> Iterator[tuple[int, dict[str, int], bool]]:
    """(chunks, options, streamed) for ever: half are over at once, half run for a second."""
    while True:
        yield 5, {}, False
        yield 40, {"pace": 25}, True
        yield 10, {}, True
        yield 20, {"pace": 20}, False


class Outage(Struct):
    """When it began and ended, monotonic seconds."""

    name: str
    struck: float
    healed: float = float("inf")


class Load:
    """`rate` requests a second until the block ends; then every answer is waited for."""

    def __init__(self, client: Client, *, rate: float = 25.0, timeout_ms: int = TIMEOUT_MS) -> None:
        self._client = client
        self._gap = 1 / rate
        self._timeout_ms = timeout_ms
        self._tasks: set[asyncio.Task[None]] = set()
        self._driver: asyncio.Task[None] | None = None
        self.asked: list[Asked] = []
        self.began = time.monotonic()
        self.outages: list[Outage] = []

    async def __aenter__(self) -> Self:
        self.began = time.monotonic()
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._driver is not None
        self._driver.cancel()
        await asyncio.wait((self._driver, *self._tasks), timeout=self._timeout_ms / 1000 + 3)
        hung = [task for task in self._tasks if not task.done()]
        for task in hung:
            task.cancel()
        assert not hung, f"{len(hung)} requests hang"

    async def _drive(self) -> None:
        due = time.monotonic()
        for chunks, options, streamed in shapes():
            task = asyncio.create_task(self._one(chunks, options, streamed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            due += self._gap
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _one(self, chunks: int, options: dict[str, int], streamed: bool) -> None:
        prompt, at = invariants.prompt(chunks, **options), time.monotonic()
        headers = {"X-Timeout-Ms": str(self._timeout_ms)}
        seen = await self._client.chat(prompt, stream=streamed, headers=headers)
        self.asked.append(Asked(prompt=prompt, seen=seen, at=at))

    async def warm(self) -> None:
        """Let every process know the key: a few requests, which belong to the books."""
        for _ in range(6):
            at, prompt = time.monotonic(), invariants.prompt(1)
            self.asked.append(Asked(prompt=prompt, seen=await self._client.chat(prompt), at=at))
            assert self.asked[-1].seen.ended_well, self.asked[-1]

    def struck(self, name: str = "") -> None:
        """A fault begins now."""
        self.outages.append(Outage(name=name, struck=time.monotonic()))

    def healed(self) -> None:
        """And ends now."""
        self.outages[-1].healed = time.monotonic()

    # ---- what is said of it

    def during(self, outage: Outage) -> list[Asked]:
        """Those asked in the outage."""
        return [one for one in self.asked if outage.struck <= one.at < outage.healed]

    def cut(self, outage: Outage) -> list[Asked]:
        """Those asked before the outage that ended badly in it."""
        return [
            one for one in self.asked
            if one.at < outage.struck <= one.at + one.seen.took < outage.healed and not one.seen.ended_well
        ]  # fmt: skip

    def cut_after(self, outage: Outage) -> float:
        """Seconds from the outage's beginning to the last end of those."""
        return max((one.at + one.seen.took - outage.struck for one in self.cut(outage)), default=0.0)

    def recovery(self, outage: Outage) -> float:
        """Seconds from the end of the outage until the first request after which all were served well."""
        ends = min((other.struck for other in self.outages if other.struck > outage.struck), default=float("inf"))
        later = [one for one in self.asked if outage.healed <= one.at < ends and one.at + one.seen.took < ends]
        later.sort(key=lambda one: one.at)
        assert later, "nothing was asked after the outage"
        bad = [number for number, one in enumerate(later) if not one.seen.ended_well]
        if not bad:
            return 0.0
        assert bad[-1] + 1 < len(later), ("never well again", later[-1].seen.status, later[-1].seen.error)
        return later[bad[-1] + 1].at - outage.healed

    def report(self, kind: str) -> str:
        """One line a class of answers in each outage: count, p50, p99, max in ms; then the rest."""
        lines = [f"{kind}: {len(self.asked)} requests"]
        for outage in self.outages:
            lines.append(f"  {outage.name} for {outage.healed - outage.struck:.1f} s")
            for answer, some in sorted(_by_answer(self.during(outage)).items()):
                lines.append(f"    {answer:34} {len(some):4}  {quantiles([one.seen.took for one in some])}")
            lines.append(
                f"    {len(self.cut(outage))} cut, the last {self.cut_after(outage):.2f} s after; all well again after"
                f" {self.recovery(outage):.2f} s"
            )
        return "\n".join(lines)


def _by_answer(asked: list[Asked]) -> dict[str, list[Asked]]:
    found: dict[str, list[Asked]] = {}
    for one in asked:
        seen = one.seen
        degraded = " degraded" if seen.headers.get("x-br-guardian-status") == "degraded" else ""
        kind = "served" if seen.ended_well else f"{seen.status} {seen.error.get('code')}"
        found.setdefault(kind + degraded, []).append(one)
    return found


def quantiles(seconds: list[float]) -> str:
    """p50, p99 and max in ms."""
    ms = sorted(1000 * each for each in seconds)
    if not ms:
        return "-"
    return f"p50 {ms[len(ms) // 2]:.0f}, p99 {ms[int(len(ms) * 0.99)]:.0f}, max {ms[-1]:.0f} ms"


def codes(asked: list[Asked]) -> Counter[str]:
    """How they ended: `served`, `served degraded`, or status and code."""
    return Counter({kind: len(some) for kind, some in _by_answer(asked).items()})


def refusals(asked: list[Asked]) -> list[Seen]:
    """Those that got no 200; each 503 must say when to come back."""
    found = [one.seen for one in asked if one.seen.status != 200]
    for seen in found:
        assert seen.status != 503 or int(seen.headers["retry-after"]) >= 1, seen.headers
    return found


def check_stale(sim: Sim, load: Load) -> None:
    """Nothing stale runs: no upstream call began after its request's deadline, nor after its client was told that it
    would not (but for one that was under way just then)."""
    of = {one.seen.rid: one for one in load.asked}
    wall = time.time() - time.monotonic()
    for line in sim.bill():
        one = of.get(line["request_id"].partition(".")[0])
        if one is None:
            continue
        began = line["at_ms"] / 1000 - wall
        assert began <= one.at + load._timeout_ms / 1000 + 0.05, ("after its deadline", line, one)
        if one.seen.status not in (0, 200):
            answered = one.at + one.seen.took
            assert began <= answered + UNDER_WAY_S, ("after its client was told", began - answered, line, one)


def ready(url: str) -> tuple[int, dict[str, Any]]:
    """GET /ready."""
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(urllib.request.urlopen(url + "/ready", timeout=2))
        except urllib.error.HTTPError as error:
            answer = stack.enter_context(error)
        return answer.status, json.loads(answer.read())


async def eventually(probe: Callable[[], bool], within: float, what: str) -> float:
    """Seconds until `probe` is true; asked in a thread."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if await asyncio.to_thread(probe):
                return time.monotonic() - began
        assert time.monotonic() - began < within, f"not within {within} s: {what}"
        await asyncio.sleep(0.02)
