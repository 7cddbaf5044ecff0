"""What a tenant's calls cost by model and day, its output ratio, and the alerts its spend crosses (lua/learn.lua).

Learned from the usage stream, behind the requests; the ledger's balances are the money, this is the picture of it.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct

from shared.state import keys
from shared.state.pipeline import Pipeline
from shared.state.scripts import Scripts, load
from shared.wire.records import UsageBatch, UsageRecord

USD: Final = 1_000_000_000
#: S1-M1a: lifetime spend, each told once, when it is reached. S1-M1b: a day's spend, told once, when it is exceeded.
TIERS: Final = tuple(usd * USD for usd in (10, 50, 100, 500))
DAILY_LIMITS: Final = tuple(usd * USD for usd in (5, 20, 50, 100))
#: S1-H2a: exactly; the model with the fewest requests goes before a new one comes. Of a day, more come under OTHERS.
MAX_MODELS: Final = 100
OTHERS: Final = "*"
#: S1-M1b.
DAYS_KEPT: Final = 30
#: Batches of one process share a bitmap of so many: half a KiB for each tenant it served in some 7 minutes.
PAGE: Final = 4096

_LIFETIME: Final = "lifetime"
_TIMEOUT: Final = 0.5
_LEARN: Final = load("learn", "_costs")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_pack: Final = msgspec.msgpack.Encoder().encode


class Spent(Struct, frozen=True, array_like=True):
    """`requests` are upstream calls that used something; `cost` is nano-USD."""

    requests: int = 0
    cost: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Costs(Struct, frozen=True, kw_only=True):
    """One tenant's. Days are ISO dates; `alerts`: "lifetime:50" or "2026-11-21:20" (USD) -> shared-clock ms when it was
    crossed; `since`: ms of the first batch, 0 = there was none."""

    total: Spent = Spent()
    models: dict[str, Spent] = {}
    days: dict[str, Spent] = {}
    by_day: dict[str, dict[str, Spent]] = {}
    alerts: dict[str, int] = {}
    since: int = 0


class Alert(Struct, frozen=True, kw_only=True):
    """A lifetime tier that was reached, or a day's limit that was exceeded (`date`); nano-USD."""

    tenant: str
    date: str  # "" = lifetime
    limit: int
    spend: int


class RedisCosts:
    """The tracker, over one script."""

    def __init__(self, pipeline: Pipeline, scripts: Scripts, *, keep_ms: int) -> None:
        """`keep_ms`: for how long a batch may come again."""
        self._pipeline = pipeline
        self._run = scripts.run
        self._keep_ms = keep_ms

    async def learn(self, tenant: str, batch: UsageBatch, records: Iterable[UsageRecord]) -> list[Alert]:
        """Count the batch's records of this tenant, once; the alerts they cross, again if it comes again.

        Raises StateUnavailable.
        """
        page, bit = divmod(batch.number, PAGE)
        given = {
            "page": f"{batch.instance}:{page}", "bit": bit, "ttl": self._keep_ms,
            "batch": f"{batch.instance}.{batch.number}", "tiers": TIERS, "limits": DAILY_LIMITS,
            "most": MAX_MODELS, "days": DAYS_KEPT, **_counted(records, each=batch.late),
        }  # fmt: skip
        names = (keys.balances(tenant), keys.costs(tenant), keys.seen(tenant), keys.late(tenant))
        _first, *told = await self._run(_LEARN, names, (_pack(given),), _TIMEOUT)
        return [_alert(tenant, *map(bytes.decode, each)) for each in told]

    async def read(self, tenant: str) -> Costs:
        """The tenant's costs; empty for one that has none. Raises StateUnavailable."""
        flat = await self._pipeline.execute(b"HGETALL", keys.costs(tenant), within=_TIMEOUT)
        fields = dict(zip(map(bytes.decode, flat[::2]), flat[1::2], strict=True))
        days = {name[2:]: _unpack_day(raw) for name, raw in fields.items() if name.startswith("d:")}
        return Costs(
            total=_spent(msgspec.msgpack.decode(fields["total"])) if "total" in fields else Spent(),
            models=_models(msgspec.msgpack.decode(fields["models"])) if "models" in fields else {},
            days={date: day[0] for date, day in sorted(days.items())},
            by_day={date: day[1] for date, day in sorted(days.items())},
            alerts={
                _shown(name[2:]): int(raw.partition(b" ")[0]) for name, raw in fields.items() if name.startswith("a:")
            },
            since=int(fields.get("since", 0)),
        )


def _counted(records: Iterable[UsageRecord], *, each: bool) -> dict[str, Any]:
    """What the script counts: rows of models, and samples of the ratio, which is learned from what the provider counted
    itself. `each`: one row for each record, under its id."""
    rows: dict[tuple[int, str, str], list[int]] = {}
    samples: list[tuple[str, int, int]] = []
    for record in records:
        if not (record.cost or record.input_tokens or record.output_tokens):
            continue  # a call that failed before it used anything
        name = f"{record.rid}.{record.call}" if each else ""
        before = record.input_estimate or record.input_tokens
        if before > 0 and not record.estimated:
            samples.append((name, before, record.output_tokens))
        row = rows.setdefault((record.day, record.model, name), [0, 0, 0, 0])
        for index, value in enumerate((1, record.cost, record.input_tokens, record.output_tokens)):
            row[index] += value
    return {"samples": samples, "models": [(_date(day), model, name, *row) for (day, model, name), row in rows.items()]}


def _date(day: int) -> str:
    return (_EPOCH + timedelta(days=day)).date().isoformat()


def _alert(tenant: str, name: str, limit: str, spend: str) -> Alert:
    which = name.partition(":")[0]
    return Alert(tenant=tenant, date="" if which == _LIFETIME else which, limit=int(limit), spend=int(spend))


def _shown(name: str) -> str:
    which, _, limit = name.partition(":")
    return f"{which}:{int(limit) // USD}"


def _spent(values: list[Any]) -> Spent:
    return Spent(*map(int, values))


def _models(found: Any) -> dict[str, Spent]:
    return {} if not found else {name: _spent(values) for name, values in found.items()}  # Lua packs {} as an array


def _unpack_day(raw: bytes) -> tuple[Spent, dict[str, Spent]]:
    total, models = msgspec.msgpack.decode(raw)
    return _spent(total), _models(models)
