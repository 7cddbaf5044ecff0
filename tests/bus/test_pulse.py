"""Beats out, beats in, and the stall detector."""

import asyncio
import time

import pytest

from shared.bus import pulse as module
from shared.bus.memory import Broker, MemoryBus
from shared.bus.pulse import Living, Pulse
from shared.bus.roster import Roster
from shared.bus.sender import Sender
from shared.wire import subjects
from shared.wire.messages import VERSION, Beat, decode_beat, encode
from tests.bus.conftest import Seen
from tests.wire.samples import NOISE, newer


def living(bus: MemoryBus, role: str = "guardian", instance: str = "g1") -> Living:
    return Living(role, instance, 10, lambda: 3, lambda: (True, True), bus, Sender(bus, role, instance, {}))


async def test_a_beat_at_once_and_on_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EARLY_BEAT_S", 0.01)
    bus, seen = Broker().client("one"), Seen()
    await bus.subscribe(subjects.beat("guardian", "*"), seen)
    pulse = Pulse({})
    pulse.start([living(bus)], "http://metrics")
    await seen.count(3)
    first = decode_beat(seen.payloads[0])
    assert seen.messages[0][0] == subjects.beat("guardian", "g1")
    assert (first.role, first.instance, first.in_flight, first.capacity, first.draining, first.metrics) == (
        "guardian", "g1", 3, 10, False, "http://metrics",
    )  # fmt: skip
    before = len(seen.messages)
    pulse.drain()
    await seen.count(before + 1)
    assert decode_beat(seen.payloads[before]).draining
    pulse.stop()
    await asyncio.sleep(0)
    after = len(seen.messages)
    pulse.beat()
    await asyncio.sleep(0.03)
    assert len(seen.messages) == after


async def test_a_beat_that_cannot_be_sent_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EARLY_BEAT_S", 0.01)
    broker = Broker()
    bus, other, seen = broker.client("one"), broker.client("two"), Seen()
    await other.subscribe(subjects.beat("guardian", "*"), seen)
    bus.cut()
    pulse = Pulse({})
    pulse.start([living(bus)], "")
    await asyncio.sleep(0.02)
    assert not seen.messages
    bus.cut(connected=True)
    await seen.count(1)
    pulse.stop()


async def test_beats_fill_the_rosters_if_subject_and_payload_agree() -> None:
    """A user who may publish beat.loadgen.* only must not be able to beat for a guardian."""
    bus = Broker().client("one")
    rosters = {"guardian": Roster("guardian"), "loadgen": Roster("loadgen")}
    pulse = Pulse(rosters)
    await pulse.listen(bus, rosters)
    bus.publish(subjects.beat("guardian", "g1"), encode(Beat(role="guardian", instance="g1")))
    bus.publish(subjects.beat("loadgen", "l1"), encode(Beat(role="guardian", instance="g2")))
    bus.publish(subjects.beat("loadgen", "l1"), encode(Beat(role="loadgen", instance="l2")))
    for garbage in (b"\x81\xa4role\x01", encode([1]), *NOISE):
        bus.publish(subjects.beat("guardian", "g3"), garbage)
    bus.publish(subjects.beat("guardian", "g3"), encode(Beat(v=VERSION + 2, role="guardian", instance="g3")))
    bus.publish(subjects.beat("guardian", "g4"), encode(newer(Beat(v=VERSION + 1, role="guardian", instance="g4"))))
    await asyncio.sleep(0)
    assert [b.instance for b in rosters["guardian"].alive(time.monotonic())] == ["g1", "g4"]
    assert len(rosters["loadgen"]) == 0
    assert pulse.ignored == 5 + len(NOISE)
    assert bus.errors == {}


async def test_an_own_stall_is_noticed_and_forgiven_to_others(caplog: pytest.LogCaptureFixture) -> None:
    """DESIGN 3: over 250 ms grants everybody one beat of grace."""
    bus = Broker().client("one")
    roster = Roster("guardian")
    pulse = Pulse({"guardian": roster})
    pulse.start([living(bus)], "")
    roster.on_beat(Beat(role="guardian", instance="g1"), time.monotonic() - 1.3)
    time.sleep(0.26)  # the stall itself
    assert roster.pick(time.monotonic()) is None
    await asyncio.sleep(0.12)
    assert roster.pick(time.monotonic()) == "g1"
    assert pulse.stalls == 1
    assert "stood still" in caplog.text
    await asyncio.sleep(0.15)
    assert pulse.stalls == 1
    pulse.stop()


async def test_the_others_are_heard_before_work_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`acquaint` waits for every role that was named, for one beat at most, and not for who was heard before."""
    monkeypatch.setattr(module, "ACQUAINT_S", 5)
    bus = Broker().client("one")
    pulse = Pulse({"routing": Roster("routing"), "provider": Roster("provider")})
    await pulse.listen(bus, ["routing", "provider"])
    waiting = asyncio.ensure_future(pulse.acquaint({"routing", "provider"}, together=True))
    bus.publish(
        subjects.beat("routing", "r1"), encode(Beat(role="routing", instance="r1", draining=True, booting=True))
    )
    await asyncio.sleep(0.01)
    assert not waiting.done()
    bus.publish(
        subjects.beat("provider", "p1"), encode(Beat(role="provider", instance="p1", draining=True, booting=True))
    )
    async with asyncio.timeout(1):
        await waiting
        await pulse.acquaint({"routing"}, together=True)
        await pulse.acquaint(set(), together=True)


async def test_in_a_fleet_at_work_everybody_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who knew one of two, or one that boots, would refuse what the other could take: a whole beat is waited for."""
    monkeypatch.setattr(module, "ACQUAINT_S", 0.4)
    bus = Broker().client("one")
    roster = Roster("routing")
    pulse = Pulse({"routing": roster})
    await pulse.listen(bus, ["routing"])
    waiting = asyncio.ensure_future(pulse.acquaint({"routing"}))
    boots = Beat(role="routing", instance="r1", draining=True, booting=True)
    bus.publish(subjects.beat("routing", "r1"), encode(boots))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    bus.publish(subjects.beat("routing", "r2"), encode(Beat(role="routing", instance="r2")))
    async with asyncio.timeout(1):
        await waiting
        await pulse.acquaint({"routing"})  # heard for long enough
    assert {beat.instance for beat in roster.alive(time.monotonic())} == {"r1", "r2"}


async def test_who_boots_is_heard_and_who_leaves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that boots will take work when we do; one that leaves will not, so its beat ends no wait."""
    monkeypatch.setattr(module, "ACQUAINT_S", 5)
    bus, seen = Broker().client("one"), Seen()
    await bus.subscribe(subjects.beat("guardian", "*"), seen)
    roster = Roster("routing")
    pulse = Pulse({"routing": roster})
    await pulse.listen(bus, {"routing"})
    pulse.announce([living(bus)])
    await seen.count(1)
    first = decode_beat(seen.payloads[0])
    assert (first.booting, first.draining, first.in_flight, first.metrics) == (True, True, 0, "")
    waiting = asyncio.ensure_future(pulse.acquaint({"routing"}, together=True))
    bus.publish(subjects.beat("routing", "r1"), encode(Beat(role="routing", instance="r1", draining=True)))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    boots = Beat(role="routing", instance="r2", draining=True, booting=True)
    bus.publish(subjects.beat("routing", "r2"), encode(boots))
    async with asyncio.timeout(1):
        await waiting
        await pulse.acquaint({"routing"}, together=True)
    assert roster.pick(time.monotonic()) is None, "neither gets work"
    pulse.start([living(bus)], "http://m")
    await seen.count(2)
    assert not decode_beat(seen.payloads[-1]).draining
    pulse.stop()


async def test_nobody_is_waited_for_longer_than_a_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACQUAINT_S", 0.01)
    pulse = Pulse({"routing": Roster("routing")})
    async with asyncio.timeout(1):
        await pulse.acquaint({"routing"}, together=True)
