"""Frames in, control out: this process's one reply subscription, its credit and its liveness (DESIGN 3).

A *pair* is a provider instance and us: it has the highest batch offset read, and the exchanges that wait on it. Every
250 ms each instance waited on gets an empty message on its control subject, our own inbox as reply: NATS's 503 means
killed, silence for 1.5 s means frozen, and a frozen process is treated as dead. Credit goes out when half a window is
free and again every 500 ms while anything is open, so that a lost batch or a lost credit heals.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

from ingress.deliver import HALF_WINDOW, Desk, Exchange
from shared.bus.base import Bus, BusUnavailable, Subscription
from shared.bus.roster import Roster
from shared.wire import errors, subjects
from shared.wire.messages import (
    UNREADABLE,
    VERSION,
    Accepted,
    Batch,
    Cancel,
    Credit,
    Delta,
    Failed,
    Frame,
    Unknown,
    decode_batch,
    decode_frame,
    encode,
    unknown_frame,
)

TICK_S: Final = 0.25
SILENT_S: Final = 1.5
#: A tick later than this by its own doing: our loop stood still, and the silence may be ours.
STALL_S: Final = 0.25
GRACE_S: Final = 0.5  # one beat
#: Delta bytes a provider may send us beyond what we have read (DESIGN 3).
PAIR_WINDOW: Final = 16 * 1024 * 1024
#: What a worker answers that took nothing of the request upon it: full, shed, about to end, or back from a partition
#: and without anybody to hand it on to yet.
NOT_BEGUN: Final = frozenset((errors.Overloaded.code, errors.ShuttingDown.code, errors.NoWorker.code))
#: An idle pair is forgotten; its next batch tells the offset again.
FORGET_S: Final = 60.0


class Pair:
    """One instance and us."""

    __slots__ = ("control", "credited", "heard", "instance", "open", "read", "since")

    def __init__(self, instance: str, now: float) -> None:
        self.instance = instance
        self.control = subjects.control(instance)
        self.read = 0  # highest Batch.offset
        self.credited = 0  # of that, told
        self.heard = now
        self.since = now  # when it began to be waited on
        self.open: dict[int, Exchange] = {}  # exchanges that wait on it


class Replies:
    """The reply subscription and everything that keeps the other side informed."""

    def __init__(self, bus: Bus, instance: str, rosters: Mapping[str, Roster], desk: Desk) -> None:
        self._bus = bus
        self._instance = instance
        self._rosters = rosters
        self._desk = desk
        self._pairs: dict[str, Pair] = {}
        self._subscriptions: list[Subscription] = []
        self._timer: asyncio.TimerHandle | None = None
        self._ticked = 0.0
        self._even = False
        self._alive_prefix = subjects.alive(instance, "")
        self.unknown_frames = 0
        self.bad_batches = 0
        self.stray_frames = 0
        self.deaths = 0
        self.cancels = 0

    @property
    def pairs(self) -> int:
        """Instances remembered."""
        return len(self._pairs)

    async def start(self) -> None:
        """Subscribe, and begin to tick."""
        alive = subjects.alive(self._instance, "*")
        self._subscriptions.append(await self._bus.subscribe(alive, self._on_alive))
        reply = subjects.reply("ingress", self._instance)
        self._subscriptions.append(await self._bus.subscribe(reply, self._on_batch))
        self._ticked = self._desk.clock()
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def close(self) -> None:
        """No more ticks, no more frames."""
        if self._timer is not None:
            self._timer.cancel()
        for subscription in self._subscriptions:
            await subscription.drain()

    # ---- in ----------------------------------------------------------------------------------------------------------

    def _on_batch(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        try:
            batch = decode_batch(payload)
        except UNREADABLE:
            self.bad_batches += 1
            return
        # the instance becomes part of a subject; a neighbour answers in our version, whatever its own is
        if batch.v > VERSION + 1 or subjects.TOKEN.match(batch.instance) is None:
            self.bad_batches += 1
            return
        now = self._desk.clock()
        pair = self._pair(batch, now)
        exchanges = self._desk.exchanges
        told: set[tuple[int, int]] = set()
        for raw in batch.frames:
            frame: Frame | Unknown | None
            try:
                frame = decode_frame(raw)
            except UNREADABLE:
                self.unknown_frames += 1
                frame = unknown_frame(raw)
                if frame is None:
                    continue
            exchange = exchanges.get(frame.stream)
            if type(frame) is Failed and frame.error.code in NOT_BEGUN and exchange is not None:
                if not self._elsewhere(exchange, frame, batch, now):
                    exchange.frame(frame, batch.instance, now)
            elif exchange is not None:
                exchange.frame(frame, batch.instance, now)
            else:
                self._stray(frame, batch.instance, told)
        if pair is not None and pair.read - pair.credited >= PAIR_WINDOW // 2:
            self._tell(pair, ())

    def _pair(self, batch: Batch, now: float) -> Pair | None:
        """Guardians and routing answer too, without Delta bytes: only who sends bytes has an offset to keep."""
        pair = self._pairs.get(batch.instance)
        if pair is None:
            if not batch.offset:
                return None
            pair = self._pairs[batch.instance] = Pair(batch.instance, now)
            pair.credited = batch.offset  # what came before we forgot it was credited then
        pair.heard = now
        pair.read = max(pair.read, batch.offset)
        return pair

    def _elsewhere(self, exchange: Exchange, frame: Failed, batch: Batch, now: float) -> bool:
        """A worker declined before it began: no call was made, so another one may have the request (it is no retry)."""
        roster = self._rosters.get(batch.role)
        if frame.seq or roster is None:
            return False
        roster.full(batch.instance)
        return roster.pick(now, {batch.instance}) is not None and exchange.declined(frame.delivery, now)

    def _stray(self, frame: Frame | Unknown, instance: str, told: set[tuple[int, int]]) -> None:
        """A stream that is gone: an Accepted or text for it is answered with cancel, once a batch."""
        self.stray_frames += 1
        key = (frame.stream, frame.delivery)
        if isinstance(frame, Accepted | Delta) and key not in told:
            told.add(key)
            self.stop(instance, frame.stream, frame.delivery, "no such stream")

    def _on_alive(self, subject: str, _reply: str, _payload: bytes, no_responders: bool) -> None:
        pair = self._pairs.get(subject[len(self._alive_prefix) :])
        if pair is None:
            return
        if no_responders:
            self._dead(pair, self._desk.clock(), proven=True)
        else:
            pair.heard = self._desk.clock()

    # ---- out ---------------------------------------------------------------------------------------------------------

    def stop(self, instance: str, stream: int, delivery: int, reason: str) -> None:
        """Publish a cancel. A lost one heals: the provider's next frame is answered with another."""
        self.cancels += 1
        cancel = Cancel(role="ingress", instance=self._instance, stream=stream, delivery=delivery, reason=reason)
        self._publish(subjects.control(instance), encode(cancel))

    def waits(self, exchange: Exchange, before: str, now_on: str) -> None:
        """The exchange waited on `before` and waits on `now_on` now ("" = nobody)."""
        if before and (pair := self._pairs.get(before)) is not None:
            pair.open.pop(exchange.number, None)
        if now_on:
            pair = self._pairs.get(now_on)
            if pair is None:
                pair = self._pairs[now_on] = Pair(now_on, self._heard(now_on) or self._desk.clock())
            if not pair.open:
                pair.since = self._desk.clock()
            pair.open[exchange.number] = exchange

    def credit_due(self, exchange: Exchange) -> None:
        """Half a window may be free."""
        machine = exchange.machine
        pair = self._pairs.get(machine.holder)
        if pair is None or not machine.delivery:
            return
        taken = exchange.credit(self._desk.clock())
        if taken - exchange.credited >= HALF_WINDOW:
            exchange.credited = taken
            self._tell(pair, ((exchange.number, machine.delivery, taken),))

    def _tell(self, pair: Pair, streams: tuple[tuple[int, int, int], ...]) -> None:
        pair.credited = pair.read
        credit = Credit(role="ingress", instance=self._instance, read=pair.read, streams=streams)
        self._publish(pair.control, encode(credit))

    def _publish(self, subject: str, payload: bytes, reply: str = "") -> bool:
        try:
            self._bus.publish(subject, payload, reply)
        except BusUnavailable:
            return False
        return True

    # ---- every 250 ms ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._desk.clock()
        late = now - self._ticked - TICK_S
        self._ticked = now
        self._even = not self._even
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        if not self._bus.connected:
            self._bus_down()
            return
        for pair in list(self._pairs.values()):
            if late > STALL_S:
                pair.heard = max(pair.heard, now - SILENT_S + GRACE_S)
            if pair.open:
                self._watch(pair, now)
            elif now - pair.heard > FORGET_S:
                del self._pairs[pair.instance]

    def _watch(self, pair: Pair, now: float) -> None:
        # Its silence began when it was last heard, not when we began to wait: whoever is told of a holder that has been
        # frozen for a second already waits half a second more, not 1.5. Two questions are asked in any case.
        if now - pair.since >= GRACE_S and now - max(pair.heard, self._heard(pair.instance)) >= SILENT_S:
            self._dead(pair, now, proven=False)
            return
        self._publish(pair.control, b"", self._alive_prefix + pair.instance)
        if self._even:
            streams = []
            for number, exchange in pair.open.items():
                machine = exchange.machine
                if machine.delivery:
                    exchange.credited = exchange.credit(now)
                    streams.append((number, machine.delivery, exchange.credited))
            if streams:
                self._tell(pair, tuple(streams))

    def _heard(self, instance: str) -> float:
        """When its last beat came; 0 when it is not known."""
        return max((roster.heard(instance) or 0.0 for roster in self._rosters.values()), default=0.0)

    def _dead(self, pair: Pair, now: float, *, proven: bool) -> None:
        """Killed or frozen: its requests are delivered again, or end with an error."""
        self.deaths += 1
        for roster in self._rosters.values():
            roster.dead(pair.instance)
        self._pairs.pop(pair.instance, None)
        for exchange in list(pair.open.values()):
            exchange.died(pair.instance, now, proven=proven)

    def on_bus(self, connected: bool) -> None:
        """The connection went or came back."""
        if not connected:
            self._bus_down()

    def _bus_down(self) -> None:
        """Frames are being lost: what is open cannot end well, and new requests are refused by the publish itself."""
        error = errors.BusDown().body()
        for exchange in list(self._desk.exchanges.values()):
            exchange.fail(error, "bus down")
