"""The road of a settlement: what a call is charged is with the ledger before its terminal is with the client (D3).

Redis takes it                    settled; the usage record goes to JetStream behind the answer
Redis does not answer in 150 ms   the record goes to JetStream, acknowledged within 150 ms, and a guardian posts it
nor does JetStream                to the spool, on disk before the answer, and any worker publishes it
nor the disk                      kept in memory and tried until Redis takes it (shared/state/behind.py), loudly

(DESIGN 4; a record can be posted any number of times and counts once: shared/state/late.py.)
"""

import logging
from typing import Final

import msgspec
from msgspec import Struct
from prometheus_client import Counter

from shared.bus.spool import SpoolFailed
from shared.service.killat import reach
from shared.state.base import Clock, Ledger, StateUnavailable
from shared.state.behind import Behind, Settle
from shared.wire.messages import Call
from shared.wire.records import UsageRecord
from workers.provider.settlement import Charge
from workers.provider.usage import UsageLog

_DAY_MS: Final = 86_400_000


class Counters(Struct, frozen=True):
    """`overruns`: calls billed above what was held for them; `roads`: by where a settlement went first (`road`)."""

    overruns: Counter
    roads: Counter


class Posting:
    """Of one provider process."""

    def __init__(
        self, ledger: Ledger, clock: Clock, usage: UsageLog, behind: Behind, log: logging.Logger, counters: Counters
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._usage = usage
        self._behind = behind
        self._log = log
        self._counters = counters
        self._by_redis = counters.roads.labels("redis")

    async def settle(self, message: Call, call: int, paid: Charge, held: int, endpoint: str) -> bool:
        """Post it in full; `held`: what is reserved for this call, nano-USD. False when Redis did not answer: the call
        is left unconfirmed until the record is posted."""
        record = _record(message, call, paid, endpoint, self._clock.now())
        if message.admission.reserved and paid.cost > held:
            self._overrun(record.rid, call, paid.cost, held)
        reach("provider.before_settle")
        try:
            settled = await self._ledger.settle(
                tenant=record.tenant, rid=record.rid, call=call, cost=record.cost, estimated=record.estimated,
                key=record.key, user=record.user, day=record.day, tokens=record.input_tokens + record.output_tokens,
            )  # fmt: skip
        except StateUnavailable as error:
            await self._without_redis(record, error)
            return False
        reach("provider.after_settle")
        self._by_redis.inc()
        if settled.line:
            self._usage.add(_with_line(record, settled.line))
        return True

    async def _without_redis(self, record: UsageRecord, error: StateUnavailable) -> None:
        try:
            road: str = await self._usage.post(record)
        except SpoolFailed as fault:
            road = "memory"
            self._log.critical(
                "a settlement is in memory alone: Redis, JetStream and the spool do not take it",
                extra={"requestId": record.rid, "call": record.call, "cost_nano_usd": record.cost, "error": str(fault)},
            )
            settle = Settle(
                record.tenant, record.rid, record.call, record.cost, record.estimated, record.key, record.user,
                record.day, record.input_tokens + record.output_tokens,
            )  # fmt: skip
            self._behind.settle(settle, error)
        self._counters.roads.labels(road).inc()
        self._log.warning(
            "settlement not confirmed", extra={"requestId": record.rid, "call": record.call, "road": road}
        )

    def _overrun(self, rid: str, call: int, cost: int, held: int) -> None:
        """The provider billed more than was reserved: posted in full, with an alert (DESIGN 4)."""
        self._counters.overruns.inc()
        self._log.warning("overrun", extra={"requestId": rid, "call": call, "cost": cost, "reserved": held})


def _record(message: Call, call: int, paid: Charge, endpoint: str, now: int) -> UsageRecord:
    """Without its line. What was never reserved is charged to the day it was used."""
    ask, admission, usage = message.ask, message.admission, paid.usage
    return UsageRecord(
        tenant=ask.tenant, rid=ask.rid, call=call, key=ask.key, user=admission.user,
        day=admission.day or now // _DAY_MS, model=ask.model, endpoint=endpoint, cost=paid.cost,
        estimated=paid.estimated, line="", at=now, input_tokens=usage.input_tokens, cached_tokens=usage.cache_read,
        output_tokens=usage.output_tokens, cache_write_5m=usage.cache_write_5m, cache_write_1h=usage.cache_write_1h,
        audio_input=usage.audio_input, audio_output=usage.audio_output, reasoning=usage.reasoning,
        input_estimate=admission.input_estimate, epoch=admission.epoch, raw=paid.raw,
    )  # fmt: skip


def _with_line(record: UsageRecord, line: str) -> UsageRecord:
    return msgspec.structs.replace(record, line=line)
