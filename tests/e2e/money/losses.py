"""Answers of Redis that are lost: the script has run, whoever asked does not know it (faults 45, 46; D4).

Each loss takes the answer of the next call of one script, of whichever process, and resets that connection; what else
was on it is lost too. Nobody has died, so at the end nothing may be unconfirmed, and no client waits.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from shared.state.ledger import SCRIPTS
from tests.e2e import invariants
from tests.e2e.drive import Client
from tests.e2e.invariants import Asked, prompt
from tests.e2e.proxy import Proxy
from tests.e2e.sim import Sim

#: Scripts whose answer is lost, one after the other: a void follows from a reserve in doubt.
LOSSES: Final = (("reserve",), ("reserve", "void"), ("dispatch",), ("topup",), ("settle",), ("settle", "settle"))
HANDFUL: Final = 4
LOST_S: Final = 8.0
TIMEOUT_MS: Final = 6000
#: Time for the connections to come back: the next loss is another story.
BACK_S: Final = 0.4
#: How a client with a hard limit may end when the ledger did not answer: refused before anything was called, or with
#: what the first call failed with when the further one could not be opened.
REFUSED: Final = frozenset({"ledger_unavailable", "upstream_error"})


class Loss(Struct, frozen=True):
    """One loss."""

    scripts: tuple[str, ...]
    stream: bool

    @property
    def name(self) -> str:
        """For progress and failures."""
        return f"answer of {' and '.join(self.scripts)} lost ({'streamed' if self.stream else 'whole'})"


def all_losses(times: int = 1) -> list[Loss]:
    """Each, whole and streamed."""
    return [Loss(scripts, stream) for _ in range(times) for scripts in LOSSES for stream in (False, True)]


async def visit(loss: Loss, to_redis: Proxy, client: Client, sim: Sim) -> list[Asked]:
    """Ask, and lose; what the clients saw."""
    if "topup" in loss.scripts:  # a further call: the first ones are refused
        sim.fault(status=503, times=HANDFUL)
    asking: list[asyncio.Task[Asked]] = []
    for script in loss.scripts:
        to_redis.lose_answer(SCRIPTS[script].digest)
        if not asking:
            asking = [asyncio.create_task(_ask(client, stream=loss.stream)) for _ in range(HANDFUL)]
        await _lost(to_redis, loss)
    asked = list(await asyncio.gather(*asking))
    sim.clear_faults()
    for one in asked:
        seen = one.seen
        assert seen.ended_well or seen.error.get("code") in REFUSED, (loss.name, one)
    await asyncio.sleep(BACK_S)
    return asked


async def _ask(client: Client, *, stream: bool) -> Asked:
    asked = prompt(12, **({"pace": 10} if stream else {"delay_ms": 50}))
    at = time.monotonic()
    seen = await client.chat(asked, stream=stream, headers={"X-Timeout-Ms": str(TIMEOUT_MS)})
    return Asked(prompt=asked, seen=seen, at=at, may_fail=True)


async def _lost(to_redis: Proxy, loss: Loss) -> None:
    end = time.monotonic() + LOST_S
    while not to_redis.lost:
        assert time.monotonic() < end, f"{loss.name}: nobody asked"
        await asyncio.sleep(0.005)


async def run(
    up: Any, to_redis: Proxy, client: Client, sim: Sim, made: dict[str, Any], losses: list[Loss],
    say: Callable[[str], None] = print,
) -> list[Asked]:  # fmt: skip
    """All of them; then everything is checked, and that nobody is unconfirmed."""
    asked: list[Asked] = []
    began = time.monotonic()
    for number, loss in enumerate(losses, 1):
        asked += await visit(loss, to_redis, client, sim)
        say(f"{time.monotonic() - began:5.1f} s  {number:3} of {len(losses)}  {loss.name}")
    counts = await invariants.check(up, sim, made, asked, dead=True, lease_s=TIMEOUT_MS / 1000 + 6)
    assert counts["calls unconfirmed"] == 0, counts
    say(invariants.show(counts))
    return asked
