"""What the ledger costs: CPU of client and server per reserve + dispatch + settle, memory per tombstone.

    python -m tests.bench.ledger [requests] [concurrency]

Starts its own Valkey (AOF on, as the ledger needs it). CPU is user + system of each process, so a busy machine moves it
less than wall time does; the client's share includes the loop and the tasks that call.
"""

import asyncio
import os
import resource
import secrets
import sys
import tempfile
from pathlib import Path

import uvloop

from deploy import servers
from shared.settings import load
from shared.state.ledger import RedisLedger
from shared.state.redis import State
from shared.state.scripts import Scripts

TENANT = "bench"


def _server_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _client_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _request(ledger: RedisLedger, now: int, ttl: int) -> None:
    rid = secrets.token_hex(16)
    await ledger.reserve(
        tenant=TENANT, rid=rid, delivery=1, amount=300_000, deadline=now + ttl, not_after=now + 1000, key="k"
    )
    await ledger.dispatch(
        tenant=TENANT, rid=rid, delivery=1, instance="abcdefghijkl", lost="", amount=300_000, max_calls=3,
        not_after=now + 1000,
    )  # fmt: skip
    await ledger.settle(tenant=TENANT, rid=rid, call=1, cost=28_000)


async def _round(
    state: State, pid: int, requests: int, concurrency: int, name: str, ledger: RedisLedger | None = None
) -> None:
    ttl = 30_000 if ledger is None else 300

    async def worker() -> None:
        for _ in range(requests // concurrency):
            await _request(ledger or state.ledger, state.clock.now(), ttl)

    client, server = _client_cpu(), _server_cpu(pid)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    wall = asyncio.get_running_loop().time() - began
    client, server = _client_cpu() - client, _server_cpu(pid) - server
    each = 1e6 / requests
    print(f"{name}: {requests} requests (reserve + dispatch + settle) at concurrency {concurrency}, in us:")
    print(f"    CPU a call: client {client * each / 3:.1f}, server {server * each / 3:.1f}")
    print(f"    a request: CPU {(client + server) * each:.1f}, wall {wall * each:.1f}")


async def _memory(state: State) -> int:
    info = await state._side.execute(b"INFO", b"memory", within=1.0)
    return int(dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)["used_memory"])


async def _main(pid: int, port: int, requests: int, concurrency: int) -> None:
    secret = {
        name: letter * 40 for name, letter in (("GATEWAY_API_KEY", "a"), ("KEY_PEPPER", "b"), ("ADMIN_API_KEY", "c"))
    }
    settings = load({**secret, "REDIS_URL": f"redis://127.0.0.1:{port}/0", "LEDGER_TOMBSTONE_MS": "60000"})
    state = await State.connect(settings)
    state.run()
    try:
        await state.set_limit(TENANT, "day", 9_000_000_000_000)
        await _round(state, pid, requests // 4, concurrency, "warm-up")
        before, kept = await _memory(state), await state._side.execute(b"HLEN", b"hp:{bench}:ent", within=1.0)
        await _round(state, pid, requests, concurrency, "tombstones piling up")
        added = await state._side.execute(b"HLEN", b"hp:{bench}:ent", within=1.0) - kept
        if added > requests // 2:
            print(
                f"{(await _memory(state) - before) / added:.0f} bytes of Redis memory per tombstone ({added} of them)"
            )
        brief = RedisLedger(
            state._hot,
            Scripts(state._hot),
            now=state.clock.now,
            lease_grace_ms=0,
            tombstone_ms=300,
            unconfirmed_ms=1000,
            journal_lines=100_000,
            snapshot_ms=600_000,
        )
        await _round(state, pid, requests, concurrency, "tombstones come and go", brief)
    finally:
        await state.close()


if __name__ == "__main__":
    REQUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    CONCURRENCY = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    with tempfile.TemporaryDirectory() as folder:
        free = servers.free_port()
        with servers.running(servers.valkey_command(Path(folder), free), free, Path(folder) / "log") as process:
            uvloop.run(_main(process.pid, free, REQUESTS, CONCURRENCY))
