"""The ledger as plain integers: what the Lua must equal after every step. One tenant, one day, virtual time.

Written from DESIGN 4 and the docstrings of `shared.state.base`, not from the scripts; slow and obvious on purpose.
"""

from collections import Counter
from dataclasses import dataclass, field

from tests.state.rig import DAY, MINUTE

GRACE, TOMBSTONE, UNCONFIRMED = 3 * MINUTE, 10 * MINUTE, DAY

Answer = tuple[str | int, ...]


@dataclass
class Call:
    number: int
    state: str  # dispatched settled unconfirmed posted
    amount: int
    instance: str
    delivery: int
    cost: int = 0
    due: int = 0


@dataclass
class Entry:
    state: str  # reserved voided called
    delivery: int
    voided: int
    deadline: int
    amount: int
    calls: list[Call] = field(default_factory=list)
    forget_at: int = 0

    @property
    def last(self) -> Call | None:
        return max(self.calls, key=lambda call: call.number, default=None)

    def due(self) -> int:
        """When something happens to it next."""
        times = [call.due for call in self.calls if call.state == "unconfirmed"]
        if self.state == "reserved" or any(call.state == "dispatched" for call in self.calls):
            times.append(self.deadline + GRACE)
        return min(times, default=self.forget_at)

    def holds(self) -> bool:
        return self.state == "reserved" or any(call.state in {"dispatched", "unconfirmed"} for call in self.calls)


class Model:
    """Every verb answers what the ledger answers, as a tuple."""

    def __init__(self) -> None:
        self.now = 0
        self.entries: dict[str, Entry] = {}
        self.settled = 0
        self.limits: dict[str, int] = {}
        self.forgotten: Counter[str] = Counter()  # how often a request was forgotten: then its numbers begin anew

    # ---- sums --------------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        reserved = sum(entry.amount for entry in self.entries.values() if entry.state == "reserved")
        return reserved + self._held("dispatched")

    @property
    def unconfirmed(self) -> int:
        return self._held("unconfirmed")

    def _held(self, state: str) -> int:
        return sum(call.amount for entry in self.entries.values() for call in entry.calls if call.state == state)

    def _left(self) -> int | None:
        used = self.settled + self.pending + self.unconfirmed
        return min((limit - used for limit in self.limits.values()), default=None)

    def _denies(self, amount: int) -> Answer | None:
        left = self._left()
        return ("denied", max(0, left)) if left is not None and 0 < amount > left else None

    # ---- verbs -------------------------------------------------------------------------------------------------------

    def reserve(self, rid: str, delivery: int, amount: int, ttl: int) -> Answer:
        if ttl < 0:
            return ("late",)
        self.sweep()
        entry = self.entries.get(rid)
        if entry and entry.state == "reserved":
            denied = self._denies(amount - entry.amount)
            if denied:
                return denied
            entry.delivery = max(entry.delivery, delivery)
            entry.amount = max(entry.amount, amount)
            return ("ok", entry.amount)
        if entry and entry.state == "called":
            last = entry.last
            assert last is not None
            open_amount = last.amount if last.state == "dispatched" else None
            if open_amount is None and (delivery <= entry.delivery or not last.instance):
                return ("closed",)
            entry.delivery = max(entry.delivery, delivery)
            return ("ok", open_amount or 0)
        if entry and delivery <= entry.voided:
            return ("refused",)
        denied = self._denies(amount)
        if denied:
            return denied
        self.entries[rid] = Entry("reserved", delivery, entry.voided if entry else 0, self.now + ttl, amount)
        return ("ok", amount)

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
        denied = self._denies(amount)
        if denied:
            return denied
        entry.calls.append(Call(last.number + 1, "dispatched", amount, instance, delivery))
        return ("won", last.number + 1)

    def settle(self, rid: str, number: int, cost: int) -> str:
        status = "settled"
        entry = self.entries.get(rid)
        if entry is None:
            entry = self.entries[rid] = Entry("called", 0, 0, -1, 0)
            status = "opened"
        call = next((each for each in entry.calls if each.number == number), None)
        if call is None:
            call = Call(number, "new", 0, "", 0)
            if entry.state == "reserved":
                call.amount, call.delivery = entry.amount, entry.delivery
                status = "overrun" if cost > entry.amount else status
            elif status == "settled":
                status = "late" if entry.state == "voided" else "opened"
            entry.calls.append(call)
        if call.state == "settled":
            return "duplicate"
        if call.state in {"unconfirmed", "posted"}:
            status = "late"
        elif call.state == "dispatched" and cost > call.amount:
            status = "overrun"
        self.settled += cost - (call.cost if call.state == "posted" else 0)
        entry.state, call.state, call.cost = "called", "settled", cost
        entry.forget_at = max(self.now + TOMBSTONE, entry.deadline + GRACE)
        return status

    def void(self, rid: str, delivery: int, instance: str, lowest: int) -> str:
        entry = self.entries.setdefault(rid, Entry("voided", 0, 0, -1, 0))
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
        entry.forget_at = max(self.now + TOMBSTONE, entry.deadline + GRACE)
        return "voided"

    # ---- time --------------------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        due = [rid for rid, entry in self.entries.items() if entry.due() <= self.now]
        for rid in due:
            entry = self.entries[rid]
            held = entry.holds()
            self._lapse(entry)
            if held:
                entry.forget_at = max(self.now + TOMBSTONE, entry.deadline + GRACE)
            else:
                del self.entries[rid]
                self.forgotten[rid] += 1
        return len(due)

    def _lapse(self, entry: Entry) -> None:
        if entry.state == "reserved":
            entry.state, entry.voided = "voided", max(entry.voided, entry.delivery)
        for call in entry.calls:
            if call.state == "dispatched" and entry.deadline + GRACE <= self.now:
                call.state, call.due = "unconfirmed", self.now + UNCONFIRMED
            elif call.state == "unconfirmed" and call.due <= self.now:
                call.state, call.cost = "posted", call.amount
                self.settled += call.amount
