"""One request's account in the ledger: its first call is won, further ones topped up, each settled once.

    dispatch -> settle                        one call
             -> extend* -> settle             that generates more than was reserved (metering.py)
             -> settle -> top_up -> settle    a further one, under its own number and with its own amount

dispatch and top_up are asked once again when no answer came or Redis ran it too late; still in doubt, no call is made
and what may have been opened is settled at 0 behind the answer. extend is asked once: a stream waits for it.
"""

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from shared.service.killat import reach
from shared.state.base import Dispatched, Extended, StateUnavailable
from shared.state.ledger import MAX_AMOUNT
from shared.wire import errors
from shared.wire.messages import Call, ErrorBody
from workers.provider.notwon import not_won
from workers.provider.settlement import Charge

if TYPE_CHECKING:
    from workers.provider.call import Provider

#: A dispatch or top-up that Redis runs later than this after it was asked is refused (DESIGN 3, stale work).
NOT_AFTER_MS: Final = 100
_IN_DOUBT: Final = "The budget ledger did not answer in time; the request was not started."


class NotWon(Struct, frozen=True):
    """Why this delivery makes no call: somebody else holds the stream (`holder`, its delivery), or the error."""

    error: ErrorBody | None = None
    holder: str = ""
    delivery: int = 0


class Account:
    """`call`: the number of the newest call; `held`: what the ledger holds for it, nano-USD."""

    __slots__ = ("_message", "_provider", "call", "held")

    def __init__(self, provider: "Provider", message: Call) -> None:
        self._provider = provider
        self._message = message
        self.call = 0
        self.held = message.admission.amount

    async def dispatch(self) -> NotWon | None:
        """Win the first call; None: it is won."""
        message, ask = self._message, self._message.ask
        if not message.admission.reserved:
            self.call = 1
            return None
        reach("provider.before_dispatch")
        answer: Dispatched | None = None
        doubt = False  # no answer came: it may have been applied all the same
        for _ in range(2):  # without a reply, or run too late by Redis, it is asked again once
            try:
                answer = await self._provider.ledger.dispatch(
                    tenant=ask.tenant, rid=ask.rid, delivery=ask.delivery, instance=self._provider.instance,
                    lost=ask.lost, amount=message.admission.amount, max_calls=message.plan.max_calls,
                    not_after=self._provider.clock.now() + NOT_AFTER_MS,
                )  # fmt: skip
            except StateUnavailable:
                doubt = True
                continue
            if answer.status != "stale":
                break
        if answer is not None and answer.status == "won":
            reach("provider.after_dispatch")
            self.call = answer.call
            return None
        if answer is None or (doubt and answer.status in ("stale", "late")):
            self._provider.void_doubt(message, 1)
            return NotWon(errors.LedgerDown(_IN_DOUBT).body())
        if answer.status in ("refused", "closed") and answer.holder:
            return NotWon(holder=answer.holder, delivery=answer.delivery)
        if answer.status in ("stale", "late"):
            self._provider.void(message)
        return NotWon(not_won(answer.status, ask.lost).body())

    async def top_up(self) -> bool:
        """Open call n+1 with its own amount; False: denied, or in doubt."""
        message, ask = self._message, self._message.ask
        if not message.admission.reserved:
            self.call += 1
            return True
        reach("provider.before_topup")
        for _ in range(2):
            try:
                answer = await self._provider.ledger.topup(
                    tenant=ask.tenant, rid=ask.rid, call=self.call + 1, delivery=ask.delivery,
                    instance=self._provider.instance, amount=message.admission.amount,
                    max_calls=message.plan.max_calls, not_after=self._provider.clock.now() + NOT_AFTER_MS,
                )  # fmt: skip
            except StateUnavailable:
                continue
            if answer.status == "stale":  # run too late, so nothing was opened
                continue
            if answer.status == "won":
                reach("provider.after_topup")
                self.call = answer.call
                self.held = message.admission.amount
            return answer.status == "won"
        self._provider.void_doubt(message, self.call + 1)
        return False

    async def extend(self, total: int) -> Extended:
        """Hold `total` nano-USD in all for the newest call. "missing" stands for no answer, too."""
        ask = self._message.ask
        if total > MAX_AMOUNT:
            return Extended(status="denied")
        reach("provider.before_extend")
        try:
            answer = await self._provider.ledger.extend(
                tenant=ask.tenant, rid=ask.rid, call=self.call, delivery=ask.delivery,
                instance=self._provider.instance, total=total, not_after=self._provider.clock.now() + NOT_AFTER_MS,
            )  # fmt: skip
        except StateUnavailable:
            return Extended(status="missing")
        reach("provider.after_extend")
        if answer.status == "ok":
            self.held = answer.amount
        return answer

    async def settle(self, paid: Charge, endpoint: str) -> bool:
        """Post what the newest call cost; see Posting."""
        return await self._provider.posting.settle(self._message, self.call, paid, self.held, endpoint)
