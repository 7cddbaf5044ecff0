"""The ledger as plain integers: what the Lua must equal after every step. One tenant, virtual time.

Written from DESIGN 4 and the docstrings of `shared.state.base`, not from the scripts; slow and obvious on purpose:
nothing is added up as it happens, every balance is the sum of the bill and of the entries, each time anew.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

from shared.state import keys
from shared.state.ledger import KEEP_DAYS, KEEP_MONTHS, KEEP_USER_DAYS, MAX_AMOUNT
from tests.state.rig import DAY, MINUTE

GRACE, TOMBSTONE, UNCONFIRMED = 3 * MINUTE, 10 * MINUTE, DAY

Answer = tuple[str | int, ...]
Field = tuple[str, str]  # level, bucket
PERIODS: Final = keys.PERIODS


@dataclass(frozen=True)
class Account:
    """Who is charged, and when."""

    day: int
    key: str
    user: str

    @property
    def levels(self) -> list[str]:
        return ["t"] + [f"k:{self.key}"] * bool(self.key) + [f"u:{self.user}"] * bool(self.user)

    @property
    def buckets(self) -> list[str]:
        return [keys.bucket(period, self.day * DAY) for period in PERIODS]

    @property
    def fields(self) -> list[Field]:
        return [(level, bucket) for level in self.levels for bucket in self.buckets]


@dataclass
class Call:
    number: int
    state: str  # dispatched settled unconfirmed posted
    amount: int
    instance: str
    delivery: int
    cost: int = 0
    due: int = 0
    estimated: bool = False


@dataclass
class Entry:
    state: str  # reserved voided called
    delivery: int
    voided: int
    deadline: int  # 0: never reserved
    amount: int
    account: Account
    calls: list[Call] = field(default_factory=list)
    forget_at: int = 0

    @property
    def span(self) -> int:
        """How long it is remembered once nothing is held: what was counted by us, until a bill may come."""
        return UNCONFIRMED if any(call.estimated for call in self.calls) else TOMBSTONE

    @property
    def last(self) -> Call | None:
        return max(self.calls, key=lambda call: call.number, default=None)

    def call(self, number: int) -> Call | None:
        return next((each for each in self.calls if each.number == number), None)

    def due(self) -> int:
        """When something happens to it next."""
        times = [call.due for call in self.calls if call.state == "unconfirmed"]
        if self.state == "reserved" or any(call.state == "dispatched" for call in self.calls):
            times.append(self.deadline + GRACE)
        return min(times, default=self.forget_at)

    def holds(self) -> bool:
        return self.state == "reserved" or any(call.state in {"dispatched", "unconfirmed"} for call in self.calls)


@dataclass
class Posting:
    """One line of the bill: what a call cost, and whose."""

    cost: int
    account: Account


class Model:
    """Every verb answers what the ledger answers, as a tuple."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.entries: dict[str, Entry] = {}
        self.limits: dict[tuple[str, str], int] = {}  # level, period
        self.forgotten: Counter[str] = Counter()  # how often a request was forgotten: then its numbers begin anew
        self.bill: dict[tuple[str, int, int], Posting] = {}  # rid, life, call
        self.pruned: set[Field] = set()  # dropped: nobody may ask for them any more
        self.pruned_on = 0

    # ---- sums --------------------------------------------------------------------------------------------------------

    @property
    def today(self) -> int:
        return self.now // DAY

    def balance(self, where: Field) -> tuple[int, int, int]:
        """Settled, pending, unconfirmed of a level in a bucket: I1 is that this is what Redis has."""
        settled = sum(each.cost for each in self.bill.values() if where in each.account.fields)
        there = [entry for entry in self.entries.values() if where in entry.account.fields]
        reserved = sum(entry.amount for entry in there if entry.state == "reserved")
        held = Counter[str]()
        for entry in there:
            for call in entry.calls:
                held[call.state] += call.amount
        return settled, reserved + held["dispatched"], held["unconfirmed"]

    def fields(self) -> set[Field]:
        """All that may be asked for."""
        accounts = [each.account for each in self.bill.values()]
        accounts += [entry.account for entry in self.entries.values()]
        return {where for account in accounts for where in account.fields} - self.pruned

    def denies(self, account: Account, amount: int) -> Answer | None:
        """The tightest limit that `amount` would pass, if any: what is left of it, its level and period.

        What is held is itself below 2^53 in every bucket, limits or none: Lua's integers end there."""
        left, which, where = MAX_AMOUNT, "t", "lifetime"
        for level in account.levels:
            for period, bucket in zip(PERIODS, account.buckets, strict=True):
                settled, pending, unconfirmed = self.balance((level, bucket))
                room = MAX_AMOUNT - pending - unconfirmed
                limit = self.limits.get((level, period))
                if limit is not None:
                    room = limit - settled - pending - unconfirmed
                if room < left:
                    left, which, where = room, level, period
        return ("denied", max(0, left), which, where) if 0 < amount > left else None

    def has_limit(self, level: str) -> bool:
        return any(each == level for each, _ in self.limits)

    # ---- verbs -------------------------------------------------------------------------------------------------------

    def reserve(
        self, rid: str, delivery: int, amount: int, ttl: int, key: str = "", user: str = "", least: int = 0
    ) -> Answer:
        if ttl < 0:
            return ("late",)
        self.sweep()
        entry = self.entries.get(rid)
        if entry and entry.state == "reserved":
            if amount > entry.amount and not 0 < least <= entry.amount:  # what was clamped stays so
                answer = self._fit(entry.account, amount, entry.amount, least)
                if answer[0] != "ok":
                    return answer
                entry.amount = int(answer[1])
            entry.delivery = max(entry.delivery, delivery)
            return self._ok(entry, entry.amount)
        if entry and entry.state == "called":
            last = entry.last
            assert last is not None
            open_amount = last.amount if last.state == "dispatched" else None
            if open_amount is None and (delivery <= entry.delivery or not last.instance):
                return ("closed",)
            entry.delivery = max(entry.delivery, delivery)
            return self._ok(entry, open_amount or 0)
        if entry and delivery <= entry.voided:
            return ("refused",)
        account = Account(self.today, key, user if self.has_limit(f"u:{user}") else "")
        answer = self._fit(account, amount, 0, least)
        if answer[0] != "ok":
            return answer
        voided = entry.voided if entry else 0
        fresh = Entry("reserved", delivery, voided, self.now + ttl, int(answer[1]), account)
        self.entries[rid] = fresh
        return self._ok(fresh, fresh.amount)

    def _fit(self, account: Account, amount: int, held: int, least: int) -> Answer:
        """Whether `amount` fits where `held` of it is held already; when not, but `least` does, all that is left."""
        denied = self.denies(account, amount - held)
        if denied and least > 0 and held + int(denied[1]) >= least:
            return ("ok", held + int(denied[1]))
        return denied or ("ok", amount)

    @staticmethod
    def _ok(entry: Entry, held: int) -> Answer:
        return ("ok", held, entry.account.day, int(bool(entry.account.user)))

    def dispatch(self, rid: str, delivery: int, instance: str, lost: str, amount: int, max_calls: int) -> Answer:
        entry = self.entries.get(rid)
        if entry is None:
            return ("missing",)
        if entry.state == "voided" or delivery <= entry.voided:
            return ("voided",)
        if self.now > entry.deadline:
            return ("late",)
        last = entry.last
        if last is None:
            entry.state = "called"
            entry.calls.append(Call(1, "dispatched", entry.amount, instance, delivery))
            return ("won", 1)
        if last.state == "dispatched" and (last.instance, last.delivery) == (instance, delivery):
            return ("won", last.number)
        if not lost or last.instance != lost or lost == instance:
            return ("refused" if last.state == "dispatched" else "closed", last.instance, last.delivery)
        return self._next(entry, last, instance, delivery, amount, max_calls)

    def topup(self, rid: str, call: int, delivery: int, instance: str, amount: int, max_calls: int) -> Answer:
        entry = self.entries.get(rid)
        if entry is None:
            return ("missing",)
        if entry.state == "voided":
            return ("voided",)
        if self.now > entry.deadline:
            return ("late",)
        last = entry.last
        if last is None:
            return ("missing",)
        mine = (last.instance, last.delivery) == (instance, delivery)
        if mine and last.state == "dispatched" and last.number == call:
            return ("won", call)
        if not mine and last.state == "dispatched":
            return ("refused", last.instance, last.delivery)
        if not mine or last.number != call - 1 or last.state not in {"dispatched", "settled"}:
            return ("closed", last.instance, last.delivery)
        return self._next(entry, last, instance, delivery, amount, max_calls)

    def _next(self, entry: Entry, last: Call, instance: str, delivery: int, amount: int, max_calls: int) -> Answer:
        if last.state == "dispatched":
            last.state, last.due = "unconfirmed", self.now + UNCONFIRMED
        if last.number + 1 > max_calls:
            return ("exhausted",)
        denied = self.denies(entry.account, amount)
        if denied:
            return denied[:2]
        entry.calls.append(Call(last.number + 1, "dispatched", amount, instance, delivery))
        return ("won", last.number + 1)

    def extend(self, rid: str, number: int, total: int, delivery: int, instance: str) -> Answer:
        entry = self.entries.get(rid)
        if entry is None:
            return ("missing",)
        call = entry.call(number)
        if call is None or call.state != "dispatched" or (call.instance, call.delivery) != (instance, delivery):
            return ("closed",)
        denied = self.denies(entry.account, total - call.amount)
        if denied:
            return denied[:2]
        call.amount = max(call.amount, total)
        return ("ok", call.amount)

    def settle(self, rid: str, number: int, cost: int, account: Account, *, estimated: bool = False) -> str:
        return self._post(rid, number, cost, account, estimated=estimated, bill=False)

    def correct(self, rid: str, number: int, cost: int, account: Account, was: int = -1) -> str:
        """`was` >= 0 names a posting of an earlier life of the request, the last one."""
        if rid in self.entries:
            return self._post(rid, number, cost, account, estimated=False, bill=True)
        if was < 0:
            return "missing"
        if was == cost:
            return "duplicate"
        self.bill[rid, self.forgotten[rid] - 1, number].cost = cost
        return "corrected"

    def _post(self, rid: str, number: int, cost: int, account: Account, *, estimated: bool, bill: bool) -> str:
        status = "settled"
        entry = self.entries.get(rid)
        if entry is None:
            day = account.day or self.today
            entry = self.entries[rid] = Entry("called", 0, 0, 0, 0, replace(account, day=day))
            status = "opened"
        if not entry.account.key:  # voided before it was ever reserved
            entry.account = replace(entry.account, key=account.key, user=account.user)
        call = entry.call(number)
        if call is None:
            call = Call(number, "new", 0, "", 0)
            if entry.state == "reserved":
                call.amount, call.delivery = entry.amount, entry.delivery
                status = "overrun" if cost > entry.amount else status
            elif status == "settled":
                status = "late" if entry.state == "voided" else "opened"
            entry.calls.append(call)
        if call.state == "settled":
            if not bill or (call.cost == cost and not call.estimated):
                return "duplicate"
            status = "corrected"
        elif call.state in {"unconfirmed", "posted"}:
            status = "late"
        elif call.state == "dispatched" and cost > call.amount:
            status = "overrun"
        entry.state, call.state, call.cost, call.estimated = "called", "settled", cost, estimated
        self.bill[rid, self.forgotten[rid], number] = Posting(cost, entry.account)
        entry.forget_at = max(self.now + entry.span, entry.deadline + GRACE)
        return status

    def void(self, rid: str, delivery: int, instance: str, lowest: int, key: str = "", user: str = "") -> str:
        entry = self.entries.get(rid)
        if entry is None:
            entry = self.entries[rid] = Entry("voided", 0, 0, 0, 0, Account(self.today, key, user))
        last = entry.last
        if last is not None:
            if not instance or (last.instance, last.delivery, last.state) != (instance, delivery, "dispatched"):
                return "kept"
            if last.number < lowest:
                return "kept"
            last.state, last.cost = "settled", 0
        elif delivery < entry.delivery:
            return "kept"
        else:
            entry.state, entry.voided = "voided", max(entry.voided, delivery)
        entry.forget_at = max(self.now + entry.span, entry.deadline + GRACE)
        return "voided"

    # ---- time --------------------------------------------------------------------------------------------------------

    def expire(self) -> int:
        swept = self.sweep()
        if self.pruned_on != self.today:
            self.pruned_on = self.today
            self.pruned |= {where for where in self.fields() if self._old(*where) and self.balance(where)[1:] == (0, 0)}
        return swept

    def _old(self, level: str, bucket: str) -> bool:
        if bucket == "lifetime":
            return False
        user, month = level.startswith("u:"), len(bucket) == len("2026-11")
        if not month:
            return bucket < keys.bucket("day", (self.today - (KEEP_USER_DAYS if user else KEEP_DAYS)) * DAY)
        if user:
            return bucket < keys.bucket("month", (self.today - KEEP_USER_DAYS) * DAY)
        year, number = map(int, keys.bucket("month", self.now).split("-"))
        first = year * 12 + number - 1 - KEEP_MONTHS
        return bucket < f"{first // 12:04d}-{first % 12 + 1:02d}"

    def sweep(self) -> int:
        due = [rid for rid, entry in self.entries.items() if entry.due() <= self.now]
        for rid in due:
            entry = self.entries[rid]
            held = entry.holds()
            self._lapse(rid, entry)
            if held:
                entry.forget_at = max(self.now + entry.span, entry.deadline + GRACE)
            else:
                del self.entries[rid]
                self.forgotten[rid] += 1
        return len(due)

    def _lapse(self, rid: str, entry: Entry) -> None:
        if entry.state == "reserved":
            entry.state, entry.voided = "voided", max(entry.voided, entry.delivery)
        for call in entry.calls:
            if call.state == "dispatched" and entry.deadline + GRACE <= self.now:
                call.state, call.due = "unconfirmed", self.now + UNCONFIRMED
            elif call.state == "unconfirmed" and call.due <= self.now:
                call.state, call.cost, call.estimated = "posted", call.amount, True
                self.bill[rid, self.forgotten[rid], call.number] = Posting(call.amount, entry.account)
