"""Random kills and freezes of random roles under load, for as long as one likes.

    python -m tests.e2e.chaos [--minutes 5] [--seed S] [--rate 50]

Every blow comes from the seed: which roles, how many at once, killed or frozen, for how long, how long the pause after
it. Each leaves one of every worker role alive, as the promises of acceptance 1 want it; an ingress is killed too, whose
clients lose their connection. A line every 5 s; at the end every request is judged (verdict.py) and everything is
checked (invariants.py). A failing seed is the bug report.
"""

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from msgspec import Struct

from tests.e2e import verdict
from tests.e2e.barrage import RATE, TIMEOUT_MS, Barrage
from tests.e2e.fleet import ROLES, Blow, Fleet
from tests.e2e.rig import Up
from tests.e2e.rounds import SCALE, SETTINGS, Say, under_load

PROGRESS_S = 5.0


class Act(Struct, frozen=True):
    """What happens next: one process of each role is hit, `frozen` for so many seconds (0: killed); then a pause."""

    roles: tuple[str, ...]
    number: int
    frozen: float
    pause: float


def act(dice: random.Random) -> Act:
    """The next one."""
    roles = tuple(dice.sample(ROLES, dice.choice((1, 1, 1, 2, 2, 3))))
    frozen = dice.choice((0.0, 0.0, 0.0, dice.uniform(0.2, 1.4), dice.uniform(2.0, 8.0)))
    if frozen:  # a frozen ingress is its own clients' matter: they wait
        roles = tuple(role for role in roles if role != "ingress") or ("provider",)
    return Act(roles, dice.randrange(2), frozen, dice.uniform(0.2, 3.0))


def hit(fleet: Fleet, what: Act) -> list[Blow]:
    """All of it in one moment."""
    deal = fleet.freeze if what.frozen else fleet.kill
    return [deal(role, what.number) for role in what.roles]


async def run(
    up: Up, seconds: float, *, seed: int, rate: float = RATE, timeout_ms: int = TIMEOUT_MS, say: Say = print
) -> dict[str, verdict.Cost]:
    """Against a running Up; raises AssertionError for what was broken."""
    dice, dealt, done = random.Random(seed), Counter[str](), asyncio.Event()

    async def progress(barrage: Barrage) -> None:
        began = time.monotonic()
        while not done.is_set():
            said = ", ".join(f"{count} {kind}" for kind, count in sorted(dealt.items()))
            say(f"{time.monotonic() - began:5.0f} of {seconds:.0f} s: {len(barrage.shots)} answered,"
                f" {barrage.open} open; {said or 'nothing dealt yet'}")  # fmt: skip
            await asyncio.wait({asyncio.ensure_future(done.wait())}, timeout=PROGRESS_S)

    async def work(fleet: Fleet, barrage: Barrage) -> None:
        telling = asyncio.create_task(progress(barrage))
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                what = act(dice)
                blows = hit(fleet, what)
                dealt.update(blow.kind for blow in blows)
                await asyncio.sleep(what.frozen)
                for blow in blows if what.frozen else ():
                    fleet.thaw(blow)
                await fleet.whole()
                await asyncio.sleep(what.pause)
        finally:
            done.set()
            await telling

    return await under_load(up, work, seed=seed, rate=rate, timeout_ms=timeout_ms, say=say)


def main() -> int:
    """The named command."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--rate", type=float, default=RATE)
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}")
    with tempfile.TemporaryDirectory() as folder, Up(Path(folder) / "up", "--scale", SCALE, env=SETTINGS) as up:
        asyncio.run(run(up, wanted.minutes * 60, seed=wanted.seed, rate=wanted.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
