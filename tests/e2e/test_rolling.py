"""Issue 3, acceptance 5: every role is replaced while 100 streams are open and requests come; nobody notices.

The short version; `python -m tests.e2e.rolling` is the long one (streams of 60 s, 70 % of capacity).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import invariants
from tests.e2e.rig import Up
from tests.e2e.rolling import roll
from tests.e2e.sim import Sim

STREAMS = 100
SECONDS = 5.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Up]:
    """One of each role but two guardians: with a single one nobody is there to take over but its replacement."""
    with Up(tmp_path / "data", "--scale", "guardian=2", env={"SHUTDOWN_STREAM_DRAIN_MS": "120000"}) as up:
        yield up


async def test_every_role_is_replaced_under_load(fleet: Up) -> None:
    """S1-H5, D8, faults 84: 0 failed requests, 0 cut streams, by aiohttp and by the openai SDK that tries nothing
    twice; the books and the bill agree."""
    sim = Sim(fleet.run["simulator_url"])
    before = fleet.pids()
    made = {"tenant": "rolling", **fleet.cli("keys", "create", "--tenant", "rolling")}
    result = await roll(fleet, made, role="all", streams=STREAMS, seconds=SECONDS, rate=30, say=print)
    assert result.failed == []
    names = [one["name"] for one in result.restarted]
    assert names == ["provider.1", "routing.1", "guardian.1", "guardian.2", "ingress.1"]
    assert len(set(before) & set(fleet.pids())) == 3, "the servers and the simulator"
    counts = await invariants.check(fleet, sim, made, result.asked)
    print(invariants.show(counts))
    print(f"{result.sdk_answers} by the SDK, {result.held_back} not offered, {result.seconds} s")
    assert counts["ended well"] == len(result.asked)
    assert result.sdk_answers > 50
    assert not [line for line in fleet.said().splitlines() if "did not finish" in line or "killed" in line]
