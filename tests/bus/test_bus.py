"""What a bus does, stated once for NatsBus (on a real NATS) and MemoryBus (DESIGN 2: the twins pass the same tests)."""

import asyncio

import pytest

from shared.bus.base import BadSubject, BusUnavailable, PayloadTooLarge
from tests.bus.conftest import Connect, Seen


async def test_messages_come_in_the_order_they_were_published(connect: Connect) -> None:
    one, two = await connect("one"), await connect("two")
    seen = Seen()
    await two.subscribe("t.order", seen)
    for number in range(2000):
        one.publish("t.order", str(number).encode())
    await seen.count(2000)
    assert seen.payloads == [str(number).encode() for number in range(2000)]
    assert seen.messages[0] == ("t.order", "", b"0", False)


async def test_a_publish_never_runs_a_handler_before_it_returns(connect: Connect) -> None:
    bus = await connect("one")
    seen = Seen()
    await bus.subscribe("t.self", seen)
    bus.publish("t.self", b"x")
    assert not seen.messages
    await seen.count(1)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("t.*.c", ["t.a.c", "t.b.c"], ["t.c", "t.a.b.c", "t.a.d"]),
        ("t.a.>", ["t.a.b", "t.a.b.c"], ["t.a", "t.b.a"]),
        ("*.*", ["t.a"], ["t", "t.a.b"]),
        ("t.a-b_c", ["t.a-b_c"], ["t.a-bxc"]),
    ],
)
async def test_wildcards(connect: Connect, pattern: str, yes: list[str], no: list[str]) -> None:
    bus = await connect("one")
    seen, end = Seen(), Seen()
    await bus.subscribe(pattern, seen)
    await bus.subscribe("z.end.of.test", end)
    for subject in [*no, *yes]:
        bus.publish(subject, b"")
    bus.publish("z.end.of.test", b"")
    await end.count(1)
    assert [message[0] for message in seen.messages] == yes


async def test_a_queue_group_gets_each_message_once_and_others_get_their_own(connect: Connect) -> None:
    clients = [await connect(f"member{number}") for number in range(3)]
    members, outsider, end = [Seen() for _ in clients], Seen(), Seen()
    for client, member in zip(clients, members, strict=True):
        await client.subscribe("t.queue", member, "group")
    await clients[0].subscribe("t.queue", outsider)
    await clients[0].subscribe("t.queue.end", end)
    for number in range(300):
        clients[0].publish("t.queue", str(number).encode())
    await outsider.count(300)
    async with asyncio.timeout(5):
        while sum(len(member.messages) for member in members) < 300:
            await asyncio.sleep(0)
    assert sorted(p for member in members for p in member.payloads) == sorted(outsider.payloads)
    assert all(len(member.messages) > 50 for member in members)


async def test_no_responders_comes_to_the_publishers_own_inbox_only(connect: Connect) -> None:
    """DESIGN 3: NATS's 503 reaches only the publisher, at the reply subject it gave."""
    publisher, other = await connect("publisher"), await connect("other")
    mine, theirs = Seen(), Seen()
    await publisher.subscribe("t.inbox.one.*", mine)
    await other.subscribe("t.inbox.>", theirs)
    publisher.publish("t.nobody", b"question", "t.inbox.one.7")
    await mine.count(1)
    assert mine.messages == [("t.inbox.one.7", "", b"", True)]
    await other.flush()
    assert not theirs.messages


async def test_an_empty_answer_is_not_taken_for_no_responders(connect: Connect) -> None:
    asker, answerer = await connect("asker"), await connect("answerer")
    seen = Seen()
    await asker.subscribe("t.inbox.two.*", seen)
    await answerer.subscribe("t.there", lambda _s, reply, _p, _n: answerer.publish(reply, b""))
    asker.publish("t.there", b"", "t.inbox.two.1")
    await seen.count(1)
    assert seen.messages == [("t.inbox.two.1", "", b"", False)]


HOSTILE = [
    "", " ", "gpt 4", "gpt\u20034", "a\r\nPUB admin.reset 0\r\n\r\n", "a\nb", "a\tb", "*", ">", "a.>", "a.*", "a..b",
    ".a", "a.", "$SYS.REQ.SERVER.PING", "$JS", "$JS.API", "$JS.FC.a", "$JS.API.a b",
    "$JS.ACK.>", "a\x00b", "a/b", "a:b", "\u00e9", "b" * 5000, "a.b\n", "a\u2028",
]  # fmt: skip


@pytest.mark.parametrize("subject", HOSTILE)
async def test_a_hostile_subject_is_never_published(connect: Connect, subject: str) -> None:
    """Faults 2 D (85-96): a space delivers elsewhere, CRLF publishes a second message, unless refused here."""
    bus = await connect("one")
    seen = Seen()
    await bus.subscribe("*", seen)
    await bus.subscribe("*.>", seen)
    for _ in range(2):  # the second time it would come out of the memory of good ones
        with pytest.raises(BadSubject):
            bus.publish(subject, b"x")
        if subject:
            with pytest.raises(BadSubject):
                bus.publish("t.good", b"x", subject)
    bus.publish("t.end", b"")
    await seen.count(1)
    assert [message[0] for message in seen.messages] == ["t.end"]


@pytest.mark.parametrize(
    "pattern", ["", " ", ">", "a b", "a\r\nSUB > 9", "a.>.b", "a>", "a*", "a..b", ".a", "a.", "$SYS.>"]
)
async def test_a_hostile_subscription_is_refused(connect: Connect, pattern: str) -> None:
    bus = await connect("one")
    with pytest.raises(BadSubject):
        await bus.subscribe(pattern, Seen())
    with pytest.raises(BadSubject):
        await bus.subscribe("t.fine", Seen(), "group one")


async def test_the_memory_of_good_subjects_is_bounded(connect: Connect) -> None:
    bus = await connect("one")
    for number in range(10_000):
        bus.publish(f"t.many.{number}", b"")
    assert len(bus._checks._good) <= 4096


async def test_payloads_up_to_the_limit_arrive_and_larger_ones_are_refused(connect: Connect) -> None:
    bus = await connect("one")
    seen = Seen()
    await bus.subscribe("t.large", seen)
    assert bus.max_payload == 2 * 1024 * 1024
    large = bytes(range(256)) * (bus.max_payload // 256)
    with pytest.raises(PayloadTooLarge):
        bus.publish("t.large", large + b"x")
    bus.publish("t.large", large)
    bus.publish("t.large", b"\r\nMSG t.large 1 3\r\n")
    await seen.count(2)
    assert seen.payloads == [large, b"\r\nMSG t.large 1 3\r\n"]


async def test_drain_handles_what_was_received_and_takes_no_more(connect: Connect) -> None:
    one, two = await connect("one"), await connect("two")
    seen, end = Seen(), Seen()
    subscription = await two.subscribe("t.drain", seen)
    await two.subscribe("t.drained", end)
    for _ in range(500):
        one.publish("t.drain", b"before")
    await one.flush()
    await subscription.drain()
    assert seen.payloads == [b"before"] * 500
    one.publish("t.drain", b"after")
    one.publish("t.drained", b"")
    await end.count(1)
    assert len(seen.messages) == 500
    await subscription.drain()  # twice does no harm


async def test_a_handler_that_raises_costs_nobody_a_message(connect: Connect) -> None:
    bus = await connect("one")
    seen = Seen()

    def fails(*_: object) -> None:
        raise ValueError("a fault of the handler")

    await bus.subscribe("t.fault", fails)
    await bus.subscribe("t.fault", seen)
    bus.publish("t.fault", b"1")
    bus.publish("t.fault", b"2")
    await seen.count(2)
    assert bus.errors["handler"] == 2


async def test_after_close_nothing_is_sent(connect: Connect) -> None:
    bus = await connect("one")
    await bus.close()
    assert not bus.connected
    with pytest.raises(BusUnavailable):
        bus.publish("t.closed", b"")
    with pytest.raises(BusUnavailable):
        await bus.flush()
