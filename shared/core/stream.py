"""The receiver's side of ONE client request: frames and `now` in, events out. No I/O, no clock (DESIGN 3, I4-I6).

Theory of operation
-------------------
The ingress hands a request over (delivery 1). Somewhere behind it a provider instance wins the dispatch and says
`Accepted`: from then on it *owns* the stream, and only its frames count. When nobody says so in time, the request is
delivered again, up to four times in all; no upstream call was made by then, so this is no retry. The deliveries may
overlap, and every frame may be lost or come twice. Four states:

    WAITING   nobody owns the stream; frames of every delivery that was made are welcome
    HELD      a provider owns it, none of its text has come yet: its death only costs another delivery
    STARTED   text was given out: from here on the stream belongs to its owner, for better or worse (a whole answer
              is not with the client before its end: its owner's death voids the text and costs a delivery only)
    DONE      the one terminal was given out; whatever still comes is answered with a cancel

A frame is judged by its state, by who sent it (the *standing* of its delivery) and by its kind: `_TABLE` below is
the whole rule. The standings:

    OWNER     the delivery that owns the stream
    NEWEST    nobody owns the stream and this is the last delivery made
    OTHER     any other delivery that was made
    FENCED    a delivery that can no longer own the stream: its holder was found dead (a frozen process may thaw), or
              text of it was dropped

Which of two claims to the same stream holds? The newest call's (`dispatch` numbers them over all deliveries). A
`Refused` names the live holder without its call number; there the later delivery is the newer holder, since only a
re-delivery that names the dead one can open a further call. Once text is out nobody takes over.

A delivery may lie in a frozen NATS or a frozen worker and come out when that thaws. Each carries the time until which
it may be begun (`Deliver.within`), and while one that was made may still be begun its client is not told that nobody
serves it: what is told stays true (nothing stale runs). A delivery is over at once when NATS says that nobody got it,
or that its guardian is dead.

Frames of one delivery are numbered from 0. A repeat is dropped. A gap in the owner's frames (or in those of a
delivery nobody has superseded) ends the stream with `StreamGap`: an error, never silence. A `Refused` stands in for
the holder's own `Accepted`, its frame 0, which may be the one that was lost.

Timers, all in seconds of one monotonic clock: hand-off (until somebody owns it), first token and idle (streams only;
the provider has the same two and knows more, so these are backstops and wait `BACKSTOP_S` longer), total. While the
client has not taken half a window the owner may have to stay silent, so idle does not count then.
"""

from typing import Final

from msgspec import Struct

from shared.core.events import Deliver, Discard, Event, Events, Fail, Finish, Stop, Write
from shared.wire import errors
from shared.wire.messages import Accepted, Delta, End, ErrorBody, Failed, Frame, Hop, Refused, Unknown

__all__ = ["Deliver", "Discard", "Event", "Events", "Fail", "Finish", "Limits", "Stop", "Stream", "Write"]

#: At most this many deliveries of one request, the first included (DESIGN 3, liveness).
MAX_DELIVERIES: Final = 4
#: A round is the deliveries made while nobody owns the stream. In hand-off times (500 ms by default, not stretched: a
#: promise does not grow with the load) from its first: how long any of its deliveries may be begun, by when who is
#: frozen is found out too (1.5 s of silence) ...
BEGUN_WITHIN: Final = 3.0
#: ... when it is over, below the 2 s in which a client is told that everybody is frozen ...
ROUND: Final = 3.75
#: ... and how long who began in the last moment is still heard.
HEARD: Final = 0.25
#: Delta bytes a provider sends beyond what the client has taken. DESIGN 3 allows 64 KiB; a client that stalls may cost
#: 100 KiB in all, of which 27 go into the objects of a stream and 8 into what one read brings. Half of it in 2 ms (the
#: mux's tick) are 8 MB/s, 30,000 events.
WINDOW: Final = 32 * 1024
#: The provider's own first-token and idle timers speak first: they settle, and name the endpoint.
BACKSTOP_S: Final = 1.0
#: A stale sender is told once to stop, and again at most this often: its first cancel may be lost.
STOP_AGAIN_S: Final = 0.25

WAITING: Final = 0
HELD: Final = 1
STARTED: Final = 2
DONE: Final = 3

_OWNER: Final = 0
_NEWEST: Final = 1
_OTHER: Final = 2
_FENCED: Final = 3

_NEVER: Final = float("inf")


class Limits(Struct, frozen=True, kw_only=True):
    """What one request is allowed: seconds and bytes. `handoff` may be stretched per delivery."""

    streamed: bool
    first_token: float
    idle: float
    total: float
    max_bytes: int
    window: int = WINDOW
    max_deliveries: int = MAX_DELIVERIES


_NOTHING: Final[Events] = ()

# ---- the table: (state, standing) -> kind of frame -> what is done -------------------------------------------------
#
#   own     becomes (or stays) the owner          contest  two claims: the newest call owns
#   follow  the holder a Refused names owns       write    text for the client
#   end     the good terminal                     fail     the bad terminal
#   stray   dropped, the sender is told to stop   drop     dropped: its sender has finished by itself

_Row = dict[type[Struct], str]

#: What every pair of state and standing gets that is not in the table.
_STRAY: Final[_Row] = {Accepted: "stray", Refused: "drop", Delta: "stray", End: "drop", Failed: "drop"}
_HELD_OWNER: Final[_Row] = {Accepted: "own", Refused: "drop", Delta: "write", End: "end", Failed: "fail"}

_TABLE: Final[dict[tuple[int, int], _Row]] = {
    (WAITING, _NEWEST): {Accepted: "own", Refused: "follow", Delta: "stray", End: "stray", Failed: "fail"},
    (WAITING, _OTHER): {Accepted: "own", Refused: "follow", Delta: "stray", End: "stray", Failed: "drop"},
    (HELD, _OWNER): _HELD_OWNER,
    (HELD, _OTHER): {Accepted: "contest", Refused: "follow", Delta: "stray", End: "drop", Failed: "drop"},
    (STARTED, _OWNER): _HELD_OWNER,
}


class Stream:
    """The state machine of one request; `due` is when `tick` must be called next (monotonic seconds).

    The methods return the events to act on, in order, and may be called in any state; after the one `Finish` or `Fail`
    (or `leave`) only `Stop` comes out.
    """

    __slots__ = (
        "_call", "_deadline", "_doubt", "_expected", "_fenced", "_first_due", "_guardian", "_handoff", "_handoff_due",
        "_idle_from", "_limits", "_lost", "_nobody", "_round_at", "_told", "_unfenced_owner", "_until", "_usual",
        "delivery", "due", "holder", "newest", "received", "sent_at", "state", "taken", "tried",
    )  # fmt: skip

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self.state = WAITING
        self.newest = 0  # the last delivery made
        self.delivery = 0  # the one that owns the stream; 0 = none
        self.holder = ""  # its provider instance
        self.received = 0  # Delta bytes of the owner: the stream's absolute offset
        self.taken = 0  # of those, taken by the client
        self._call = 0
        self._unfenced_owner = False  # its Accepted named call 0: no dispatch, so nothing would stop a second call
        self._guardian = ""  # who took the newest delivery
        self.tried: tuple[str, ...] = ()  # who took those before: a re-delivery goes elsewhere if it can
        self._expected: dict[int, int] = {}  # delivery -> its next seq
        self._fenced: tuple[int, ...] = ()
        self._told: dict[int, float] = {}  # delivery -> when its sender was last told to stop
        self._lost = ""  # the last holder found dead: named in every delivery from then on, since one may be lost
        self._handoff = 0.0
        self._usual = 0.0
        self._round_at = now  # when the first delivery was made since nobody owns the stream
        self._until = now  # until when any delivery may be begun
        self._doubt = False  # whether one before the newest may be: nobody said that it was lost
        self._nobody: ErrorBody | None = None  # what is told when that is over: nobody is left to deliver to
        self.sent_at = now  # when the newest delivery was made
        self._handoff_due = _NEVER
        self._deadline = now + limits.total
        self._first_due = now + limits.first_token + BACKSTOP_S if limits.streamed else _NEVER
        self._idle_from = now
        self.due = now

    # ---- from the ingress ------------------------------------------------------------------------------------------

    def begin(self, now: float, handoff: float, usual: float = 0.0) -> Events:
        """The first delivery. `handoff`: seconds until it is made again, stretched from the `usual` ones under load, to
        BEGUN_WITHIN times that at most (0: not stretched)."""
        self._handoff, self._usual = handoff, usual or handoff
        return self._deliver(now)

    def sent(self, guardian: str) -> None:
        """Who took the newest delivery."""
        self._guardian = guardian

    def waits_on(self) -> str:
        """The instance whose death would matter now: the holder, before it the guardian; "" when done."""
        if self.state == DONE:
            return ""
        return self.holder or self._guardian

    def took(self, offset: int, now: float) -> None:
        """The client has taken this many bytes in all. Never more than `received`, never less than before."""
        offset = min(offset, self.received)
        if offset > self.taken:
            if self._behind():
                self._idle_from = now  # the owner could not speak until now
                self._schedule()
            self.taken = offset

    def died(self, instance: str, now: float, *, proven: bool = False) -> Events:
        """Nothing will come from this instance any more; unless `proven` it may be frozen, and thaw."""
        if self.state == DONE:
            return _NOTHING
        if self.delivery and self.holder == instance:
            stop = Stop(instance, self.delivery, "presumed dead")
            if self._unfenced_owner or (self.state == STARTED and self._limits.streamed):
                return (*self._fail(errors.WorkerLost().body()), stop)
            return (stop, *self._disown(now))
        if self.state == WAITING and self._guardian == instance:
            return self._again(now, proven=proven)
        return _NOTHING

    def undeliverable(self, delivery: int, error: ErrorBody) -> Events:
        """No live guardian could be given this delivery (NATS's 503 may come a little later than the send)."""
        if self.state == WAITING and delivery == self.newest:
            return self._give_up(error)
        return _NOTHING

    def fail(self, error: ErrorBody, reason: str) -> Events:
        """End it now, from our side: the bus is away, the process goes down."""
        if self.state == DONE:
            return _NOTHING
        return self._abandon(error, reason)

    def leave(self, reason: str) -> Events:
        """The client is gone: nobody needs a terminal."""
        if self.state == DONE:
            return _NOTHING
        stop = self._stop_owner(reason)
        self._finish()
        return stop

    def tick(self, now: float) -> Events:
        """A timer may be due."""
        if self.state == DONE:
            return _NOTHING
        if now >= self._deadline:
            return self._abandon(errors.DeadlineExceeded().body(), "deadline")
        if self.state != STARTED and now >= self._first_due:
            return self._abandon(errors.UpstreamTimeout().body(), "no first token")
        if self.state == STARTED and self._limits.streamed and now >= self._idle_due(now):
            return self._abandon(errors.UpstreamTimeout().body(), "idle")
        if self.state == WAITING and now >= self._handoff_due:
            return self._fail(self._nobody) if self._nobody is not None else self._again(now, proven=False)
        self._schedule(now)
        return _NOTHING

    # ---- from the workers ------------------------------------------------------------------------------------------

    def frame(self, frame: Frame | Unknown, sender: str, now: float) -> Events:
        """One frame of this stream, from the instance `sender`."""
        delivery = frame.delivery
        expected = self._expected.get(delivery, 0)
        if frame.seq < expected or not 1 <= delivery <= self.newest:
            return _NOTHING  # a repeat, or a delivery that was never made
        standing = self._standing(delivery)
        if frame.seq > expected and self._gap_matters(standing):
            return self._gap(delivery, sender)
        self._expected[delivery] = frame.seq + 1
        verb = _TABLE.get((self.state, standing), _STRAY).get(type(frame), "drop")  # Unknown: only its seq counts
        if verb == "write":
            assert isinstance(frame, Delta)
            return self._write(frame, now)
        if verb == "stray":
            if type(frame) is Delta and standing != _FENCED:
                self._fenced += (delivery,)  # its text has a hole now: it can own nothing any more
            return self._stray(delivery, sender, now)
        return _NOTHING if verb == "drop" else self._decide(verb, frame, sender, now)

    def _gap_matters(self, standing: int) -> bool:
        """What a superseded delivery has lost is of no interest."""
        return self.state != DONE and (standing in (_OWNER, _NEWEST) or (self.state == WAITING and standing == _OTHER))

    def _decide(self, verb: str, frame: Frame | Unknown, sender: str, now: float) -> Events:
        """The rarer half of the table: claims and terminals."""
        match frame:
            case Accepted():
                if verb == "contest" and not self._newer(frame.call, frame.delivery):
                    return self._stray(frame.delivery, sender, now)
                return self._own(frame.delivery, frame.instance, frame.call, unfenced=frame.call == 0)
            case Refused():
                return self._follow(frame)
            case End():
                self._finish()
                return (Finish(frame.summary, frame.hops),)
            case Failed():
                return self._failed(frame, now)
            case _:  # neither a Delta nor an Unknown comes here
                return _NOTHING

    def _failed(self, frame: Failed, now: float) -> Events:
        """The bad terminal, unless the owner only gave us up: nothing was heard of us for 5 s."""
        if self.delivery and frame.error.code == errors.WorkerLost.code:
            return self.died(self.holder, now, proven=True)
        return self._fail(frame.error, frame.head, frame.hops)

    def _standing(self, delivery: int) -> int:
        if delivery == self.delivery:
            return _OWNER
        if delivery in self._fenced:
            return _FENCED
        if self.state == WAITING and delivery == self.newest:
            return _NEWEST
        return _OTHER

    def _newer(self, call: int, delivery: int) -> bool:
        """Whether this claim is to a newer call than the owner's; call 0 = not told, the later delivery is newer."""
        if call and self._call:
            return call > self._call
        return delivery > self.delivery

    def _own(self, delivery: int, instance: str, call: int, *, unfenced: bool) -> Events:
        stop = self._stop_owner("superseded") if self.delivery not in (0, delivery) else _NOTHING
        if self.state == WAITING or self.delivery != delivery:
            self.state = HELD
        self.delivery, self.holder, self._call, self._unfenced_owner = delivery, instance, call, unfenced
        self._handoff_due = _NEVER
        self._schedule()
        return stop

    def _follow(self, frame: Refused) -> Events:
        holder = frame.holder_delivery
        if not 1 <= holder <= self.newest or holder in self._fenced or holder == self.delivery:
            return _NOTHING
        if self.delivery and holder < self.delivery:
            return _NOTHING
        self._expected[holder] = max(self._expected.get(holder, 0), 1)
        return self._own(holder, frame.holder, 0, unfenced=False)

    def _write(self, frame: Delta, now: float) -> Events:
        size = self.received + len(frame.data)
        if size > self._limits.max_bytes:
            return self._abandon(errors.ResponseTooLarge().body(), "response too large")
        self.received = size
        self._idle_from = now
        if self.state == STARTED:
            return (Write(frame.data),)
        self.state = STARTED
        self._schedule()
        return (Write(frame.data, frame.head),)

    def _gap(self, delivery: int, sender: str) -> Events:
        if self.delivery:
            return self._abandon(errors.StreamGap().body(), "gap")
        return (*self._fail(errors.StreamGap().body()), Stop(sender, delivery, "gap"))

    def _stray(self, delivery: int, sender: str, now: float) -> Events:
        if now < self._told.get(delivery, -_NEVER) + STOP_AGAIN_S:
            return _NOTHING
        self._told[delivery] = now
        return (Stop(sender, delivery, "not the owner"),)

    # ---- deliveries, terminals, timers -----------------------------------------------------------------------------

    def _deliver(self, now: float) -> Events:
        self.newest += 1
        if self._guardian:
            self.tried += (self._guardian,)
            self._guardian = ""
        self.sent_at = now
        usual = self._usual
        self._handoff_due = min(now + self._handoff, self._round_at + ROUND * usual)
        until = max(self._round_at + BEGUN_WITHIN * usual, self._handoff_due - HEARD * usual)
        self._until = max(self._until, until)
        self._schedule()
        return (Deliver(self.newest, self._lost, until - now),)

    def _disown(self, now: float) -> Events:
        """The owner is dead and the client has seen nothing: another delivery, its time to the first token anew."""
        void: Events = (Discard(),) if self.state == STARTED else _NOTHING
        self._fenced += (self.delivery,)
        newest = self.delivery == self.newest
        self._lost, self._round_at, self._nobody = self.holder, now, None
        self.state, self.delivery, self.holder, self._call = WAITING, 0, "", 0
        self.received = self.taken = 0
        if self._limits.streamed:
            self._first_due = now + self._limits.first_token + BACKSTOP_S
        return (*void, *self._again(now, proven=newest))

    def _again(self, now: float, *, proven: bool) -> Events:
        """Another delivery, if one is left. `proven`: nobody can begin the newest one any more."""
        self._doubt = self._doubt or not proven
        if self._nobody is not None:
            return _NOTHING
        if self.newest >= self._limits.max_deliveries or now >= self._round_at + ROUND * self._usual:
            return self._give_up(errors.WorkerLost().body() if self._lost else errors.NoWorker().body(), now)
        return self._deliver(now)

    def _give_up(self, error: ErrorBody, now: float = 0.0) -> Events:
        """Nobody is left to deliver to: said at once, or as soon as no earlier delivery can be begun any more."""
        if not self._doubt or now >= self._until:
            return self._fail(error)
        self._nobody, self._guardian, self._handoff_due = error, "", self._until + HEARD * self._usual
        self._schedule()
        return _NOTHING

    def _abandon(self, error: ErrorBody, reason: str) -> Events:
        stop = self._stop_owner(reason)
        return (*self._fail(error), *stop)

    def _stop_owner(self, reason: str) -> Events:
        return (Stop(self.holder, self.delivery, reason),) if self.delivery else _NOTHING

    def _fail(self, error: ErrorBody, head: dict[str, str] | None = None, hops: tuple[Hop, ...] = ()) -> tuple[Fail]:
        started = self.state == STARTED
        self._finish()
        return (Fail(error, started, head, hops),)

    def _finish(self) -> None:
        self.state = DONE
        self.due = _NEVER

    def _behind(self) -> bool:
        """Half a window, not a whole one: a provider of another version may have a smaller one."""
        return self.received - self.taken >= self._limits.window // 2

    def _idle_due(self, now: float) -> float:
        if self._behind():
            return now + self._limits.idle  # paused for want of credit: look again later
        return self._idle_from + self._limits.idle + BACKSTOP_S

    def _schedule(self, now: float | None = None) -> None:
        due = min(self._deadline, self._handoff_due)
        if self.state != STARTED:
            due = min(due, self._first_due)
        elif self._limits.streamed:
            due = min(due, self._idle_due(self._idle_from if now is None else now))
        self.due = due
