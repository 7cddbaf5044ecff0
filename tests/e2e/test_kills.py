"""Acceptance 1: workers killed and frozen under load, kill points, an ingress killed (faults 1 to 17, 19, 20, 33).

Six rounds and every kill point once run here. More: `python -m tests.e2e.rounds --rounds 20`,
`python -m tests.e2e.kill_points --times 3`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import kill_points, rounds
from tests.e2e.rig import Up

ROUNDS = 6


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KILLAT_DIR of the fleet."""
    return tmp_path_factory.mktemp("arms")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, arms: Path) -> Iterator[Up]:
    """Two of each role, default liveness."""
    env = {**kill_points.SETTINGS, "KILLAT_DIR": str(arms)}
    with Up(tmp_path_factory.mktemp("two"), "--scale", rounds.SCALE, env=env) as running:
        yield running


@pytest.mark.timeout(120)
async def test_killed_and_frozen_under_load(two: Up) -> None:
    """S1-H5, faults 5 to 17: nothing that could be served is lost, nobody else is harmed, the money agrees (I1)."""
    costs = await rounds.run(two, ROUNDS)
    assert set(costs) == {
        f"{how} {role}" for how in ("killed", "frozen") for role in ("guardian", "routing", "provider")
    }
    assert costs["killed provider"].cuts, "no stream of a dead provider was started: the load did not test that"
    assert costs["frozen provider"].cuts


@pytest.mark.timeout(150)
async def test_every_kill_point(two: Up, arms: Path) -> None:
    """S1-H5, faults 1 to 17: each named point, whole and streamed: the client's promise, and the money at the end."""
    points, counts = await kill_points.run(two, arms, kill_points.visits())
    assert len(points.slowest) >= 40
    assert counts["requests with several calls"] > 5
