"""The lines of a tenant's journal, and what each does to its call (DESIGN 4): the table of states, pure.

The Lua scripts write a line with every transition, in the same step. Amounts are nano-USD and move all levels of the
line (tenant, key, user) in its day, its month and the lifetime:

    op         pending  unconfirmed  settled   more                     what it means
    reserve    +amount                         [held]                   held for the request's first call
    extend     +more                           [held in all]            call 0: by a later delivery; else a running call
    dispatch                                   [instance, delivery]     call 1 is made, with what was reserved
    topup      +amount                         [held]                   a further call is made, with its own amount
    settle     -held                 +cost     [cost, estimated, held]  posted; it was within what was held
    overrun    -held                 +cost     [cost, estimated, held]  posted in full, though above what was held
    late                 -held       +cost     [cost, estimated, held]  was unconfirmed, posted at its bound, or voided
    opened                           +cost     [cost, estimated, 0]     of a call of which nothing was known
    correct                          cost-was  [cost, 0, held]          the provider's bill said otherwise (reconcile)
    void       -held                                                    given back; of a call: settled at 0
    expire     -held                                                    its lease ran out before a call was made
    unconfirm  -held     +held                                          its worker died, or its lease ran out
    post                 -held       +held     [held, 1]                not confirmed in time: posted at its bound
    limit                                      [level, period, limit or -1]
    prune                                      [day, month, user's day, user's month]: older buckets were dropped
    restore                                    [snapshot, [field, value, ...]]: lost balances were added (rebuild)
    snap                                       [[field, value, ...]]: all balances; a trimmed journal begins with one

A call holds its amount while it is reserved or dispatched (pending) or unconfirmed, and has its cost posted once it is
settled or posted at its bound. So what a line moves is the difference of its call's sums after and before: `follow`
checks exactly that.
"""

from typing import Any, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

State = Literal["none", "reserved", "dispatched", "settled", "unconfirmed", "posted", "voided", "unknown"]

#: op -> the states a call may be in before, and its state after.
TABLE: Final[dict[str, tuple[frozenset[State], State]]] = {
    "dispatch": (frozenset({"reserved"}), "dispatched"),
    "topup": (frozenset({"none"}), "dispatched"),
    "extend": (frozenset({"dispatched"}), "dispatched"),
    "settle": (frozenset({"dispatched", "reserved"}), "settled"),  # reserved: the answer to its dispatch was lost
    "overrun": (frozenset({"dispatched", "reserved"}), "settled"),
    "late": (frozenset({"unconfirmed", "posted", "voided", "none"}), "settled"),  # none: voided before it was reserved
    "opened": (frozenset({"none", "voided"}), "settled"),  # voided: and forgotten, its tombstone is gone
    "correct": (frozenset({"settled", "posted"}), "settled"),
    "void": (frozenset({"dispatched"}), "settled"),
    "unconfirm": (frozenset({"dispatched"}), "unconfirmed"),
    "post": (frozenset({"unconfirmed"}), "posted"),
}
#: The same of a reservation that has no call yet: lines whose call is 0.
RESERVATION: Final[dict[str, tuple[frozenset[State], State]]] = {
    "reserve": (frozenset({"none", "voided"}), "reserved"),
    "extend": (frozenset({"reserved"}), "reserved"),
    "void": (frozenset({"reserved"}), "voided"),
    "expire": (frozenset({"reserved"}), "voided"),
}
#: Ops that take room: no limit may be passed by them (I2). What was really used is always posted in full.
TAKING: Final = frozenset({"reserve", "extend", "topup"})
#: Ops after which a call's cost is known.
POSTING: Final = frozenset({"settle", "overrun", "late", "opened", "correct"})
#: States that hold money.
HOLDING: Final = frozenset({"reserved", "dispatched", "unconfirmed"})


class Line(Struct, frozen=True, kw_only=True):
    """One line of a tenant's journal: a transition and what it moved, in nano-USD, in all the buckets of its levels."""

    id: str  # Redis stream id: <server ms>-<n>
    op: str
    rid: str  # 32 hex digits, "" for lines of the whole tenant
    call: int
    day: int  # days since 1970-01-01: the day (and month) that is charged
    key: str
    user: str
    settled: int
    pending: int
    unconfirmed: int
    more: tuple[Any, ...] = ()  # by op, see above


class Call(Struct, frozen=True):
    """A call as the lines tell it; of a request that has none, its reservation. `line`: id of the newest line on it,
    `began`: of the first that is known. `again`: what was posted besides `cost`, by whoever had forgotten the call."""

    state: State
    held: int = 0
    cost: int = 0
    estimated: bool = False
    day: int = 0
    key: str = ""
    user: str = ""
    line: str = ""
    again: int = 0
    began: str = ""

    @property
    def posted(self) -> int:
        """All that is posted for it."""
        return self.cost + self.again if self.state in {"settled", "posted"} else 0

    @property
    def sums(self) -> tuple[int, int, int]:
        """What it puts into settled, pending and unconfirmed."""
        return (
            self.posted,
            self.held if self.state in {"reserved", "dispatched"} else 0,
            self.held if self.state == "unconfirmed" else 0,
        )


NONE: Final = Call("none")
UNKNOWN: Final = Call("unknown")  # its beginning was trimmed


def follow(line: Line, before: Call) -> tuple[Call, tuple[str, str] | None]:
    """The call after a line, and what is wrong with the line: (rule, words); the rules are those of journal.Violation.

    Raises ValueError, IndexError or TypeError for a line that cannot be understood.
    """
    found = (RESERVATION if line.call == 0 else TABLE).get(line.op)
    if found is None:
        raise ValueError("there is no such line")
    allowed, state = found
    if before.state == "unknown" or (before.held < 0 and before.state in allowed):
        before = replace(_assumed(line), began=before.began)
    wrong = None
    if _again(line, before):
        wrong = ("twice", f"it was {before.state} at {before.cost}")
        before = replace(before, state="none", again=before.posted)
    elif before.state not in allowed:
        wrong = ("order", f"it was {before.state}")
        before = replace(before, state="none")
    again, began = before.again, before.began or line.id
    if line.op == "correct" and line.settled == line.more[0] - before.posted:
        again = 0  # reconcile found both
    after = Call(state, *_amounts(line, before), line.day, line.key, line.user, line.id, again, began)
    moved = tuple(now - then for now, then in zip(after.sums, before.sums, strict=True))
    if wrong is not None:
        return after, wrong
    if after.held >= 0 and moved != (line.settled, line.pending, line.unconfirmed):
        told = (line.settled, line.pending, line.unconfirmed)
        wrong = ("amount", f"it moved {told} of settled, pending and unconfirmed, and should have moved {moved}")
    if wrong is None and line.op in {"settle", "overrun"} and (line.op == "overrun") != (after.cost > before.held):
        wrong = ("amount", f"{after.cost} was posted where {before.held} was held")
    return after, wrong


def _again(line: Line, before: Call) -> bool:
    """Whether the ledger had forgotten what it had posted; late: a void came before the second settle."""
    if line.op == "late" and before.state == "posted":
        return bool(before.cost) and line.settled == line.more[0]
    return line.op in {"opened", "late"} and before.state in {"settled", "posted"}


def _amounts(line: Line, before: Call) -> tuple[int, int, bool]:
    """Held, cost and estimated of a call after the line."""
    if line.op in TAKING:
        return line.more[0], 0, False
    if line.op in POSTING:
        return before.held, line.more[0], bool(line.more[1])
    if line.op == "post":
        return before.held, before.held, True
    return before.held, 0, False


def _assumed(line: Line) -> Call:
    """The call before the first line on it that is kept, as the line itself tells."""
    waiting: State = "reserved" if line.call == 0 else "dispatched"
    match line.op:
        case "dispatch":
            before = Call("reserved", -1)  # what it held was told by a line that is gone
        case "topup" | "opened" | "reserve":
            before = NONE
        case "extend":
            before = Call(waiting, line.more[0] - line.pending)
        case "correct":
            before = Call("settled", 0, line.more[0] - line.settled)
        case "late" if line.unconfirmed == 0:
            before = Call("posted", 0, line.more[0] - line.settled)
        case "late" | "post":
            before = Call("unconfirmed", -line.unconfirmed)
        case _:
            before = Call(waiting, -line.pending)
    return before


def milliseconds(line: str) -> int:
    """The server ms of a line's id."""
    return int(line.partition("-")[0])


def position(line: str) -> tuple[int, int]:
    """A line's id as numbers, which are in the order of the journal; "" is before all."""
    at, _, number = line.partition("-")
    return int(at or 0), int(number or 0)
