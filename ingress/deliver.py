"""The exchange: one client request between the bus and its client, driven by shared/core/stream.py.

The machine decides, this file acts: it hands the request to a guardian (Sender picks a live one and follows NATS's
503), writes what comes to the sink, tells providers to stop, and resolves one future with the terminal. All of it in
callbacks: the only task is aiohttp's handler.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import msgspec

from ingress.sinks import Sink, Whole
from ingress.wheel import Wheel
from shared.bus.base import BusUnavailable, PayloadTooLarge
from shared.bus.sender import NoLiveInstance, Sender
from shared.core import stream
from shared.core.overload import Allowance
from shared.core.stream import Deliver, Discard, Event, Fail, Finish, Limits, Stop, Stream, Write
from shared.service.killat import reach, reach_soon
from shared.wire import errors
from shared.wire.messages import Admit, Ask, ErrorBody, Frame, Hop, Unknown, encode

#: Credit is given when this much of a stream's window is free (DESIGN 3: half a window).
HALF_WINDOW: Final = stream.WINDOW // 2
#: However slow the workers are, a lost delivery is made again within so many hand-off times (1.5 s): later none of its
#: round may be begun.
MAX_STRETCH: Final = stream.BEGUN_WITHIN
#: One observation in this time. What a thaw (of NATS, of a worker) brings in one turn is one event, not load: a hundred
#: such samples took the running quantile from 5 ms to the whole stall, and the next freeze was told after 3.1 s.
OBSERVE_S: Final = 0.005

Terminal = Finish | Fail

_NOBODY: Final[frozenset[str]] = frozenset()

#: The sink of an exchange that was not started: nothing is ever written to it.
NOWHERE: Final = Whole()


class Handoff:
    """How long to wait for `Accepted`: HANDOFF_TIMEOUT_MS, stretched to twice the observed p99 under load."""

    __slots__ = ("_observed_at", "_p99", "usual")

    def __init__(self, usual: float) -> None:
        self.usual = usual
        self._p99 = 0.0
        self._observed_at = float("-inf")

    @property
    def seconds(self) -> float:
        """The time-out of the next delivery."""
        return min(max(self.usual, 2 * self._p99), MAX_STRETCH * self.usual)

    def observe(self, seconds: float, now: float) -> None:
        """A delivery was accepted after this time. A running quantile: steps of 99 up against 1 down balance at p99."""
        if now - self._observed_at < OBSERVE_S:
            return
        self._observed_at = now
        step = max(self._p99, 0.001) * 0.05
        self._p99 = max(0.0, self._p99 + step * (0.99 if seconds > self._p99 else -0.01))


class Control(Protocol):
    """What goes the other way: `replies.Replies`."""

    def stop(self, instance: str, stream: int, delivery: int, reason: str) -> None:
        """Publish a cancel."""

    def waits(self, exchange: "Exchange", before: str, now_on: str) -> None:
        """The exchange waited on `before` and waits on `now_on` now ("" = nobody)."""

    def credit_due(self, exchange: "Exchange") -> None:
        """Half a window may be free."""


class Desk:
    """What all exchanges of this process share."""

    __slots__ = (
        "_allowance",
        "clock",
        "control",
        "exchanges",
        "handoff",
        "instance",
        "now_ms",
        "opened",
        "pid",
        "sender",
        "wheel",
    )

    control: Control  # set once, by whoever makes both

    def __init__(
        self, *, sender: Sender, wheel: Wheel, handoff: Handoff, instance: str, pid: int, now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.sender = sender
        self.wheel = wheel
        self.handoff = handoff
        self.instance = instance
        self.pid = pid
        self.now_ms = now_ms  # the shared clock
        self.clock = clock
        self.opened = 0
        self.exchanges: dict[int, Exchange] = {}
        self._allowance = Allowance()

    def may_repeat(self) -> bool:
        """Whether one more declined request may be delivered again."""
        return self._allowance.spend(self.opened)

    def enter(self, exchange: "Exchange") -> None:
        """From now on frames find it."""
        self.exchanges[exchange.number] = exchange

    # The Sender keeps these two for a second after each send. They name the request instead of holding it, so that what
    # is over is freed at once: otherwise the collector would walk a second's worth of requests again and again.

    def undeliverable(self, number: int, delivery: int) -> None:
        """NATS says that no guardian is left for this delivery."""
        exchange = self.exchanges.get(number)
        if exchange is not None:
            exchange.undeliverable(delivery, errors.NoWorker())

    def moved(self, number: int, delivery: int, _dead: str, following: str) -> None:
        """The delivery went to another guardian."""
        exchange = self.exchanges.get(number)
        if exchange is not None and exchange.machine.newest == delivery:
            exchange.moved(following)

    def next_stream(self) -> int:
        """A number no other request of this process had (I6)."""
        self.opened += 1
        return self.opened


class Exchange:
    """One request from hand-over to terminal."""

    __slots__ = ("armed", "ask", "credited", "desk", "done", "first_at", "machine", "number", "sink", "slot", "took_us",
                 "waiting_on")  # fmt: skip

    def __init__(self, desk: Desk, ask: Ask, limits: Limits, took_us: int) -> None:
        self.desk = desk
        self.sink: Sink = NOWHERE
        self.ask = ask
        self.number = ask.reply.stream
        self.took_us = took_us
        self.machine = Stream(limits, desk.clock())
        self.done: asyncio.Future[Terminal] = asyncio.get_running_loop().create_future()
        self.credited = 0  # the offset last told to the provider
        self.waiting_on = ""
        self.first_at = 0.0  # when the first text came
        self.armed = float("inf")
        self.slot = -1

    def start(self, sink: Sink) -> None:
        """The first delivery. When nobody can take it, `done` has the failure at once."""
        self.sink = sink
        self.desk.enter(self)
        handoff = self.desk.handoff
        self._act(self.machine.begin(self.desk.clock(), handoff.seconds, handoff.usual))

    def frame(self, frame: Frame | Unknown, sender: str, now: float) -> None:
        """A frame for this stream."""
        events = self.machine.frame(frame, sender, now)
        if len(events) == 1 and type(event := events[0]) is Write:
            self._write(event, now)
            return
        if not self.machine.delivery or self.waiting_on != self.machine.holder:
            self._accepted(now)
        self._act(events)

    def declined(self, delivery: int, now: float) -> bool:
        """A worker sent this delivery back before it was begun. True: made again, as if its guardian were dead."""
        machine = self.machine
        guardian = machine.waits_on()
        newest = machine.state == stream.WAITING and delivery == machine.newest
        if not newest or not guardian or delivery >= stream.MAX_DELIVERIES or not self.desk.may_repeat():
            return False
        self._act(machine.died(guardian, now, proven=True))
        return True

    def died(self, instance: str, now: float, *, proven: bool) -> None:
        """An instance this request waits on is dead, or frozen."""
        self._act(self.machine.died(instance, now, proven=proven))

    def fail(self, error: ErrorBody, reason: str) -> None:
        """End it from our side."""
        self._act(self.machine.fail(error, reason))

    def leave(self) -> None:
        """The client is gone."""
        events = self.machine.leave("client gone")
        self._act(events)
        self._close()

    def wake(self, now: float) -> None:
        """A timer came."""
        if now >= self.sink.due:
            self.sink.tick(now)
        self._act(self.machine.tick(now) if now >= self.machine.due else ())

    def credit_due(self) -> None:
        """The client took bytes."""
        self.desk.control.credit_due(self)

    def credit(self, now: float) -> int:
        """The offset the client has taken, told to the machine too."""
        machine = self.machine
        machine.took(self.sink.taken(machine.received), now)
        return machine.taken

    def _accepted(self, now: float) -> None:
        machine = self.machine
        if machine.holder and machine.delivery == machine.newest:
            self.desk.handoff.observe(now - machine.sent_at, now)

    def _write(self, event: Write, now: float) -> None:
        reach("ingress.mid_stream" if self.first_at else "ingress.first_delta")
        if not self.first_at:
            self.first_at = now
        self.sink.write(event.data, event.head, now)
        machine = self.machine
        if machine.received - self.credited >= HALF_WINDOW:
            self.desk.control.credit_due(self)
        if machine.due < self.armed:
            self._arm()

    def _act(self, events: stream.Events) -> None:
        for event in events:
            self._one(event)
        machine = self.machine
        if machine.state == stream.DONE:
            return
        if (waits := machine.waits_on()) != self.waiting_on:
            self.desk.control.waits(self, self.waiting_on, waits)
            self.waiting_on = waits
        self._arm()

    def _one(self, event: Event) -> None:
        match event:
            case Deliver(delivery, lost, within):
                self._deliver(delivery, lost, within)
            case Write():
                self._write(event, self.desk.clock())
            case Discard():
                self.sink.discard()
                self.credited, self.first_at = 0, 0.0
            case Stop(instance, delivery, reason):
                self.desk.control.stop(instance, self.number, delivery, reason)
            case Finish(summary):
                reach("ingress.before_terminal")
                self.sink.finish(summary)
                self._resolve(event)
            case Fail(error):
                self.sink.fail(error)
                self._resolve(event)

    def _deliver(self, delivery: int, lost: str, within: float) -> None:
        desk = self.desk
        now = desk.now_ms()
        answer_by = now + int(within * 1000)
        ask = self.ask = msgspec.structs.replace(self.ask, delivery=delivery, lost=lost, answer_by=answer_by)
        hop = Hop("ingress", desk.instance, desk.pid, now, self.took_us)
        reach("ingress.before_publish")
        try:
            guardian = desk.sender.send(
                "guardian",
                encode(Admit(ask=ask, hops=(hop,))),
                on_undeliverable=partial(desk.undeliverable, self.number, delivery),
                tried=frozenset(self.machine.tried) if delivery > 1 else _NOBODY,
                lost=partial(desk.moved, self.number, delivery),
            )
        except NoLiveInstance:
            self.undeliverable(delivery, errors.NoWorker())
        except BusUnavailable:
            self.undeliverable(delivery, errors.BusDown())
        except PayloadTooLarge:
            self.undeliverable(delivery, errors.TooLarge())
        else:
            self.machine.sent(guardian)
            reach_soon("ingress.after_publish")

    def moved(self, guardian: str) -> None:
        """Another guardian has the newest delivery."""
        self.machine.sent(guardian)
        self._act(())

    def undeliverable(self, delivery: int, error: errors.HotpathError) -> None:
        """Nobody could be given this delivery."""
        self._act(self.machine.undeliverable(delivery, error.body()))

    def _arm(self) -> None:
        due = min(self.machine.due, self.sink.due)
        if due < self.armed:
            self.desk.wheel.arm(self, due)

    def _resolve(self, terminal: Terminal) -> None:
        self._close()
        if not self.done.done():
            self.done.set_result(terminal)

    def _close(self) -> None:
        """Out of every map: nothing of this request is kept (I8)."""
        desk = self.desk
        if desk.exchanges.pop(self.number, None) is not None:
            desk.wheel.disarm(self)
            desk.control.waits(self, self.waiting_on, "")
            self.sink.close()
            self.sink = NOWHERE  # a Live knows its exchange: without the circle both are freed at once
