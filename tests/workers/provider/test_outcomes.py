"""What the breakers are told, at its bounds."""

import asyncio

import pytest

from shared.bus.memory import Broker
from shared.wire import subjects
from shared.wire.messages import decode_outcomes
from workers.provider import outcomes
from workers.provider.outcomes import OutcomeLog


async def test_a_full_batch_goes_at_once_and_a_bus_that_is_away_costs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than MAX_BATCH wait; what cannot be published is dropped, not kept."""
    monkeypatch.setattr(outcomes, "MAX_BATCH", 3)
    monkeypatch.setattr(outcomes, "EVERY_S", 1000.0)
    broker = Broker()
    told: asyncio.Queue[int] = asyncio.Queue()
    listener = broker.client("listener")
    await listener.subscribe(subjects.OUTCOME, lambda _s, _r, p, _n: told.put_nowait(len(decode_outcomes(p).calls)))
    bus = broker.client("provider")
    log = OutcomeLog(bus, asyncio.get_running_loop())
    for _ in range(7):
        log.add("sim", ok=True)
    async with asyncio.timeout(3):
        assert [await told.get(), await told.get()] == [3, 3]
    bus.cut()
    for _ in range(5):
        log.add("sim", ok=False)
    assert len(log._waiting) < 3
    log.flush()
    assert log._waiting == []
