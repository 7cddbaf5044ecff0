"""What the ledger costs: CPU of client and server per reserve + dispatch + settle, and memory per tombstone.

    python -m tests.bench.ledger [--before COMMIT] [--requests 6000] [--rounds 5] [--concurrency 64]

One run compares, round by round in turn, each with a process and a Valkey (AOF on) of its own:

    three levels  tenant, key and user, each with limits of a day, a month and a lifetime; journal; rate limits
    rates off     the same without rate limits
    tenant, key   the user without a limit, rates off
    COMMIT        with --before: the scripts of that commit, checked out beside (before the journal: one level)

Figures are medians over the rounds, in microseconds of CPU (user and system, all threads) of both processes, so that a
busy machine moves them less than wall time; the client's share includes the loop and the tasks that call. The bound is
200 us a request (issue 4, acceptance 7).
"""

import argparse
import asyncio
import inspect
import json
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import uvloop

from deploy import servers

HERE: Final = Path(__file__).resolve()
BOUND_US: Final = 200
TENANT: Final = "bench"
KEY: Final = "abcdefghijkl"
USER: Final = "0123456789abcdef"
LIMIT: Final = 9_000_000_000_000_000
#: What each variant hands to the worker.
VARIANTS: Final = {
    "three levels": {"user": True, "rates": True},
    "rates off": {"user": True, "rates": False},
    "tenant, key": {"user": False, "rates": False},
}


# ---- the process that asks, in either tree ---------------------------------------------------------------------------


def _server_cpu(pid: int) -> float:
    """Seconds of all its threads (proc(5): the first field of schedstat, in ns)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text("utf-8").split()[0]) for task in tasks) / 1e9


def _client_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Asker:
    """Requests on the State of whichever tree is on the path: an older one has no keys, users and rates."""

    def __init__(self, state: Any, told: dict[str, Any]) -> None:
        self._state = state
        self._told = told
        self._reserve: dict[str, Any] = {}
        self._settle: dict[str, Any] = {}
        self._levelled = "key" in inspect.signature(state.ledger.reserve).parameters

    async def prepare(self) -> None:
        periods = ("day", "month", "lifetime")
        if not self._levelled:
            for period in periods:
                await self._state.set_limit(TENANT, period, LIMIT)
            return
        self._reserve = {"key": KEY, "user": USER}
        self._settle = {"key": KEY, "tokens": 900}
        levels = ["t", f"k:{KEY}"]
        if self._told["user"]:
            levels.append(f"u:{USER}")
            self._settle["user"] = USER
        for level in levels:
            for period in periods:
                await self._state.ledger.set_limit(tenant=TENANT, period=period, limit=LIMIT, level=level)
        if self._told["rates"]:
            from shared.state.base import Rates  # noqa: PLC0415 - an older tree has none

            most = 2**40
            self._reserve["rates"] = Rates(
                tokens=1000, tenant_requests=most, tenant_tokens=most, key_requests=most, key_tokens=most
            )

    async def request(self) -> None:
        rid, now, ledger = secrets.token_hex(16), self._state.clock.now(), self._state.ledger
        reserved = await ledger.reserve(
            tenant=TENANT, rid=rid, delivery=1, amount=300_000, deadline=now + 30_000, not_after=now + 1000,
            **self._reserve,
        )  # fmt: skip
        assert reserved.status == "ok"
        await ledger.dispatch(
            tenant=TENANT, rid=rid, delivery=1, instance="abcdefghijkl", lost="", amount=300_000, max_calls=3,
            not_after=now + 1000,
        )  # fmt: skip
        await ledger.settle(tenant=TENANT, rid=rid, call=1, cost=28_000, **self._settle)

    async def round(self, requests: int, concurrency: int, pid: int) -> dict[str, float]:
        async def worker() -> None:
            for _ in range(requests // concurrency):
                await self.request()

        loop = asyncio.get_running_loop()
        client, server, began = _client_cpu(), _server_cpu(pid), loop.time()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        wall = loop.time() - began
        made = requests // concurrency * concurrency
        return {
            "client": 1e6 * (_client_cpu() - client) / made,
            "server": 1e6 * (_server_cpu(pid) - server) / made,
            "wall": 1e6 * wall / made,
        }

    async def memory(self) -> dict[str, float]:
        """Bytes of Redis per entry that is remembered, with its lease and its lines of the journal."""
        info = await self._state._side.execute(b"INFO", b"memory", within=1.0)
        used = int(dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)["used_memory"])
        kept = await self._state._side.execute(b"HLEN", b"hp:{bench}:ent", within=1.0)
        return {"used": used, "kept": kept}


async def _ask(told: dict[str, Any]) -> None:
    from shared.settings import load  # noqa: PLC0415 - of the tree that is on the path
    from shared.state import ledger  # noqa: PLC0415
    from shared.state.redis import State  # noqa: PLC0415

    for name in ("ADMIT_TIMEOUT", "POST_TIMEOUT"):
        setattr(ledger, name, 30.0)  # this is not about time
    secret = dict.fromkeys(("GATEWAY_API_KEY", "KEY_PEPPER", "ADMIN_API_KEY"), "a" * 40)
    secret = {name: letter * 40 for name, letter in zip(secret, "abc", strict=True)}
    state = await State.connect(load({**secret, "REDIS_URL": told["url"], "LEDGER_TOMBSTONE_MS": "60000"}))
    try:
        asker = Asker(state, told)
        await asker.prepare()
        print("{}", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            answer = await asker.round(asked["requests"], asked["concurrency"], told["pid"])
            print(json.dumps(answer | await asker.memory()), flush=True)
    finally:
        await state.close()


# ---- the comparison --------------------------------------------------------------------------------------------------


class Variant:
    """One asker and its Valkey."""

    def __init__(self, tree: Path, folder: Path, told: dict[str, Any], stack: ExitStack) -> None:
        port = servers.free_port()
        process = stack.enter_context(
            servers.running(servers.valkey_command(folder, port), port, folder.with_suffix(".log"))
        )
        told = told | {"url": f"redis://127.0.0.1:{port}/0", "pid": process.pid}
        self._asker = subprocess.Popen(
            [sys.executable, "-P", str(HERE), "--ask", json.dumps(told)], cwd=tree, text=True,
            env=os.environ | {"PYTHONPATH": str(tree)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        stack.callback(self._asker.communicate, timeout=10)
        self.rounds: list[dict[str, float]] = []
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._asker.stdout is not None
        line = self._asker.stdout.readline()
        if not line:
            raise RuntimeError("an asker ended")
        found: dict[str, float] = json.loads(line)
        return found

    def round(self, requests: int, concurrency: int) -> dict[str, float]:
        assert self._asker.stdin is not None
        self._asker.stdin.write(json.dumps({"requests": requests, "concurrency": concurrency}) + "\n")
        self._asker.stdin.flush()
        return self._answer()

    def median(self, *names: str) -> float:
        return statistics.median(sum(each[name] for name in names) for each in self.rounds)

    @property
    def tombstone(self) -> float:
        """Bytes a remembered request, by what the rounds added."""
        first, last = self.rounds[0], self.rounds[-1]
        return (last["used"] - first["used"]) / max(1.0, last["kept"] - first["kept"])


@contextmanager
def _checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The commit's tree beside this one, or a folder as it stands."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    here = HERE.parents[2]
    subprocess.run(["git", "-C", str(here), "worktree", "add", "-f", "--detach", str(folder), commit], check=True,
                   capture_output=True)  # fmt: skip
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", str(here), "worktree", "remove", "--force", str(folder)], check=True)


def compare(chosen: argparse.Namespace, folder: Path) -> dict[str, Variant]:
    """The variants with their rounds, made in turn."""
    with ExitStack() as stack:
        variants = {
            name: Variant(HERE.parents[2], folder / f"valkey{i}", told, stack)
            for i, (name, told) in enumerate(VARIANTS.items())
        }
        if chosen.before:
            tree = stack.enter_context(_checkout(chosen.before, folder / "before"))
            told = VARIANTS["three levels"]
            variants[Path(chosen.before).name] = Variant(tree, folder / "valkey-before", told, stack)
        for variant in variants.values():
            variant.round(chosen.requests // 4, chosen.concurrency)  # warm-up
        for _ in range(chosen.rounds):
            for variant in variants.values():
                variant.rounds.append(variant.round(chosen.requests, chosen.concurrency))
        return variants


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ledger", description=__doc__)
    parser.add_argument("--before", default="", help="a commit, or a folder with another tree, to compare with")
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--ask", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    if chosen.ask:
        uvloop.run(_ask(json.loads(chosen.ask)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        variants = compare(chosen, Path(folder))
    print(
        f"reserve + dispatch + settle, {chosen.rounds} rounds of {chosen.requests} at concurrency "
        f"{chosen.concurrency}, medians, us CPU a request:"
    )
    whole = variants["three levels"]
    base = whole.median("client", "server")
    for name, each in variants.items():
        total = each.median("client", "server")
        print(
            f"  {name:14} {total:6.1f} = client {each.median('client'):5.1f} + server {each.median('server'):6.1f}"
            f"   x {total / base:.2f}   {each.tombstone:5.0f} bytes a remembered request"
        )
    print(f"bound: {BOUND_US} us for three levels with journal, rate limits and AOF: {base:.1f}")
    return 0 if base <= BOUND_US else 1


if __name__ == "__main__":
    sys.exit(main())
