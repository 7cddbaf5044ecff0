"""The guardian's own time at 200 requests a second, all of its work on, checked against a clock that is not its own.

    python -m tests.bench.guardian [--rate 200] [--seconds 15] [--prompts 2048 32768]

Starts a whole `hotpath up` with its simulator; the requests come over HTTP. The tenant has limits on three levels by
day, month and lifetime, rate limits of requests and tokens on tenant and key, mode `active` with a seatbelt on each
request, and every prompt has an address that is redacted. `told` is X-BR-Guardian-Overhead-Ms (message read to forward
decided, Redis included). `seen` is what a process beside it on the bus sees: the time between the message to the
guardian and the one from it, so it has the reading, the writing and the bus's own scheduling in it besides. Exit code
1 when p95 of what is told misses its bound (issue 4: 1 ms at 2 KiB, 5 ms at 32 KiB), or the two clocks differ by more
than the bus can explain. Run it on a machine that does nothing else.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
import nats

from deploy.cli import where
from shared.core.users import user_id
from shared.state.policies import KeyChange, TenantChange
from shared.state.redis import State
from shared.wire import headers, subjects
from shared.wire.messages import decode_admit, decode_route
from tests.e2e.rig import Up

#: p95 in ms by prompt size in bytes.
BOUNDS: Final = {2048: 1.0, 32_768: 5.0}
#: What the bus and two busy cores add between the guardian's clock and the other one, in ms, at the median.
BETWEEN_MS: Final = 1.0
WARM: Final = 200
USER: Final = "ann@example.com"
_TEXT: Final = (
    "the quick report says that revenue of our northern region grew while costs, which nobody had planned for, "
    "stayed where they were; please summarise what changed since last quarter and list open questions for finance"
)


async def _rules(data: Path, made: dict[str, Any]) -> None:
    """Everything that the guardian can be asked to do for this tenant."""
    settings = where.find(str(data), {}).settings()
    state = await State.connect(settings)
    tenant, key = made["tenant_id"], made["key_id"]
    user = user_id(settings.key_pepper.encode(), tenant, USER)
    try:
        for level in ("t", f"k:{key}", f"u:{user}"):
            for period in ("day", "month", "lifetime"):
                await state.ledger.set_limit(tenant=tenant, period=period, limit=10**15, level=level)
        rates: dict[str, Any] = {"rpm": 10**6, "tpm": 10**9}
        await state.admin.set_policy(
            tenant, TenantChange(mode="active", pii="redact", keywords=["falcon", "blue heron"], **rates)
        )
        await state.admin.set_key(key, KeyChange(models=["sim-fast"], **rates))
    finally:
        await state.close()


def _body(size: int, dice: random.Random) -> bytes:
    text = f"[[sim chunks=2]] {dice.random()} write to bob@example.org about it. "
    words = _TEXT.split()
    while len(text) < size:
        text += dice.choice(words) + " "
    message = {"role": "user", "content": text[:size]}
    return json.dumps({"model": "sim-fast", "user": USER, "max_tokens": 256, "messages": [message]}).encode()


# ---- the clock beside it ---------------------------------------------------------------------------------------------


async def _watch(url: str) -> None:
    """Notes when each request's messages to and from the guardian pass, until stdin ends; then prints all, by rid."""
    seen: dict[str, list[float]] = {}

    async def note(message: Any) -> None:
        at = time.perf_counter()
        if not message.data:  # somebody asks whether it lives
            return
        if message.subject.startswith(subjects.worker("guardian", "")):
            seen[decode_admit(message.data).ask.rid] = [at]
        elif message.subject.startswith(subjects.worker("routing", "")):
            route = decode_route(message.data)
            seen[route.ask.rid] += (at, route.admission.overhead_us)

    bus = await nats.connect(url)
    await bus.subscribe(subjects.worker("*", "*"), cb=note)  # one subscription: in the order they passed
    await bus.flush()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(seen))
    await bus.close()


# ---- the load --------------------------------------------------------------------------------------------------------


async def _load(url: str, key: str, size: int, rate: float, count: int) -> dict[str, float]:
    """So many requests at that pace; what each answer's header told, in ms, by rid."""
    told: dict[str, float] = {}
    dice = random.Random(size)  # the same prompts in each run
    sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", headers.MAX_ESTIMATE: "5"}
    bodies = [_body(size, dice) for _ in range(50)]

    async def one(session: aiohttp.ClientSession, body: bytes) -> None:
        async with session.post(url + "/v1/chat/completions", data=body, headers=sent) as answer:
            text = await answer.read()
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {text.decode()}")
            assert headers.RATE_LIMITS["tokens"][1] in answer.headers
            told[answer.headers[headers.BR_REQUEST_ID]] = float(answer.headers[headers.BR_GUARDIAN_OVERHEAD])

    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, start + number / rate - loop.time()))
                group.create_task(one(session, bodies[number % len(bodies)]))
    return told


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.95, 0.99))  # type: ignore[return-value]


def _show(name: str, values: list[float]) -> tuple[float, float, float]:
    found = _percentiles(values)
    print(f"    {name:28} p50 {found[0]:6.3f}   p95 {found[1]:6.3f}   p99 {found[2]:6.3f}   max {max(values):7.3f} ms")
    return found


def measure(up: Up, key: str, size: int, rate: float, seconds: float) -> bool:
    """One prompt size; whether it is within its bound."""
    watch = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.guardian", "--watch", up.run["nats_url"]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watch.stdout is not None
    watch.stdout.readline()
    told = asyncio.run(_load(up.url, key, size, rate, WARM + int(rate * seconds)))
    seen: dict[str, list[float]] = json.loads(watch.communicate("")[0])
    rids = list(told)[WARM:]
    print(f"{size} bytes of prompt, {len(rids)} requests at {rate:g} a second")
    _, p95, _ = _show("told (header)", [told[rid] for rid in rids])
    exact = {rid: seen[rid][2] / 1000 for rid in rids}
    outside = {rid: (seen[rid][1] - seen[rid][0]) * 1000 for rid in rids}
    _show("told (message)", list(exact.values()))
    _show("seen from outside", list(outside.values()))
    between = _show("seen - told", [outside[rid] - exact[rid] for rid in rids])[0]
    wrong = [rid for rid in rids if abs(told[rid] - exact[rid]) > 0.051]
    bound = BOUNDS.get(size, float("inf"))
    fits = p95 < bound and abs(between) < BETWEEN_MS and not wrong
    print(f"    {'ok' if fits else 'MISSED'}: p95 {p95:g} ms, bound {bound:g} ms; clocks {between:.3f} ms apart")
    return fits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guardian", description=__doc__)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--prompts", type=int, nargs="+", default=list(BOUNDS), help="bytes")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.watch:
        asyncio.run(_watch(chosen.watch))
        return 0
    with tempfile.TemporaryDirectory() as folder, Up(Path(folder) / "data") as up:
        made = up.cli("keys", "create", "--tenant", "acme")
        asyncio.run(_rules(up.data, made))
        time.sleep(1.5)  # the rules reach every process within a second
        fits = [measure(up, made["key"], size, chosen.rate, chosen.seconds) for size in chosen.prompts]
    return 0 if all(fits) else 1


if __name__ == "__main__":
    sys.exit(main())
