"""I4, I5, I6 of one client stream under any interleaving, loss and duplication of its frames (DESIGN 3, 6)."""

from collections import deque
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.core import stream
from shared.core.stream import Deliver, Discard, Fail, Finish, Limits, Stop, Stream, Write
from shared.wire import errors
from shared.wire.messages import Accepted, Delta, End, Failed, Frame, Refused, Summary

SUMMARY = Summary(call=1, endpoint="e", model="m", cost=1, input_tokens=1, output_tokens=1)


class Provider:
    """One delivery as the provider that took it sees it: what it has said, and what it has sent so far."""

    def __init__(self, delivery: int) -> None:
        self.delivery = delivery
        self.instance = f"p{delivery}"
        self.seq = 0
        self.text = b""
        self.over = False
        self.ended_well = False
        self.wire: deque[Frame] = deque()

    def send(self, make: Any, *rest: Any) -> None:
        self.wire.append(make(1, self.delivery, self.seq, *rest))
        self.seq += 1


class World(RuleBasedStateMachine):
    """Workers with a ledger that dispatches once per call, a bus that loses and repeats, and the machine under test."""

    @initialize(streamed=st.booleans())
    def start(self, streamed: bool) -> None:
        self.now = 100.0
        self.streamed = streamed
        limits = Limits(streamed=streamed, first_token=3.0, idle=3.0, total=20.0, max_bytes=1 << 20)
        self.machine = Stream(limits, self.now)
        self.pending: dict[int, str] = {}  # deliveries that no worker has processed yet -> lost
        self.until: dict[int, float] = {}  # when a delivery is not begun any more
        self.told_at = float("inf")  # when the client was told that nobody serves it
        self.providers: dict[int, Provider] = {}
        self.dead: set[str] = set()
        self.holder = 0  # of the ledger's newest call
        self.calls = 0
        self.text = b""
        self.terminals: list[Fail | Finish] = []
        self.left = False
        self.deliveries = 0
        self.act(self.machine.begin(self.now, 0.5))

    def act(self, events: tuple[stream.Event, ...]) -> None:
        for event in events:
            match event:
                case Deliver(delivery, lost, within):
                    assert not self.terminals
                    assert not self.left
                    self.deliveries += 1
                    assert delivery == self.deliveries <= stream.MAX_DELIVERIES
                    assert self.text == b"", "handed over again after text was given out"
                    self.pending[delivery] = lost
                    self.until[delivery] = self.now + within
                    self.machine.sent(f"g{delivery}")
                case Write(data, _):
                    assert not self.terminals
                    assert not self.left
                    self.text += data
                case Discard():
                    assert not self.streamed, "text of a stream was taken back"
                    self.text = b""
                case Finish() | Fail():
                    assert not self.left
                    if isinstance(event, Fail):
                        assert event.started == bool(self.text)
                    self.terminals.append(event)
                case Stop(instance, delivery, _):
                    assert instance == f"p{delivery}"

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def dispatch(self, data: st.DataObject) -> None:
        delivery = data.draw(st.sampled_from(sorted(self.pending)))
        lost = self.pending.pop(delivery)
        if self.now >= self.until[delivery]:
            return
        assert self.now < self.told_at, "begun after its client was told that nobody serves it"
        provider = self.providers[delivery] = Provider(delivery)
        holder = self.providers.get(self.holder)
        if holder is None or (lost and lost == holder.instance):
            self.calls += 1
            self.holder = delivery
            provider.send(Accepted, provider.instance, self.calls)
        else:
            provider.send(Refused, holder.instance, self.holder)
            provider.over = True

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), fate=st.sampled_from(["fine", "fine", "fine", "lost", "refused"]))
    def pass_on(self, data: st.DataObject, fate: str) -> None:
        """A delivery may be lost, or a guardian says no: Failed, without any dispatch."""
        if fate == "fine":
            return
        delivery = data.draw(st.sampled_from(sorted(self.pending)))
        self.pending.pop(delivery)
        if fate == "lost":
            return
        provider = self.providers[delivery] = Provider(delivery)
        provider.over = True
        provider.send(Failed, errors.NoWorker().body())

    @precondition(lambda self: any(not p.over for p in self.providers.values()))
    @rule(data=st.data(), end=st.sampled_from(["text"] * 8 + ["end", "failed"]))
    def speak(self, data: st.DataObject, end: str) -> None:
        provider = self.providers[data.draw(st.sampled_from([d for d, p in self.providers.items() if not p.over]))]
        if end == "text":
            part = f"{provider.instance}:{provider.seq} ".encode()
            provider.text += part
            provider.send(Delta, part, {"X-BR-Calls": "1"} if provider.seq == 1 else None)
            return
        provider.over = True
        provider.ended_well = end == "end"
        if end == "end":
            provider.send(End, SUMMARY)
        else:
            provider.send(Failed, errors.UpstreamError().body())

    @precondition(lambda self: any(p.wire for p in self.providers.values()))
    @rule(data=st.data())
    def arrive_all(self, data: st.DataObject) -> None:
        provider = self.providers[data.draw(st.sampled_from([d for d, p in self.providers.items() if p.wire]))]
        while provider.wire:
            self.act(self.machine.frame(provider.wire.popleft(), provider.instance, self.now))

    @precondition(lambda self: any(p.wire for p in self.providers.values()))
    @rule(data=st.data(), fate=st.sampled_from(["comes"] * 7 + ["twice", "lost", "late copy"]))
    def arrive(self, data: st.DataObject, fate: str) -> None:
        provider = self.providers[data.draw(st.sampled_from([d for d, p in self.providers.items() if p.wire]))]
        frame = provider.wire.popleft()
        if fate != "lost":
            self.act(self.machine.frame(frame, provider.instance, self.now))
        if fate == "twice":
            self.act(self.machine.frame(frame, provider.instance, self.now))
        if fate == "late copy":
            provider.wire.append(frame)

    @precondition(lambda self: self.machine.waits_on())
    @rule(really=st.integers(0, 3))
    def presume_dead(self, really: int) -> None:
        """Rightly or not: the process may only have been frozen, and speak again."""
        if really == 0:
            self.act(self.machine.died(self.machine.waits_on(), self.now))
            self.note_told()

    @rule(really=st.integers(0, 5))
    def nobody_left(self, really: int) -> None:
        """NATS says that the newest delivery reached nobody."""
        if really == 0 and self.pending.pop(self.deliveries, None) is not None:
            self.act(self.machine.undeliverable(self.deliveries, errors.NoWorker().body()))
            self.note_told()

    def note_told(self) -> None:
        """What a frame said, or the deadline, may come while others are on their way; this may not."""
        if self.terminals and isinstance(end := self.terminals[0], Fail) and end.error.code == "no_worker":
            self.told_at = min(self.told_at, self.now)

    @rule(seconds=st.sampled_from([0.01, 0.01, 0.01, 0.01, 0.3, 0.3, 0.6, 4.5]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.machine.tick(self.now))
        self.note_told()

    @rule()
    def client_takes(self) -> None:
        self.machine.took(self.machine.received, self.now)

    @precondition(lambda self: not self.left)
    @rule(really=st.integers(0, 20))
    def client_leaves(self, really: int) -> None:
        if really == 0 and not self.terminals:
            self.act(self.machine.leave("client gone"))
            self.left = True

    @invariant()
    def one_terminal_and_a_prefix(self) -> None:
        if not hasattr(self, "terminals"):
            return
        assert len(self.terminals) <= 1  # I4
        if self.text:  # I5, I6: one provider's text, from its beginning, without a hole
            origin = int(self.text[1 : self.text.index(b":")])
            assert self.providers[origin].text.startswith(self.text)
        if self.terminals and isinstance(self.terminals[0], Finish):
            owner = self.providers[self.machine.delivery]
            assert owner.ended_well
            assert self.text == owner.text
        if not self.terminals and not self.left:
            assert self.machine.due > self.now - 5, "a timer that is due was not asked for"

    def teardown(self) -> None:
        if not hasattr(self, "terminals"):
            return
        while not self.terminals and not self.left:  # whatever happened, waiting at `due` ends it
            assert self.machine.due < float("inf")
            self.now = max(self.now + 0.001, self.machine.due)
            self.act(self.machine.tick(self.now))
        self.now += 100
        self.act(self.machine.tick(self.now))
        assert len(self.terminals) == (0 if self.left else 1)


TestStream = World.TestCase
TestStream.settings = settings(
    max_examples=600, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
