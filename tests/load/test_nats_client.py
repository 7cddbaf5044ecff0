"""The direct publisher against a NATS that lets it do only what the user `loadgen` may (issue 2, section 4)."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from deploy import servers
from shared.bus.nats import NatsBus
from shared.core.stream import Fail, Finish, Write
from shared.wire import messages, subjects
from shared.wire.messages import Accepted, Batch, Cancel, Credit, Delta, End, Failed, Frame, Summary
from tests.load.nats_client import NatsClient

CONFIG = """
listen: "127.0.0.1:{port}"
max_payload: 2MB
authorization {{ users: [
  {{ user: roles, password: roles }}
  {{ user: loadgen, password: loadgen, permissions: {{
    publish: ["hotpath.v1.admit", "hotpath.v1.control.*", "hotpath.v1.beat.loadgen.*"]
    subscribe: ["hotpath.v1.reply.loadgen.*"]
  }} }}
] }}
"""
SUMMARY = Summary(call=1, endpoint="sim", model="sim-fast", cost=42, input_tokens=3, output_tokens=2)


@pytest.fixture(scope="module")
def nats_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    directory = tmp_path_factory.mktemp("loadgen-nats")
    port = servers.free_port()
    config = directory / "nats.conf"
    config.write_text(CONFIG.format(port=port))
    with servers.running(servers.nats_command(config), port, directory / "log"):
        yield port


class Fleet:
    """All roles at once, in the test's hands: takes requests, sends frames, sees what comes on control and beat."""

    def __init__(self, bus: NatsBus) -> None:
        self.bus = bus
        self.asked: asyncio.Queue[messages.Ask] = asyncio.Queue()
        self.control: asyncio.Queue[Cancel | Credit] = asyncio.Queue()
        self.beats: asyncio.Queue[messages.Beat] = asyncio.Queue()
        self.offset = 0
        self.answers_pings = True

    async def start(self) -> None:
        await self.bus.subscribe(subjects.ADMIT, self._on_admit, subjects.ADMIT_GROUP)
        await self.bus.subscribe(subjects.control("prov1"), self._on_control)
        await self.bus.subscribe(subjects.beat("loadgen", "*"), self._on_beat)

    def _on_admit(self, _subject: str, _reply: str, payload: bytes, _none: bool) -> None:
        self.asked.put_nowait(messages.decode_admit(payload).ask)

    def _on_control(self, _subject: str, reply: str, payload: bytes, _none: bool) -> None:
        if payload:
            self.control.put_nowait(messages.decode_control(payload))
        elif self.answers_pings:
            self.bus.publish(reply, b"")

    def _on_beat(self, _subject: str, _reply: str, payload: bytes, _none: bool) -> None:
        self.beats.put_nowait(messages.decode_beat(payload))

    def send(self, ask: messages.Ask, *frames: Frame, instance: str = "prov1") -> None:
        self.offset += sum(len(frame.data) for frame in frames if isinstance(frame, Delta))
        raw = [msgspec.Raw(messages.encode(frame)) for frame in frames]
        batch = Batch(v=1, role="provider", instance=instance, offset=self.offset, frames=raw)
        self.bus.publish(subjects.reply(ask.reply.role, ask.reply.instance), messages.encode(batch))

    def accepts(self, ask: messages.Ask, instance: str = "prov1", call: int = 1) -> Accepted:
        return Accepted(ask.reply.stream, ask.delivery, 0, instance, call)


@pytest.fixture
async def fleet(nats_port: int) -> AsyncIterator[Fleet]:
    bus = await NatsBus.connect(f"nats://roles:roles@127.0.0.1:{nats_port}", "fleet")
    fleet = Fleet(bus)
    await fleet.start()
    yield fleet
    await bus.close()


@pytest.fixture
async def client(nats_port: int) -> AsyncIterator[NatsClient]:
    async with NatsClient(f"nats://loadgen:loadgen@127.0.0.1:{nats_port}", timeout_s=10) as one:
        yield one
        assert one._bus is not None
        await one._bus.flush()
        assert one._bus.errors == {}, "it used a subject that loadgen may not use"


async def collect(client: NatsClient, **options: Any) -> list[Any]:
    return [event async for event in client.ask("tenant", "key", {"model": "sim-fast"}, **options)]


async def within(seconds: float, queue: asyncio.Queue[Any]) -> Any:
    return await asyncio.wait_for(queue.get(), seconds)


async def test_ask_and_answer(client: NatsClient, fleet: Fleet) -> None:
    """One request, its frames, one terminal; the envelope as WIRE.md has it."""
    record: list[Frame] = []
    asking = asyncio.create_task(collect(client, label="mine", timeout_ms=5000, done="comment", record=record))
    ask = await within(2, fleet.asked)
    assert (ask.tenant, ask.key, ask.label, ask.timeout_ms, ask.done) == ("tenant", "key", "mine", 5000, "comment")
    assert len(bytes.fromhex(ask.rid)) == 16
    stream = ask.reply.stream
    frames: list[Frame] = [
        fleet.accepts(ask),
        Delta(stream, 1, 1, b"data: a\n\n", {"X-BR-Calls": "1"}),
        Delta(stream, 1, 2, b"data: b\n\n"),
        End(stream, 1, 3, SUMMARY, (messages.Hop("provider", "prov1", 7, 1),)),
    ]
    fleet.send(ask, *frames[:2])
    fleet.send(ask, frames[1], *frames[2:])  # the first Delta twice: a repeat is dropped
    events = await asking
    assert [event.data for event in events[:-1] if isinstance(event, Write)] == [b"data: a\n\n", b"data: b\n\n"]
    assert events[0].head == {"X-BR-Calls": "1"}
    assert isinstance(events[-1], Finish)
    assert (events[-1].summary, events[-1].hops[0].instance) == (SUMMARY, "prov1")
    assert record == [frames[0], frames[1], frames[1], *frames[2:]]


async def test_a_failure_before_anything(client: NatsClient, fleet: Fleet) -> None:
    asking = asyncio.create_task(collect(client))
    ask = await within(2, fleet.asked)
    error = messages.ErrorBody(status=402, code="insufficient_budget", type="insufficient_quota", message="no")
    fleet.send(ask, Failed(ask.reply.stream, 1, 0, error), instance="guard1")
    (event,) = await asking
    assert isinstance(event, Fail)
    assert (event.error, event.started) == (error, False)


async def test_nobody_takes_requests(client: NatsClient) -> None:
    """NATS's 503 fails this request at once, and only the request it is for."""
    (event,) = await asyncio.wait_for(collect(client), 0.4)
    assert event.error.code == "no_worker"
    (event,) = await asyncio.wait_for(collect(client), 0.4)
    assert event.error.code == "no_worker"
    assert client._inboxes == 1, "the reply subject is used again"


async def test_a_lost_frame_is_an_error_never_silence(client: NatsClient, fleet: Fleet) -> None:
    asking = asyncio.create_task(collect(client))
    ask = await within(2, fleet.asked)
    stream = ask.reply.stream
    fleet.send(ask, fleet.accepts(ask), Delta(stream, 1, 1, b"a"), Delta(stream, 1, 3, b"c"))
    events = await asking
    assert [type(event) for event in events] == [Write, Fail]
    assert (events[1].error.code, events[1].started) == ("stream_gap", True)
    cancel = await within(1, fleet.control)
    assert (cancel.role, cancel.instance, cancel.stream, cancel.delivery) == ("loadgen", client.instance, stream, 1)


async def test_nothing_heard_is_delivered_again(client: NatsClient, fleet: Fleet) -> None:
    """HANDOFF: no Accepted within 500 ms; at most four deliveries of one rid."""
    asking = asyncio.create_task(collect(client))
    asks = [await within(1.5, fleet.asked) for _ in range(4)]
    assert [ask.delivery for ask in asks] == [1, 2, 3, 4]
    assert len({ask.rid for ask in asks}) == 1
    (event,) = await asyncio.wait_for(asking, 2)
    assert event.error.code == "no_worker"
    assert fleet.asked.empty()


async def test_leaving_cancels_and_a_late_accepted_is_answered_with_cancel(client: NatsClient, fleet: Fleet) -> None:
    async with aclosing(client.ask("tenant", "key", b"{}")) as events:
        first = asyncio.ensure_future(anext(events))
        ask = await within(2, fleet.asked)
        fleet.send(ask, fleet.accepts(ask), Delta(ask.reply.stream, 1, 1, b"a"))
        assert await first == Write(b"a")
    cancel = await within(1, fleet.control)
    assert (cancel.stream, cancel.delivery) == (ask.reply.stream, 1)
    fleet.send(ask, messages.Accepted(ask.reply.stream, 2, 0, "prov1", 2))
    cancel = await within(1, fleet.control)
    assert isinstance(cancel, Cancel)
    assert (cancel.stream, cancel.delivery) == (ask.reply.stream, 2)


async def test_credit_follows_what_the_caller_takes(client: NatsClient, fleet: Fleet) -> None:
    """Half a window taken: credit at once, absolute, with the batch offset read; then again every 500 ms."""
    async with aclosing(client.ask("tenant", "key", b"{}")) as events:
        first = asyncio.ensure_future(anext(events))
        ask = await within(2, fleet.asked)
        stream = ask.reply.stream
        fleet.send(ask, fleet.accepts(ask), Delta(stream, 1, 1, b"a" * 15_000), Delta(stream, 1, 2, b"b" * 15_000))
        await first
        await anext(events)
        credit = await within(0.3, fleet.control)
        assert credit == Credit(role="loadgen", instance=client.instance, read=30_000, streams=((stream, 1, 30_000),))
        assert await within(1.2, fleet.control) == credit


async def test_a_dead_holder_before_the_first_text_costs_another_delivery(client: NatsClient, fleet: Fleet) -> None:
    """Nobody listens on control.<holder>: NATS says so at once."""
    asking = asyncio.create_task(collect(client))
    ask = await within(2, fleet.asked)
    fleet.send(ask, fleet.accepts(ask, "gone1"), instance="gone1")
    again = await within(1, fleet.asked)
    assert (again.delivery, again.lost, again.rid) == (2, "gone1", ask.rid)
    stream = ask.reply.stream
    fleet.send(again, fleet.accepts(again, call=2), Delta(stream, 2, 1, b"x"), End(stream, 2, 2, SUMMARY))
    assert [type(event) for event in await asking] == [Write, Finish]


async def test_a_frozen_holder_after_text_ends_the_stream(client: NatsClient, fleet: Fleet) -> None:
    """Silence for 1.5 s is death, too."""
    fleet.answers_pings = False
    asking = asyncio.create_task(collect(client))
    ask = await within(2, fleet.asked)
    fleet.send(ask, fleet.accepts(ask), Delta(ask.reply.stream, 1, 1, b"x"))
    events = await asyncio.wait_for(asking, 2.6)
    assert (events[-1].error.code, events[-1].started) == ("upstream_worker_lost", True)


async def test_beats(client: NatsClient, fleet: Fleet) -> None:
    """A provider that hears nothing from an asker for 5 s cancels: so the client beats every 500 ms."""
    beats = [await within(1.2, fleet.beats) for _ in range(2)]
    assert {beat.instance for beat in beats} == {client.instance}
    assert all(beat.role == "loadgen" for beat in beats)
