"""Sending to one live instance, and to the next when nobody was there (DESIGN 3; faults 37)."""

import asyncio

import msgspec
import pytest

from shared.bus import replies, sender
from shared.bus.base import BadSubject, BusUnavailable, PayloadTooLarge
from shared.bus.memory import Broker, MemoryBus
from shared.bus.roster import Roster
from shared.bus.sender import NoLiveInstance, Sender
from shared.wire import errors, messages, subjects
from shared.wire.messages import Ask, Beat, Hop, ReplyTo
from tests.bus.conftest import AnyBus, Connect, Seen


class World:
    """One sender and a roster of workers on a bus."""

    def __init__(self, bus: AnyBus) -> None:
        self.bus = bus
        self.now = 100.0
        self.roster = Roster("routing")
        self.sender = Sender(bus, "ingress", "me", {"routing": self.roster}, lambda: self.now)
        self.undeliverable: list[str] = []
        self.lost: list[tuple[str, str]] = []

    def beat(self, *instances: str) -> None:
        for instance in instances:
            self.roster.on_beat(Beat(role="routing", instance=instance), self.now)

    def send(
        self,
        payload: bytes = b"x",
        skip: frozenset[str] = frozenset(),
        tried: frozenset[str] = frozenset(),
        fenced: bool = False,
    ) -> str:
        return self.sender.send(
            "routing",
            payload,
            skip=skip,
            tried=tried,
            fenced=fenced,
            lost=lambda dead, following: self.lost.append((dead, following)),
            on_undeliverable=lambda: self.undeliverable.append(payload.decode()),
        )


@pytest.fixture
async def world(connect: Connect) -> World:
    made = World(await connect("sender"))
    await made.sender.start()
    return made


async def settled(world: World) -> None:
    """Everything on its way has arrived: twice there and back."""
    for _ in range(3):
        await world.bus.flush()
        await asyncio.sleep(0)


async def test_one_live_instance_gets_it_with_our_inbox_as_reply(world: World, connect: Connect) -> None:
    worker, seen = await connect("worker"), Seen()
    await worker.subscribe(subjects.worker("routing", "w1"), seen)
    world.beat("w1")
    assert world.send(b"hello") == "w1"
    await seen.count(1)
    subject, reply, payload, _ = seen.messages[0]
    assert (subject, payload) == (subjects.worker("routing", "w1"), b"hello")
    assert reply.startswith(subjects.inbox("ingress", "me", ""))
    await settled(world)
    assert not world.undeliverable
    assert not world.lost


async def test_nobody_there_goes_to_the_next_instance(world: World, connect: Connect) -> None:
    worker, seen = await connect("worker"), Seen()
    await worker.subscribe(subjects.worker("routing", "w9"), seen)
    world.beat("w1", "w2", "w9")
    for number in range(20):
        world.send(str(number).encode())
    await seen.count(20)
    await settled(world)
    assert sorted(seen.payloads) == sorted(str(number).encode() for number in range(20))
    assert {dead for dead, _ in world.lost} <= {"w1", "w2"}
    assert world.lost
    assert not world.undeliverable
    assert world.sender.resent == len(world.lost)
    assert world.send(b"later") == "w9"  # the dead are known now


async def test_with_none_left_the_caller_is_told_once(world: World) -> None:
    """Faults 37: no responder on a hop."""
    world.beat("w1", "w2", "w3")
    world.send(b"mine")
    await settled(world)
    assert world.undeliverable == ["mine"]
    assert len(world.lost) == 2
    with pytest.raises(NoLiveInstance):
        world.send()


async def test_what_was_sent_can_be_waited_for(world: World) -> None:
    """A process that leaves hears of every message that nobody took, over all instances it went to."""
    world.beat("w1", "w2", "w3")
    world.send(b"mine")
    await world.sender.settled()
    assert world.undeliverable == ["mine"]
    assert len(world.lost) == 2


async def test_each_instance_is_tried_at_most_once_even_if_it_beats_again() -> None:
    """A beat that was on its way when its instance died must not make two dead instances play ball."""
    bus = Broker().client("sender")
    world = World(bus)
    await world.sender.start()
    world.beat("w1", "w2")
    tried: list[str] = []

    def on_lost(dead: str, _following: str) -> None:
        tried.append(dead)
        world.beat("w1", "w2")

    world.sender.send("routing", b"x", lost=on_lost, on_undeliverable=lambda: tried.append("told"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(tried) == 2
    assert tried[1] == "told"


async def test_skipped_instances_are_never_tried(world: World) -> None:
    world.beat("w1", "w2")
    assert world.send(b"mine", frozenset({"w1"})) == "w2"
    await settled(world)
    assert world.undeliverable == ["mine"]
    assert not world.lost
    with pytest.raises(NoLiveInstance):
        world.send(b"again", frozenset({"w1", "w2"}))


async def test_who_did_not_answer_before_is_tried_last(world: World) -> None:
    """DESIGN 1: a re-delivery goes to another instance, to the same one only when there is no other."""
    world.beat("w1", "w2")
    assert {world.send(tried=frozenset({"w1"})) for _ in range(20)} == {"w2"}
    assert world.send(tried=frozenset({"w1", "w2"})) in {"w1", "w2"}
    assert world.send(skip=frozenset({"w2"}), tried=frozenset({"w1"})) == "w1"
    with pytest.raises(NoLiveInstance):
        world.send(skip=frozenset({"w1", "w2"}), tried=frozenset({"w1"}))


async def test_what_a_killed_instance_had_not_read_goes_to_another(world: World, connect: Connect) -> None:
    """faults 9, 11: NATS had delivered it, so no 503 comes; the look after 100 ms or 200 finds nobody there."""
    first, second, seen, other = await connect("w1"), await connect("w2"), Seen(), Seen()
    subscription = await first.subscribe(subjects.worker("routing", "w1"), seen)
    await second.subscribe(subjects.worker("routing", "w2"), other)
    world.beat("w1")
    world.send(b"long ago", fenced=True)
    world.now += 0.5
    world.beat("w1")
    world.send(b"not fenced")
    world.send(b"unread", fenced=True)
    await seen.count(3)
    world.beat("w2")
    await subscription.drain()
    async with asyncio.timeout(2):
        await other.count(1)
    assert other.payloads == [b"unread"]
    assert world.lost == [("w1", "w2")]
    assert world.roster.heard("w1") is None
    async with asyncio.timeout(2):
        await other.count(2)
    assert other.payloads[1:] == [b""], "who was sent something is asked after"
    await asyncio.sleep(3 * sender.LOOK_S)
    assert len(other.payloads) <= 3, "and after two looks no more"


async def test_nobody_is_left_for_what_was_unread(world: World, connect: Connect) -> None:
    worker, seen = await connect("w1"), Seen()
    subscription = await worker.subscribe(subjects.worker("routing", "w1"), seen)
    world.beat("w1")
    world.send(b"unread", fenced=True)
    await seen.count(1)
    await subscription.drain()
    async with asyncio.timeout(2):
        while not world.undeliverable:
            await asyncio.sleep(0.01)
    assert world.undeliverable == ["unread"]
    assert world.sender.kept == 0


async def test_what_cannot_be_published_is_said_at_once(world: World) -> None:
    with pytest.raises(NoLiveInstance):
        world.send()
    world.beat("w1")
    with pytest.raises(PayloadTooLarge):
        world.send(bytes(world.bus.max_payload + 1))
    assert world.sender.kept == 0
    await world.bus.close()
    with pytest.raises(BusUnavailable):
        world.send()
    assert not world.undeliverable


async def test_a_connection_lost_before_the_second_sending_is_undeliverable() -> None:
    broker = Broker()
    bus = broker.client("sender")
    world = World(bus)
    await world.sender.start()
    world.beat("w1", "w2")
    world.send(b"mine")
    bus.cut()
    await asyncio.sleep(0)
    assert world.undeliverable == ["mine"]


async def test_kept_messages_are_forgotten_after_a_second(world: World) -> None:
    world.beat("w1")
    world.send()
    world.sender.sweep(world.now + 0.9)
    assert world.sender.kept == 1
    world.sender.sweep(world.now + 1.1)
    assert world.sender.kept == 0
    await settled(world)
    assert not world.undeliverable  # the 503 of a forgotten message is nobody's


async def test_kept_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(MemoryBus(Broker(), "sender"))
    world.beat("w1")
    monkeypatch.setattr(sender, "MAX_KEPT", 10)
    for _ in range(50):
        world.send()
    assert world.sender.kept <= 11
    monkeypatch.setattr(sender, "MAX_KEPT_BYTES", 1000)
    for _ in range(50):
        world.send(bytes(300))
    assert world.sender.kept <= 4


async def test_only_503s_to_a_known_token_count(world: World, connect: Connect) -> None:
    """A worker (or anybody) that writes to the inbox cannot make a sender send again."""
    worker, seen = await connect("worker"), Seen()
    await worker.subscribe(subjects.worker("routing", "w1"), seen)
    world.beat("w1")
    world.send()
    await seen.count(1)
    worker.publish(seen.messages[0][1], b"")
    worker.publish(subjects.inbox("ingress", "me", "999"), b"x")
    await worker.flush()
    await settled(world)
    assert not world.undeliverable
    assert not world.lost


ASK = Ask(rid="0" * 32, delivery=2, tenant="t", key="k", reply=ReplyTo("ingress", "i1", 7), body=b"")


async def test_fail_sends_one_failed_frame_to_the_asker(connect: Connect) -> None:
    bus, seen = await connect("one"), Seen()
    await bus.subscribe(subjects.reply("ingress", "*"), seen)
    hops = (Hop("guardian", "g1", 4, 5, 6),)
    replies.fail(bus, "guardian", "g1", ASK, errors.NoWorker(), head={"X-BR-Calls": "0"}, hops=hops, seq=3)
    await seen.count(1)
    assert seen.messages[0][0] == subjects.reply("ingress", "i1")
    batch = messages.decode_batch(seen.payloads[0])
    assert (batch.role, batch.instance, batch.offset) == ("guardian", "g1", 0)
    frame = messages.decode_frame(batch.frames[0])
    assert frame == messages.Failed(7, 2, 3, errors.NoWorker().body(), {"X-BR-Calls": "0"}, hops)


@pytest.mark.parametrize("reply", [("guardian", "i1"), ("ingress", "a.b"), ("ingress", ""), ("ingress", "*"), ("", "")])
async def test_frames_go_to_askers_only(reply: tuple[str, str]) -> None:
    """DESIGN 3: never a subject from outside; the envelope of a direct publisher is from outside."""
    ask = msgspec.structs.replace(ASK, reply=ReplyTo(*reply, 1))
    with pytest.raises(BadSubject):
        replies.fail(Broker().client("one"), "guardian", "g1", ask, errors.NoWorker())
