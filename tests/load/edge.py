"""`python -m tests.load edge`: a thousand reservations at once at the edge of a limit, from four processes (I2, S0-22).

Each process has a connection of its own, as a guardian has, and asks for its quarter of the thousand in one write; what
the limit stands on (tenant, key or user; day, month or lifetime), the amount and what is settled and held beforehand
change from round to round. Clamping is off and nothing is settled meanwhile: exactly floor(headroom / amount) must be
admitted, the others must be told what is left, and no line of the journal may pass the limit. tests/e2e/test_limit.py
is the same through four whole guardians over HTTP.
"""

import argparse
import asyncio
import json
import random
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import uvloop
from msgspec import Struct
from rich.console import Console
from rich.progress import Progress

from deploy import servers
from shared.core.journal import Replay
from shared.settings import load
from shared.state import books, keys, ledger
from shared.state.base import Reserved
from shared.state.redis import State

PROCESSES: Final = 4
CROWD: Final = 1000
KEY: Final = "abcdefghijkl"
USER: Final = "0123456789abcdef"
LEVELS: Final = ("t", f"k:{KEY}", f"u:{USER}")
HOUR_MS: Final = 3_600_000


class Round(Struct, frozen=True, kw_only=True):
    """What one round came to."""

    expected: int
    admitted: int
    told: list[int]  # what the denied were told is left, each amount once
    left: int  # what is left
    over: int  # nano-USD past the limit
    wrong: int  # lines of the journal that the replay objects to
    ms: float

    @property
    def exact(self) -> bool:
        told = [] if self.admitted == CROWD else [self.left]
        return self.admitted == self.expected and self.told == told and self.over <= 0 and not self.wrong


def _state(url: str) -> Any:
    secret = {
        name: letter * 40 for name, letter in (("GATEWAY_API_KEY", "a"), ("KEY_PEPPER", "b"), ("ADMIN_API_KEY", "c"))
    }
    return State.connect(load({**secret, "REDIS_URL": url}))


async def _reserve(state: State, tenant: str, amount: int) -> Reserved:
    now = state.clock.now()
    return await state.ledger.reserve(
        tenant=tenant, rid=secrets.token_hex(16), delivery=1, amount=amount, deadline=now + HOUR_MS,
        not_after=now + HOUR_MS, key=KEY, user=USER,
    )  # fmt: skip


# ---- one of the four -------------------------------------------------------------------------------------------------


async def _asker(url: str) -> None:
    """For each line of standard input a crowd of reservations; one line back."""
    state = await _state(url)
    print("{}", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        answers = await asyncio.gather(
            *(_reserve(state, asked["tenant"], asked["amount"]) for _ in range(asked["count"]))
        )
        admitted = sum(answer.status == "ok" for answer in answers)
        told = {answer.left for answer in answers if answer.status == "denied"}
        assert admitted + sum(answer.status == "denied" for answer in answers) == asked["count"]
        print(json.dumps({"admitted": admitted, "told": sorted(told)}), flush=True)
    await state.close()


# ---- the four together -----------------------------------------------------------------------------------------------


class Edge:
    """The askers and a connection to look with."""

    def __init__(self, state: State, url: str) -> None:
        self._state = state
        command = [sys.executable, "-m", "tests.load", "edge", "--ask", url]
        self._askers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(PROCESSES)
        ]
        self._answers()  # they are connected

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for asker in self._askers:
            assert asker.stdout is not None
            line = asker.stdout.readline()
            if not line:
                raise RuntimeError("an asker ended")
            found.append(json.loads(line))
        return found

    def close(self) -> None:
        for asker in self._askers:
            asker.communicate(timeout=10)

    async def round(self, dice: random.Random) -> Round:
        """One crowd, at a limit of its own."""
        tenant, book = secrets.token_hex(8), self._state.ledger
        amount = dice.choice([1, 7, 300_000, 30_000_001, 8_000_000_000])
        fit = dice.randrange(CROWD + 50)
        settled, held = dice.randrange(3) * amount, dice.randrange(2) * (amount // 2 + 1)
        limit = settled + held + fit * amount + dice.randrange(amount)
        level, period = dice.choice(LEVELS), dice.choice(keys.PERIODS)
        await book.set_limit(tenant=tenant, period=period, limit=limit, level=level)
        if settled:
            rid = secrets.token_hex(16)
            await book.settle(tenant=tenant, rid=rid, call=1, cost=settled, key=KEY, user=USER)
        if held:
            await _reserve(self._state, tenant, held)
        line = json.dumps({"tenant": tenant, "amount": amount, "count": CROWD // PROCESSES}) + "\n"
        began = time.perf_counter()
        for asker in self._askers:
            assert asker.stdin is not None
            asker.stdin.write(line)
            asker.stdin.flush()
        answers = await asyncio.to_thread(self._answers)
        took = time.perf_counter() - began
        admitted = sum(answer["admitted"] for answer in answers)
        rows = {row.period: row for row in await book.balances(tenant=tenant, level=level)}
        row = rows[period]
        used = row.settled + row.pending + row.unconfirmed
        assert used == settled + held + admitted * amount
        return Round(
            expected=min(CROWD, (limit - settled - held) // amount),
            admitted=admitted,
            told=sorted({left for answer in answers for left in answer["told"]}),
            left=limit - used,
            over=used - limit,
            wrong=await self._wrong(tenant),
            ms=1000 * took,
        )

    async def _wrong(self, tenant: str) -> int:
        """Lines that the replay objects to, or balances that are not what it comes to."""
        replay, wrong, after = Replay(), 0, ""
        while page := await self._state.ledger.journal(tenant=tenant, after=after):
            wrong += sum(len(replay.feed(line)) for line in page)
            after = page[-1].id
        return wrong + len(replay.differences(await self._state.ledger.levels(tenant=tenant)))


async def rounds(url: str, count: int, seed: int, bar: Progress | None = None) -> list[Round]:
    """So many rounds on the Redis at `url`. Raises RuntimeError when an asker ended."""
    state = await _state(url)
    edge = Edge(state, url)
    dice, done = random.Random(seed), []
    task = bar.add_task("rounds", total=count) if bar else None
    try:
        for _ in range(count):
            done.append(await edge.round(dice))
            if bar is not None and task is not None:
                bar.update(task, advance=1)
    finally:
        edge.close()
        await state.close()
    return done


def main(words: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load edge", description=__doc__)
    parser.add_argument("mode", choices=["edge"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    # a thousand at once on a busy machine may take longer than a request has: this is not about time
    with patch.object(ledger, "ADMIT_TIMEOUT", 30.0), patch.object(books, "POST_TIMEOUT", 30.0):
        if chosen.ask:
            uvloop.run(_asker(chosen.ask))
            return 0
        with tempfile.TemporaryDirectory() as folder, Progress(console=console) as bar:
            port, path = servers.free_port(), Path(folder)
            with servers.running(servers.valkey_command(path / "valkey", port), port, path / "log"):
                url = f"redis://127.0.0.1:{port}/0"
                done = uvloop.run(rounds(url, chosen.rounds, chosen.seed, bar))
    times = sorted(each.ms for each in done)
    print(
        f"{len(done)} rounds of {CROWD} reservations from {PROCESSES} processes: "
        f"{sum(each.exact for each in done)} exact, {sum(each.over > 0 for each in done)} overruns, "
        f"{sum(each.admitted for each in done)} of {sum(each.expected for each in done)} admitted that fit, "
        f"{sum(each.wrong for each in done)} journal lines wrong; "
        f"a crowd took {times[len(times) // 2]:.0f} ms (median), {times[-1]:.0f} at most"
    )
    return 0 if all(each.exact for each in done) else 1
