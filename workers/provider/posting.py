"""The road of a settlement: what a call is charged is with the ledger before its terminal is with the client (D3).

Redis takes it                      settled
Redis does not answer in 150 ms     kept behind the answer and tried until it does (shared/state/behind.py)
"""

import logging

from prometheus_client import Counter

from shared.service.killat import reach
from shared.state.base import Ledger, StateUnavailable
from shared.state.behind import Behind, Settle
from shared.wire.messages import Call
from workers.provider.settlement import Charge


class Posting:
    """Of one provider process. `overruns` counts the calls that were billed above what was held for them."""

    def __init__(self, ledger: Ledger, behind: Behind, log: logging.Logger, overruns: Counter) -> None:
        self._ledger = ledger
        self._behind = behind
        self._log = log
        self._overruns = overruns

    async def settle(self, message: Call, call: int, paid: Charge, held: int) -> bool:
        """Post it in full; `held`: what is reserved for this call, nano-USD. False when Redis did not answer: the call
        is left unconfirmed until the late settle."""
        ask, admission = message.ask, message.admission
        post = Settle(
            ask.tenant, ask.rid, call, paid.cost, paid.estimated, ask.key, admission.user, admission.day,
            paid.usage.input_tokens + paid.usage.output_tokens,
        )  # fmt: skip
        if admission.reserved and paid.cost > held:
            self._overrun(ask.rid, call, paid.cost, held)
        reach("provider.before_settle")
        try:
            await self._ledger.settle(
                tenant=post.tenant, rid=post.rid, call=call, cost=post.cost, estimated=post.estimated, key=post.key,
                user=post.user, day=post.day, tokens=post.tokens,
            )  # fmt: skip
        except StateUnavailable as error:
            self._log.warning("settlement not confirmed", extra={"requestId": ask.rid, "call": call})
            self._behind.settle(post, error)
            return False
        reach("provider.after_settle")
        return True

    def _overrun(self, rid: str, call: int, cost: int, held: int) -> None:
        """The provider billed more than was reserved: posted in full, with an alert (DESIGN 4)."""
        self._overruns.inc()
        self._log.warning("overrun", extra={"requestId": rid, "call": call, "cost": cost, "reserved": held})
