"""The journal of a tenant's ledger, replayed: the balances that its lines add up to, and what is wrong (DESIGN 4).

The lines and the balances are one thing told twice, by the same scripts in the same step. `Replay` compares them: it
moves the balances line by line exactly as lua/_balances.lua does, checks that no line takes more than a limit leaves
(I2), and follows every call through its states (transitions.py). Nothing here reads Redis.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import date
from functools import lru_cache
from typing import Final

from msgspec import Struct

from shared.core.transitions import HOLDING, NONE, TAKING, UNKNOWN, Call, Line, follow, position

PERIODS: Final = ("day", "month", "lifetime")

_EPOCH: Final = date(1970, 1, 1).toordinal()
_BUCKET: Final = re.compile(r"([tku]).*:(\d{4}-\d\d(?:-\d\d)?|lifetime)\Z")
_DAY: Final = len("2026-11-21")
_UNLIMITED: Final = ("-", "-", "-")


class Violation(Struct, frozen=True):
    """A line that should not be, by a rule.

    limit   it takes room, and passes a limit (I2)
    order   its call was not in a state from which that may happen
    twice   a call was posted that had been posted, by who had forgotten it
    amount  it moved something else than its call's state says
    clamp   it gave back more than was held
    snap    a snapshot that is not what the lines before it add up to
    line    it was not understood.
    """

    line: str
    rule: str
    text: str


class _Request(Struct):
    """A request of which lines were seen; `known` from its beginning."""

    known: bool
    reservation: Call
    calls: dict[int, Call]


@lru_cache(maxsize=256)
def buckets_of(day: int) -> tuple[str, str, str]:
    """Day, month and lifetime that are charged on that day (days since 1970-01-01)."""
    text = date.fromordinal(_EPOCH + day).isoformat()
    return text, text[:7], PERIODS[2]


@lru_cache(maxsize=4096)
def fields_of(day: int, key: str, user: str) -> tuple[tuple[str, tuple[str, str, str]], ...]:
    """The levels of a line, each with its three fields of the balances."""
    levels = ["t"] + ([f"k:{key}"] if key else []) + ([f"u:{user}"] if user else [])
    one, two, three = buckets_of(day)
    return tuple((level, (f"{level}:{one}", f"{level}:{two}", f"{level}:{three}")) for level in levels)


class Replay:
    """The lines so far. A journal begins empty, or with a snapshot when its beginning was trimmed."""

    def __init__(self) -> None:
        self.balances: dict[str, list[int]] = {}  # <level>:<bucket> -> settled, pending, unconfirmed
        self.limits: dict[str, list[str]] = {}  # level -> of day, month, lifetime, as text; "-" = none
        self.lines = 0
        self.first = ""  # id of the first line
        self.last = ""  # and of the newest
        self.trimmed = ""  # id of the snapshot that it begins with, when lines were dropped before it
        self.whole = True  # it began empty: every call is known from its beginning
        self.restored = ""  # id of the lost journal's line whose balances were added again (lua/merge.lua)
        self._requests: dict[str, _Request] = {}

    # ---- what it knows -----------------------------------------------------------------------------------------------

    @property
    def since(self) -> tuple[int, int]:
        """The position of the line from which on it knows of every posting; earlier ones are in a sum, or trimmed."""
        return max(position(self.restored), position(self.trimmed))

    def call(self, rid: str, number: int) -> Call | None:
        """The call, or None when no line told of it."""
        request = self._requests.get(rid)
        return request.calls.get(number) if request else None

    def requests(self) -> Iterable[tuple[str, bool, dict[int, Call]]]:
        """Every request that lines told of: its id, whether it is known from its beginning, and its calls by number;
        one without a call has its reservation as number 0."""
        for rid, request in self._requests.items():
            yield rid, request.known, request.calls or {0: request.reservation}

    def take(self, rid: str) -> tuple[bool, dict[int, Call]]:
        """The same of one request, which is then left out; (False, {}) for one of which no line told."""
        request = self._requests.pop(rid, None)
        return (request.known, request.calls or {0: request.reservation}) if request else (False, {})

    def calls(self) -> Iterable[tuple[str, int, Call]]:
        """Every call of them: request id, number, call."""
        return ((rid, number, call) for rid, _, calls in self.requests() for number, call in calls.items())

    def differences(self, fields: Mapping[str, str]) -> list[str]:
        """How the fields of a balances hash (all of them) differ from what the lines add up to; [] = they are equal."""
        found = []
        for name in sorted(self.balances.keys() | {name for name in fields if _BUCKET.match(name)}):
            told = " ".join(map(str, self.balances.get(name, (0, 0, 0))))
            if fields.get(name, "0 0 0") != told:
                found.append(f"{name}: the balances say {fields.get(name, 'nothing')}, the journal {told}")
        limited = {name.removesuffix(":limit") for name in fields if name.endswith(":limit")}
        for level in sorted(self.limits.keys() | limited):
            told = " ".join(self.limits.get(level, _UNLIMITED))
            stands = fields.get(f"{level}:limit", " ".join(_UNLIMITED))
            if stands != told:
                found.append(f"{level}:limit: the balances say {stands}, the journal {told}")
        return found

    # ---- a line ------------------------------------------------------------------------------------------------------

    def feed(self, line: Line) -> list[Violation]:
        """Take the next line; what is wrong with it, mostly nothing."""
        wrong: list[tuple[str, str]] = []
        self.lines += 1
        if not self.first:
            self.first = line.id
        self.last = line.id
        try:
            self._take(line, wrong)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            wrong.append(("line", f"not understood: {error}"))
        where = f"{line.op} of {line.rid}.{line.call}" if line.rid else line.op
        return [Violation(line.id, rule, f"{where}: {text}") for rule, text in wrong]

    def _take(self, line: Line, wrong: list[tuple[str, str]]) -> None:
        if line.op == "snap":
            self._snap(line, wrong)
        elif line.op == "prune":
            self._prune(*line.more)
        elif line.op == "limit":
            self._limit(*line.more)
        elif line.op == "restore":
            self._restore(*line.more)
        else:
            self._move(line, wrong)  # the money moved, whatever is to be said about the call
            self._follow(line, wrong)

    def _move(self, line: Line, wrong: list[tuple[str, str]]) -> None:
        settled, pending, unconfirmed = line.settled, line.pending, line.unconfirmed
        if settled == 0 and pending == 0 and unconfirmed == 0:
            return
        taking = line.op in TAKING
        for level, names in fields_of(line.day, line.key, line.user):
            limits = self.limits.get(level) if taking else None
            for i, name in enumerate(names):
                sums = self.balances.get(name)
                if sums is None:
                    sums = self.balances[name] = [0, 0, 0]
                sums[0] += settled
                sums[1] += pending
                sums[2] += unconfirmed
                if sums[1] < 0 or sums[2] < 0:
                    wrong.append(("clamp", f"it gave back more than {name} held"))
                    sums[1], sums[2] = max(sums[1], 0), max(sums[2], 0)
                if limits is not None and limits[i] != "-" and sum(sums) > int(limits[i]):
                    wrong.append(("limit", f"it took {name} to {sum(sums)}, past its limit of {limits[i]}"))

    def _limit(self, level: str, period: str, value: int) -> None:
        limits = self.limits.setdefault(level, list(_UNLIMITED))
        limits[PERIODS.index(period)] = "-" if value < 0 else str(value)
        if limits == list(_UNLIMITED):
            del self.limits[level]

    def _prune(self, day: str, month: str, user_day: str, user_month: str) -> None:
        for name in list(self.balances):
            found = _BUCKET.match(name)
            if found is None or found[2] == PERIODS[2]:
                continue
            user, bucket = found[1] == "u", found[2]
            oldest = (user_day if user else day) if len(bucket) == _DAY else (user_month if user else month)
            if bucket < oldest and self.balances[name][1:] == [0, 0]:  # as expire.lua: what holds something stays
                del self.balances[name]

    def _snap(self, line: Line, wrong: list[tuple[str, str]]) -> None:
        """The first line: where the replay begins. Later: must be what was replayed, and is gone on with."""
        flat = line.more[0]
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if self.lines == 1:
            self.whole, self.trimmed = False, line.id
        else:
            wrong += [("snap", each) for each in self.differences(fields)]
        self.balances, self.limits = read_snapshot(fields)

    def _restore(self, snapshot: str, flat: list[str]) -> None:
        """Balances of a journal that was lost: calls from before are not known any more."""
        self.restored, self.whole = snapshot, False
        balances, limits = read_snapshot(dict(zip(flat[::2], flat[1::2], strict=True)))
        for name, sums in balances.items():
            self.balances.setdefault(name, [0, 0, 0])[0] += sums[0]
        for level, three in limits.items():
            stand = self.limits.get(level, _UNLIMITED)
            self.limits[level] = [old if new == "-" else new for new, old in zip(stand, three, strict=True)]

    def _follow(self, line: Line, wrong: list[tuple[str, str]]) -> None:
        request = self._requests.get(line.rid)
        if request is None or line.op == "reserve":
            held = request is not None and _holds(request)
            known = self.whole or line.op == "reserve"
            request = self._requests[line.rid] = _Request(known, NONE if known else UNKNOWN, {})
            if held:
                wrong.append(("order", "something was held for it already"))
        if line.call == 0:
            request.reservation, fault = follow(line, request.reservation)
        else:
            before = request.calls.get(line.call) or _unseen(line, request)
            if line.op == "topup" and request.known and line.call != max(request.calls, default=0) + 1:
                wrong.append(("order", "it is not the next call"))
            request.calls[line.call], fault = follow(line, before)
        if fault is not None:
            wrong.append(fault)


def read_snapshot(fields: Mapping[str, str]) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    """Balances and limits among all fields of a balances hash, as `Replay` has them. Raises ValueError (damaged)."""
    balances, limits = {}, {}
    for name, text in fields.items():
        parts = text.split(" ")
        if _BUCKET.match(name):
            balances[name] = [int(part) for part in parts]
        elif name.endswith(":limit"):
            limits[name.removesuffix(":limit")] = parts
        else:
            continue
        if len(parts) != len(PERIODS):
            raise ValueError(f"{name} is not three numbers")
    return balances, limits


def _unseen(line: Line, request: _Request) -> Call:
    """A call before its first line: it has its request's reservation, if that was not taken by an earlier call."""
    if not request.calls and request.reservation.state in {"reserved", "voided"}:
        return request.reservation
    if request.known or line.op == "topup":
        return NONE
    return UNKNOWN


def _holds(request: _Request) -> bool:
    waiting = not request.calls and request.reservation.state == "reserved"
    return waiting or any(call.state in HOLDING for call in request.calls.values())
