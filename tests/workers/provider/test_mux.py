"""Frames, batches and credit windows (DESIGN 3: frames, flow control)."""

import asyncio
from typing import Any

import pytest

from shared.bus.base import BadSubject, BusUnavailable
from shared.core.stream import WINDOW
from shared.wire.messages import (
    Accepted,
    Credit,
    Delta,
    End,
    ErrorBody,
    Failed,
    ReplyTo,
    Summary,
    decode_batch,
    decode_frame,
)
from workers.provider import mux as mux_module
from workers.provider.mux import MAX_DELTA, Channel, Mux

SUMMARY = Summary(call=1, endpoint="e", model="m", cost=1, input_tokens=1, output_tokens=1)
ERROR = ErrorBody(status=502, code="c", type="t", message="m")


class Wire:
    """A bus that keeps what is published, with the loop time of it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, float, Any]] = []
        self.away = False

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        assert not reply
        if self.away:
            raise BusUnavailable
        assert len(payload) < 300_000
        self.sent.append((subject, asyncio.get_running_loop().time(), decode_batch(payload)))

    def frames(self) -> list[Any]:
        return [decode_frame(raw) for _, _, batch in self.sent for raw in batch.frames]

    def data(self) -> bytes:
        return b"".join(frame.data for frame in self.frames() if isinstance(frame, Delta))


class Desk:
    """A mux and what its channels were told."""

    def __init__(self, tick_s: float = 0.02) -> None:
        self.wire = Wire()
        self.mux = Mux(self.wire, "provider", "p1", asyncio.get_running_loop(), tick_s)  # type: ignore[arg-type]
        self.told: list[tuple[int, object]] = []

    def open(self, stream: int = 1, delivery: int = 1, instance: str = "i1") -> Channel:
        channel = self.mux.open(
            ReplyTo("ingress", instance, stream), delivery,
            lambda paused: self.told.append((stream, paused)), lambda reason: self.told.append((stream, reason)),
        )  # fmt: skip
        assert channel is not None
        return channel

    def credit(self, read: int, *streams: tuple[int, int, int]) -> None:
        self.mux.credit(Credit(role="ingress", instance="i1", read=read, streams=streams))


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_accepted_waits_for_the_tick_and_travels_with_what_comes() -> None:
    desk = Desk()
    await asyncio.sleep(0.03)
    channel = desk.open()
    channel.accepted("p1", 1)
    await turn()
    assert desk.wire.sent == []
    channel.write(b"x", {"h": "v"})
    await turn()  # idle before: at once
    assert [type(frame) for frame in desk.wire.frames()] == [Accepted, Delta]
    assert [frame.seq for frame in desk.wire.frames()] == [0, 1]
    assert desk.wire.frames()[1].head == {"h": "v"}
    alone = desk.open(2)
    alone.accepted("p1", 1)
    await asyncio.sleep(0.04)
    assert len(desk.wire.sent) == 2


async def test_deltas_of_all_streams_share_a_message_per_tick_and_terminals_do_not_wait() -> None:
    desk = Desk(0.05)
    await asyncio.sleep(0.06)
    one, two = desk.open(1), desk.open(2)
    one.write(b"a")
    await turn()
    assert len(desk.wire.sent) == 1
    one.write(b"b")
    two.write(b"c")
    await turn()
    assert len(desk.wire.sent) == 1
    await asyncio.sleep(0.07)
    assert len(desk.wire.sent) == 2
    two.write(b"d")
    two.end(SUMMARY, ())
    await turn()
    assert len(desk.wire.sent) == 3
    assert [type(frame) for frame in desk.wire.frames()] == [Delta, Delta, Delta, Delta, End]
    assert [batch.offset for _, _, batch in desk.wire.sent] == [1, 3, 4]


async def test_batches_and_deltas_are_cut() -> None:
    desk = Desk()
    channels = [desk.open(stream) for stream in range(1, 12)]
    for channel in channels:
        channel.write(bytes(WINDOW))
    await asyncio.sleep(0.05)
    assert all(len(frame.data) <= MAX_DELTA for frame in desk.wire.frames())
    assert all(sum(len(raw) for raw in batch.frames) <= 256 * 1024 for _, _, batch in desk.wire.sent)
    assert len(desk.wire.data()) == 11 * WINDOW


async def test_a_stream_stops_at_its_window_and_goes_on_by_credit() -> None:
    """A window beyond what was taken; the upstream is paused once and resumed once; the terminal waits for its turn."""
    desk = Desk()
    channel, other = desk.open(1), desk.open(2)
    data = bytes(range(256)) * 600  # 153,600
    channel.write(data[:100_000], {"h": "1"})
    assert desk.told == [(1, True)]
    channel.write(data[100_000:])
    channel.end(SUMMARY, ())
    other.write(b"mine")
    await asyncio.sleep(0.05)
    assert len(desk.wire.data()) == WINDOW + 4
    desk.credit(0, (1, 1, 1000))
    await asyncio.sleep(0.05)
    assert len(desk.wire.data()) == WINDOW + 4 + 1000
    for nonsense in ((1, 1, 10**9), (1, 1, -5), (1, 9, 33_000), (7, 1, 33_000)):
        desk.credit(-1, nonsense)
    await asyncio.sleep(0.03)
    assert len(desk.wire.data()) == WINDOW + 4 + 1000
    desk.credit(10**9, (1, 1, 33_000))
    await asyncio.sleep(0.03)
    for taken in (65_000, 97_000, 129_000):
        desk.credit(0, (1, 1, taken))
        await asyncio.sleep(0.03)
    frames = [frame for frame in desk.wire.frames() if frame.stream == 1]
    assert b"".join(frame.data for frame in frames[:-1]) == data
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert isinstance(frames[-1], End)
    assert channel.closed
    assert sum(bool(getattr(frame, "head", None)) for frame in frames) == 1


async def test_small_pieces_stop_at_the_window_too() -> None:
    desk = Desk()
    channel = desk.open()
    for _ in range(100):
        channel.write(bytes(1000))
    await asyncio.sleep(0.05)
    assert len(desk.wire.data()) == WINDOW
    assert desk.told == [(1, True)]


async def test_a_pair_stops_at_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of one asker share what it has read; another asker is not held up."""
    monkeypatch.setattr(mux_module, "PAIR_WINDOW", 50_000)
    desk = Desk()
    one, two, elsewhere = desk.open(1), desk.open(2), desk.open(1, instance="i2")
    one.write(bytes(30_000))
    two.write(bytes(30_000))
    elsewhere.write(bytes(30_000))
    await asyncio.sleep(0.05)
    assert sum(len(f.data) for f in desk.wire.frames()) == 80_000
    assert desk.told == [(2, True)]
    desk.credit(50_000)
    await asyncio.sleep(0.05)
    assert sum(len(f.data) for f in desk.wire.frames()) == 90_000
    assert desk.told == [(2, True), (2, False)]


async def test_who_waits_for_others_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """I10: a stream that was never paused and finds the pair's window filled by others waits from now on, not since
    the process began: it used to be cut at the next look."""
    monkeypatch.setattr(mux_module, "PAIR_WINDOW", WINDOW)
    desk = Desk()
    full, other = desk.open(1), desk.open(2)
    began = desk.mux.loop.time()
    full.write(bytes(WINDOW))
    other.write(b"waits")
    assert desk.told == [(2, True)]
    assert other.stalled_since >= began > 0


async def test_what_is_given_up_ends_in_an_error() -> None:
    """The text so far, then the error in its place in the sequence; the rest is dropped."""
    desk = Desk()
    channel = desk.open()
    channel.write(bytes(WINDOW + 10))
    channel.end(SUMMARY, ())
    channel.give_up(ERROR)
    await asyncio.sleep(0.03)
    frames = desk.wire.frames()
    assert len(desk.wire.data()) == WINDOW
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert isinstance(frames[-1], Failed)
    assert channel.closed


async def test_a_bus_that_is_away_costs_frames_not_the_process() -> None:
    desk = Desk()
    channel = desk.open()
    desk.wire.away = True
    channel.write(b"x")
    await asyncio.sleep(0.05)
    assert desk.mux.lost == 1
    desk.wire.away = False
    channel.failed(ERROR, {"h": "v"}, ())
    await turn()
    [frame] = desk.wire.frames()
    assert isinstance(frame, Failed)
    assert frame.seq == 1  # the gap shows
    assert desk.mux.open_channels == 0


async def test_a_closed_channel_says_nothing() -> None:
    desk = Desk()
    channel = desk.open()
    channel.close()
    channel.close()
    channel.write(b"x")
    channel.accepted("p1", 1)
    channel.end(SUMMARY, ())
    channel.refused("other", 1)
    await asyncio.sleep(0.05)
    assert desk.wire.sent == []
    assert desk.mux.find("ingress", "i1", 1, 1) is None


async def test_addresses_from_outside_are_checked_and_repeats_are_told() -> None:
    desk = Desk()
    desk.open()
    assert desk.mux.open(ReplyTo("ingress", "i1", 1), 1, lambda _: None, lambda _: None) is None
    for reply in (ReplyTo("guardian", "x", 1), ReplyTo("ingress", "a b", 1), ReplyTo("ingress", "*", 1)):
        with pytest.raises(BadSubject):
            desk.mux.open(reply, 1, lambda _: None, lambda _: None)


async def test_waiting_for_the_last_channel() -> None:
    desk = Desk()
    channel = desk.open()
    waiting = asyncio.create_task(desk.mux.wait_closed(5))
    await turn()
    assert not waiting.done()
    channel.end(SUMMARY, ())
    await asyncio.wait_for(waiting, 1)
    await desk.mux.wait_closed(5)


async def test_pairs_of_direct_publishers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may publish can name any instance; an offset of an ingress and open streams are never forgotten."""
    monkeypatch.setattr(mux_module, "MAX_PAIRS", 8)
    desk = Desk()

    def ask(role: str, instance: str) -> Channel | None:
        return desk.mux.open(ReplyTo(role, instance, 1), 1, lambda _paused: None, lambda _reason: None)

    ingress, busy = ask("ingress", "i1"), ask("loadgen", "busy")
    assert ingress is not None
    assert busy is not None
    ingress.close()
    for number in range(100):
        channel = ask("loadgen", f"l{number}")
        assert channel is not None
        channel.close()
    kept = desk.mux._pairs.keys()
    assert len(kept) <= 8
    assert {("ingress", "i1"), ("loadgen", "busy"), ("loadgen", "l99")} <= kept
