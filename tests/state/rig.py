"""Short words for the ledger's calls, and ways to let time pass."""

import secrets
from typing import Any

import msgspec

from shared.core.circuit import CLOSED, SLOT_MS
from shared.core.transitions import Line
from shared.settings import Settings, load
from shared.state import keys
from shared.state.base import Dispatched, Extended, Level, Rates, Reserved
from shared.state.books import Entry
from shared.state.ledger import RedisLedger
from shared.state.redis import State

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR

KEY = "abcdefghijkl"  # id of the key that asks, where it does not matter


def settings_for(url: str, **environment: str) -> Settings:
    return load(
        {
            "GATEWAY_API_KEY": "g" * 40,
            "KEY_PEPPER": "p" * 40,
            "ADMIN_API_KEY": "a" * 40,
            "REDIS_URL": url,
            **environment,
        }
    )


def new_rid() -> str:
    return secrets.token_hex(16)


class Money:
    """The ledger of one tenant. `stale` sends a not-after that has gone by."""

    def __init__(self, state: State, tenant: str, ledger: RedisLedger | None = None) -> None:
        self.state = state
        self.tenant = tenant
        self.ledger = ledger or state.ledger

    @property
    def now(self) -> int:
        return self.ledger._now()

    def _not_after(self, stale: bool) -> int:
        return self.now + (-5000 if stale else 5000)

    async def reserve(
        self, rid: str, delivery: int = 1, amount: int = 100, ttl: int = HOUR, *, stale: bool = False, **more: Any
    ) -> Reserved:
        """Status, amount and what is left; `reserve_whole` has the rest."""
        found = await self.reserve_whole(rid, delivery, amount, ttl, stale=stale, **more)
        return Reserved(status=found.status, amount=found.amount, left=found.left)

    async def reserve_whole(
        self, rid: str, delivery: int = 1, amount: int = 100, ttl: int = HOUR, *, stale: bool = False,
        key: str = KEY, user: str = "", least: int = 0, rates: Rates | None = None,
    ) -> Reserved:  # fmt: skip
        return await self.ledger.reserve(
            tenant=self.tenant, rid=rid, delivery=delivery, amount=amount, deadline=self.now + ttl,
            not_after=self._not_after(stale), key=key, user=user, least=least, rates=rates,
        )  # fmt: skip

    async def dispatch(
        self, rid: str, delivery: int = 1, instance: str = "A", lost: str = "", amount: int = 100, max_calls: int = 3,
        *, stale: bool = False,
    ) -> Dispatched:  # fmt: skip
        return await self.ledger.dispatch(
            tenant=self.tenant, rid=rid, delivery=delivery, instance=instance, lost=lost, amount=amount,
            max_calls=max_calls, not_after=self._not_after(stale),
        )  # fmt: skip

    async def topup(
        self, rid: str, call: int, delivery: int = 1, instance: str = "A", amount: int = 100, max_calls: int = 3,
        *, stale: bool = False,
    ) -> Dispatched:  # fmt: skip
        return await self.ledger.topup(
            tenant=self.tenant, rid=rid, call=call, delivery=delivery, instance=instance, amount=amount,
            max_calls=max_calls, not_after=self._not_after(stale),
        )  # fmt: skip

    async def extend(
        self, rid: str, call: int, total: int, delivery: int = 1, instance: str = "A", *, stale: bool = False
    ) -> Extended:
        return await self.ledger.extend(
            tenant=self.tenant, rid=rid, call=call, delivery=delivery, instance=instance, total=total,
            not_after=self._not_after(stale),
        )  # fmt: skip

    async def settle(
        self, rid: str, call: int = 1, cost: int = 60, *, estimated: bool = False,
        key: str = KEY, user: str = "", day: int = 0, tokens: int = 0,
    ) -> str:  # fmt: skip
        settled = await self.ledger.settle(
            tenant=self.tenant, rid=rid, call=call, cost=cost, estimated=estimated, key=key, user=user, day=day,
            tokens=tokens,
        )  # fmt: skip
        assert bool(settled.line) == (settled.status != "duplicate")
        return settled.status

    async def correct(
        self, rid: str, call: int = 1, cost: int = 60, *, key: str = KEY, user: str = "", day: int = 0, was: int = -1
    ) -> str:
        settled = await self.ledger.correct(
            tenant=self.tenant, rid=rid, call=call, cost=cost, key=key, user=user, day=day, was=was
        )
        assert bool(settled.line) == (settled.status not in {"duplicate", "missing"})
        return settled.status

    async def void(
        self, rid: str, delivery: int = 1, instance: str = "", call: int = 1, *, key: str = "", user: str = ""
    ) -> str:
        return await self.ledger.void(
            tenant=self.tenant, rid=rid, delivery=delivery, instance=instance, call=call, key=key, user=user
        )

    async def expire(self) -> int:
        return (await self.ledger.expire(tenant=self.tenant))[0]

    async def limit(self, period: keys.Period, limit: int | None, level: str = "t") -> None:
        await self.ledger.set_limit(tenant=self.tenant, period=period, limit=limit, level=level)

    async def levels(self, level: str = "t") -> dict[str, Level]:
        return {each.period: each for each in await self.ledger.balances(tenant=self.tenant, level=level)}

    async def journal(self) -> list[Line]:
        """All of it."""
        lines: list[Line] = []
        while page := await self.ledger.journal(tenant=self.tenant, after=lines[-1].id if lines else ""):
            lines += page
        return lines

    async def held(self) -> tuple[int, int, int]:
        """Settled, pending, unconfirmed of the lifetime."""
        level = (await self.levels())["lifetime"]
        return level.settled, level.pending, level.unconfirmed

    async def calls(self, rid: str) -> list[tuple[int, str]]:
        return [(each.call, each.state) for each in await self.entries() if each.rid == rid]

    async def entries(self) -> list[Entry]:
        return await self.ledger.entries(tenant=self.tenant)

    async def raw(self, *command: bytes | int | str) -> Any:
        return await self.state._side.execute(*command, within=1.0)

    async def leases(self) -> dict[str, int]:
        """When each rid is next due, in ms from now."""
        flat = await self.raw("ZRANGE", keys.leases(self.tenant), 0, -1, "WITHSCORES")
        return {rid.hex(): int(float(score)) - self.now for rid, score in zip(flat[::2], flat[1::2], strict=True)}

    async def age(self, ms: int) -> None:
        """Let time pass for this tenant: every stored time moves into the past. (The scripts' clock is the server's and
        has no switch; the data has none but deadlines, due times and leases.)"""
        flat = await self.raw("HGETALL", keys.entries(self.tenant))
        for rid, packed in zip(flat[::2], flat[1::2], strict=True):
            entry = msgspec.msgpack.decode(packed)
            entry[3] -= ms
            for call in entry[9:]:
                if call[7]:
                    call[7] -= ms
            await self.raw("HSET", keys.entries(self.tenant), rid, msgspec.msgpack.encode(entry))
        for rid in flat[::2]:
            await self.raw("ZINCRBY", keys.leases(self.tenant), -ms, rid)


async def age_circuit(state: State, endpoint: str, ms: int) -> None:
    """Let time pass for one endpoint's circuit: whole slots of its window only."""
    assert ms % SLOT_MS == 0
    found = (await state.circuits.all()).get(endpoint, CLOSED)
    window = " ".join(f"{slot.number - ms // SLOT_MS}:{slot.calls}:{slot.failures}" for slot in found.window)
    fields: dict[str, int | str] = {
        "until": found.open_until and found.open_until - ms,
        "probing": found.probe_until and found.probe_until - ms,
        "window": window,
    }
    for name, value in fields.items():
        await state._side.execute(b"HSET", keys.CIRCUITS, f"{endpoint}:{name}", value, within=1.0)
    await state._side.execute(b"HINCRBY", keys.CIRCUITS, keys.CIRCUITS_VERSION, 1, within=1.0)
