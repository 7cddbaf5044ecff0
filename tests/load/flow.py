"""`python -m tests.load slow-reader` and `... stalled`: what clients that do not read cost, and whom (I8, I10).

Both start a Hotpath of their own (one process of each role), so that resident memory can be told apart; it is VmRSS of
ingress, provider and NATS. Kernel socket buffers are not in it; they are bounded by SO_SNDBUF and SO_RCVBUF.
"""

import argparse
import asyncio
import socket
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from rich.console import Console
from rich.table import Table

from tests.e2e.rig import Up
from tests.e2e.sim import Sim
from tests.load import streams

#: 16 choices of 16,000 tokens: 69 MB of events.
HUGE: Final = "[[sim chunks=16000]]"
HUGE_CHOICES: Final = 16
SMALL_BUFFER: Final = 8192
ROLES: Final = ("ingress", "provider", "nats")
#: What the acceptance allows: KiB of growth for one slow reader, for each stalled one, ms for the others.
SLOW_KIB: Final = 2048
STALLED_KIB: Final = 100
OTHERS_MS: Final = 10.0
BATCH: Final = 25  # streams begun at a time: each is written at full speed until it stalls

#: The bounds of a process and of a tenant are not what is measured here.
ROOM: Final = {"MAX_IN_FLIGHT": "8000", "MAX_IN_FLIGHT_PER_TENANT": "8000"}

Say = Callable[[str], None]


def resident(up: Up) -> dict[str, int]:
    """VmRSS in KiB of each role a stream goes through."""
    pids = up.run["pids"]
    return {role: sum(_rss(pid) for pid in pids[role]) for role in ROLES}


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """KiB by role."""
    return {role: after[role] - before[role] for role in before}


class Round(Struct):
    """One pair of equal spans, without the slow reader and with it."""

    noise_kib: int  # growth of the span without
    grown_kib: int  # growth over the span with
    base_p99: float
    p99: float
    blocked: int  # answers whose socket took no more, as the simulator saw it
    written: int  # bytes the slow client had read
    by_role: dict[str, int]


async def slow_round(up: Up, sim: Sim, crowd: streams.Crowd, span: float) -> Round:
    """Measure one pair. The slow reader is connected and its answer begun before its span is timed."""
    start = resident(up)
    base = await crowd.watch(span)
    before = resident(up)
    sock, got = await streams.connect(up.url, SMALL_BUFFER), [0]
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, streams.request(up.run["api_key"], HUGE, n=HUGE_CHOICES))
    reading = asyncio.create_task(streams.trickle(sock, 1024, got))
    try:
        await _blocked(sim)  # the simulator makes 256,000 chunks first, and stands still for it
        slow = await crowd.watch(span)
        after = resident(up)
        stats = await asyncio.to_thread(sim.stats)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        streams.reset(sock)
    await asyncio.to_thread(sim.wait, 5000, in_flight=len(crowd))
    by_role = grown(before, after)
    return Round(
        noise_kib=sum(grown(start, before).values()), grown_kib=sum(by_role.values()), base_p99=streams.p99(base),
        p99=streams.p99(slow), blocked=stats["blocked"], written=got[0], by_role=by_role,
    )  # fmt: skip


async def slow_reader(
    up: Up, *, others: int, pace_ms: int, span: float, rounds: int, warm: float, say: Say
) -> list[Round]:
    """The rounds of A3. Raises AssertionError when one of the others did not end well."""
    sim = Sim(up.run["simulator_url"])
    crowd = streams.Crowd(up.url, up.run["api_key"], others, pace_ms=pace_ms, chunks=int(20_000 / pace_ms))
    await crowd.start()
    try:
        say(f"{others} streams at {1000 / pace_ms:.0f} chunks a second each; warming up")
        await slow_round(up, sim, crowd, warm)
        made = []
        for number in range(rounds):
            one = await slow_round(up, sim, crowd, span)
            made.append(one)
            say(
                f"round {number + 1}: p99 {one.base_p99:.1f} -> {one.p99:.1f} ms, {one.grown_kib} KiB {one.by_role} "
                f"(noise {one.noise_kib}), blocked {one.blocked}, read {one.written}"
            )
        assert not crowd.broken, crowd.broken[:3]
        return made
    finally:
        crowd.close()


async def _blocked(sim: Sim, within: float = 10.0) -> None:
    """Until the simulator has an answer that its socket does not take, or the time is over."""
    end = asyncio.get_running_loop().time() + within
    while not (await asyncio.to_thread(sim.stats))["blocked"] and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.1)


class Stalled(Struct):
    """What many clients that never read cost."""

    streams: int
    blocked: int
    kib_each: float
    by_role: dict[str, float]
    after_kib: int  # growth that was left when they had gone


async def stalled(up: Up, *, count: int, prompt: str, settle: float, say: Say) -> Stalled:
    """Open `count` streams and read nothing."""
    sim = Sim(up.run["simulator_url"])
    ask = streams.request(up.run["api_key"], prompt)
    before = resident(up)
    socks: list[socket.socket] = []
    try:
        while len(socks) < count:
            socks += await _begun(up, ask, min(BATCH, count - len(socks)))
            say(f"{len(socks)} open")
        after = await _settled(up, settle, say)
        stats = await asyncio.to_thread(sim.stats)
    finally:
        for sock in socks:
            streams.reset(sock)
    gone = await asyncio.to_thread(sim.wait, 10_000, in_flight=0)
    assert gone, "upstream calls go on for clients that left"
    await asyncio.sleep(1.0)
    by_role = {role: round(kib / count, 1) for role, kib in grown(before, after).items()}
    left = sum(grown(before, resident(up)).values())
    return Stalled(count, stats["blocked"], round(sum(by_role.values()), 1), by_role, left)


async def _begun(up: Up, ask: bytes, count: int) -> list[socket.socket]:
    """So many more streams that have a 200. An answer of 503 (all of this runs at full speed) is asked for again."""
    loop, begun = asyncio.get_running_loop(), list[socket.socket]()
    socks = [await streams.connect(up.url, SMALL_BUFFER) for _ in range(count)]
    for sock in socks:
        await loop.sock_sendall(sock, ask)
    end = loop.time() + 30
    while socks:
        assert loop.time() < end, f"{len(socks)} of {count} streams have not begun"
        await asyncio.sleep(0.02)
        for sock in list(socks):
            status = _status(sock)
            if status == b"200":
                begun.append(sock)
            elif status:
                assert status == b"503", status
                sock.close()
                socks.append(await streams.connect(up.url, SMALL_BUFFER))
                await loop.sock_sendall(socks[-1], ask)
            if status:
                socks.remove(sock)
    return begun


def _status(sock: socket.socket) -> bytes:
    """Of the answer's head, which stays unread; b"" before it comes."""
    try:
        return sock.recv(12, socket.MSG_PEEK)[9:12]
    except BlockingIOError:
        return b""


async def _settled(up: Up, settle: float, say: Say) -> dict[str, int]:
    """Memory once it has stopped growing for `settle` seconds."""
    last, since, loop = 0, 0.0, asyncio.get_running_loop()
    while True:
        now = resident(up)
        total = sum(now.values())
        if total > last + 256:
            last, since = total, loop.time()
            say(f"{total // 1024} MiB {now}")
        elif loop.time() - since > settle:
            return now
        await asyncio.sleep(0.25)


# ---- as commands -----------------------------------------------------------------------------------------------------


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    slow = kinds.add_parser("slow-reader")
    slow.add_argument("--others", type=int, default=200)
    slow.add_argument("--pace", type=int, default=50, help="ms between two chunks of the others")
    slow.add_argument("--span", type=float, default=8.0, help="seconds of each half of a round")
    slow.add_argument("--rounds", type=int, default=5)
    still = kinds.add_parser("stalled")
    still.add_argument("--streams", type=int, default=2000)
    still.add_argument("--prompt", default="[[sim chunks=1600]]")
    still.add_argument("--settle", type=float, default=3.0)
    still.add_argument("--warm", type=int, default=100, help="streams stalled and left before the measurement")
    return parser.parse_args(argv)


def main(argv: list[str], console: Console) -> int:
    """Start a Hotpath, measure, show. 0 when the figures of the acceptance are met."""
    chosen = _arguments(argv)
    with tempfile.TemporaryDirectory() as folder, Up(Path(folder) / "data", env=ROOM) as up:
        if chosen.kind == "slow-reader":
            return asyncio.run(_slow(up, chosen, console))
        return asyncio.run(_stalled(up, chosen, console))


async def _slow(up: Up, chosen: argparse.Namespace, console: Console) -> int:
    made = await slow_reader(
        up, others=chosen.others, pace_ms=chosen.pace, span=chosen.span, rounds=chosen.rounds, warm=chosen.span,
        say=console.print,
    )  # fmt: skip
    shown = median_of(made)
    _table("one reader of 1 KiB/s beside the others, medians", shown, console)
    good = shown["KiB grown"] < SLOW_KIB and shown["ms added to p99"] <= OTHERS_MS and all(one.blocked for one in made)
    return 0 if good else 1


def median_of(made: list[Round]) -> dict[str, float]:
    """The figures of A3."""
    return {
        "KiB grown": statistics.median(one.grown_kib for one in made),
        "KiB grown in a span without it (noise)": statistics.median(one.noise_kib for one in made),
        "others' p99 ms without it": round(statistics.median(one.base_p99 for one in made), 2),
        "ms added to p99": round(statistics.median(one.p99 - one.base_p99 for one in made), 2),
        "simulator writes blocked": min(one.blocked for one in made),
    }


async def _stalled(up: Up, chosen: argparse.Namespace, console: Console) -> int:
    if chosen.warm:
        await stalled(up, count=chosen.warm, prompt=chosen.prompt, settle=1.0, say=console.print)
        Sim(up.run["simulator_url"]).reset()
    found = await stalled(up, count=chosen.streams, prompt=chosen.prompt, settle=chosen.settle, say=console.print)
    shown: dict[str, Any] = {
        "streams": found.streams, "upstream writes blocked": found.blocked, "KiB each": found.kib_each,
        **{f"KiB each in {role}": kib for role, kib in found.by_role.items()}, "KiB left when gone": found.after_kib,
    }  # fmt: skip
    _table("clients that never read", shown, console)
    return 0 if found.kib_each <= STALLED_KIB else 1


def _table(title: str, shown: dict[str, Any], console: Console) -> None:
    table = Table("", "", title=title)
    for name, value in shown.items():
        table.add_row(name, str(value))
    console.print(table)
