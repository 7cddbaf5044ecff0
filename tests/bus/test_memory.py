"""What only the MemoryBus can do: faults on order."""

import asyncio

import pytest

from shared.bus.base import BusUnavailable
from shared.bus.memory import Broker
from tests.bus.conftest import Seen


async def test_cut_off_and_back() -> None:
    broker = Broker()
    changes: list[bool] = []
    one, two = broker.client("one"), broker.client("two", changes.append)
    seen, inbox = Seen(), Seen()
    await two.subscribe("t", seen)
    await one.subscribe("inbox.*", inbox)
    two.cut()
    with pytest.raises(BusUnavailable):
        two.publish("t", b"")
    one.publish("t", b"lost", "inbox.1")
    await inbox.count(1)
    two.cut(connected=True)
    one.publish("t", b"heard")
    await seen.count(1)
    assert seen.payloads == [b"heard"]
    assert inbox.messages[0][3]
    assert changes == [False, True]


async def test_the_kth_message_is_lost_or_doubled() -> None:
    broker = Broker()
    bus, seen = broker.client("one"), Seen()
    await bus.subscribe("t.*", seen)
    broker.drop("t.a", 2)
    broker.duplicate("t.>", 4)
    for number in range(6):
        bus.publish("t.a", str(number).encode())
    await asyncio.sleep(0)
    assert seen.payloads == [b"0", b"2", b"3", b"3", b"4", b"5"]
