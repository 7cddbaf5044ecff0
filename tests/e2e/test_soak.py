"""Nothing grows (I8): the small version of `python -m tests.load soak`, which asks 200,000 and looks at the slopes."""

import asyncio
from pathlib import Path

import pytest

from tests.e2e.sim import until
from tests.load import soak
from tests.load.hammer import Hammer

BATCH = 2200
BATCHES = 3
#: Growth of one process from the second batch to the third. The ring of traces is full after 10,000 requests (some
#: 5 MB at the ingress); a leak of 1 KiB a request would be 2.4 MiB more.
RSS_MIB = 5.0
#: Held by what goes on with nobody asking: a poll of Redis under way, a kept-alive connection of the scrape itself.
SLACK = 4.0
#: These end by themselves, later: idle upstream connections after 15 s, pairs after 60 s and more.
LATER = ("upstream connections", "pairs of the ingress", "pairs of the provider", "descriptors", "RSS MiB")


def quiet(before: soak.Sample, now: soak.Sample) -> dict[str, tuple[float, float]]:
    """What is above its baseline: (then, now)."""
    return {
        name: (then, now[name])
        for name, then in before.items()
        if not name.startswith("redis") and not name.endswith(LATER) and now[name] > then + SLACK
    }


async def test_a_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6,600 requests, some cut, failed or left: tasks, exchanges, walks, channels come back after each batch, memory
    stays, and 20 s after they were settled the ledger has forgotten them all."""
    with soak.running(tmp_path) as (up, monitor):

        def look() -> soak.Sample:
            return soak.look(up, monitor)

        look()  # the first scrape makes the workers load aiohttp: 11 MB each
        before = await asyncio.to_thread(look)
        after = []
        for number in range(BATCHES):
            hammer = Hammer(up.url, up.run["api_key"], BATCH, 48, seed=number)
            await hammer.run()
            assert hammer.asked == BATCH
            assert not {"500", "not connected"} & hammer.ended.keys(), hammer.ended
            left = await asyncio.to_thread(until, lambda: quiet(before, look()), lambda found: not found, 5.0, 0.2)
            assert not left, ("not back at its baseline", left)
            after.append(await asyncio.to_thread(look))
        rss = {name: after[-1][name] - after[-2][name] for name in before if name.endswith("RSS MiB")}
        wait = soak.TOMBSTONE_S + 5
        last = await asyncio.to_thread(until, look, lambda found: found["redis entries"] == 0, wait, 0.5)
        with capsys.disabled():
            print(f"\n{BATCH * BATCHES} requests: {dict(hammer.ended)}; MiB grown in the last batch: {rss}")
            print(f"entries {after[-1]['redis entries']:.0f} -> {last['redis entries']:.0f}")
        assert max(rss.values()) < RSS_MIB, rss
        assert last["redis entries"] == last["redis leases"] == 0
        assert last["redis keys"] <= after[0]["redis keys"], "balances, circuits; entries and leases are gone"
        assert last["redis used MiB"] <= before["redis used MiB"] + 1
        assert last["nats connections"] == before["nats connections"]
        assert last["nats subscriptions"] == before["nats subscriptions"]
        assert last["nats slow_consumers"] == 0
