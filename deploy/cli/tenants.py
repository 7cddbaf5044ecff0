"""What `hotpath keys|tenant|budget|spend` do, as plain JSON values: the words of the command line become a call of
shared/state/operations.py."""

import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast, get_args

import msgspec
from msgspec import UNSET, UnsetType

from deploy.cli.admin import Failed, tell_everyone, with_state
from deploy.cli.where import Where
from shared.core import money
from shared.state.keys import Period
from shared.state.operations import By, Limits, Missing, Operations
from shared.state.policies import KeyChange, TenantChange
from shared.state.redis import State

T = TypeVar("T")

_UNITS: Final = {"m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_SPAN: Final = re.compile(r"([1-9][0-9]{0,5})([mhdw])")
_HINTS: Final = {
    "tenant": "`hotpath keys create --tenant {}` makes one",
    "key": "`hotpath keys list` shows the ids",
    "request": "it is forgotten, or was another tenant's",
}


def _ask(where: Where, work: Callable[[Operations], Awaitable[T]], *, change: bool = False) -> Any:
    """The result as JSON values. `change`: everybody is told. Raises Failed."""

    async def go(state: State) -> T:
        try:
            result = await work(state.operations)
        except Missing as exc:
            raise Failed(f"{exc}; {_HINTS[exc.kind].format(exc.name)}") from exc
        if change:
            await tell_everyone(where, where.settings())
        return result

    return msgspec.to_builtins(with_state(where, go))


# ---- the words of the command line -----------------------------------------------------------------------------------


def limits(amount: str, period: str, option: str = "--limit-usd") -> Limits:
    """An amount in USD, or `none` to clear the limit of a period. Raises ValueError."""
    if period not in get_args(Period):
        raise ValueError(f"--period {period}: expected day, month or lifetime")
    if amount == "none":  # never the empty text: a shell variable that is not set must not lift a limit
        return Limits(**{period: None})
    try:
        return Limits(**{period: money.usd_to_nano(amount)})
    except ValueError as exc:
        raise ValueError(f"{option} {amount}: {exc}") from exc


def expiry(text: str, now: int) -> int:
    """Ms since 1970 of `30d` (m, h, d, w) from now, of a UTC date (when it begins) or time; `never`: 0.

    Raises ValueError for anything else, and for what has gone by.
    """
    if text == "never":
        return 0
    span = _SPAN.fullmatch(text)
    if span is not None:
        return now + int(span[1]) * _UNITS[span[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ValueError(f"--expires {text}: expected 30d, 12h, a date such as 2027-01-31, or never") from exc
    found = int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1000)
    if found <= now:
        raise ValueError(f"--expires {text}: that has gone by")
    return found


def _words(text: str | None) -> list[str] | UnsetType:
    """`a,b` as a list, `none` as an empty one; not given: as it is. Raises ValueError for the empty text."""
    if text is None:
        return UNSET
    if not text.strip():
        raise ValueError("a list is given as a,b or as none")
    return [] if text == "none" else [word.strip() for word in text.split(",") if word.strip()]


def _given(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


def key_change(expires: str | None, models: str | None, rpm: int | None, tpm: int | None, now: int) -> KeyChange:
    """Raises ValueError."""
    return KeyChange(
        expires=UNSET if expires is None else expiry(expires, now),
        models=_words(models),
        rpm=_given(rpm),
        tpm=_given(tpm),
    )


# ---- keys ------------------------------------------------------------------------------------------------------------


def create_key(
    where: Where, tenant: str, *, synthetic: bool, limit: str, period: str, key_limit: str, key_period: str,
    change: Callable[[int], KeyChange],
) -> dict[str, Any]:  # fmt: skip
    """{"key", "key_id", "tenant_id"}. `limit` is the tenant's, `key_limit` the key's; `change(now)`: what it may do."""
    of_tenant, of_key = limits(limit, period), limits(key_limit, key_period, "--key-limit-usd")

    async def work(state: Operations) -> Any:
        return await state.create_key(
            tenant, synthetic=synthetic, tenant_limits=of_tenant, limits=of_key, change=change(state.now())
        )

    made: dict[str, Any] = _ask(where, work, change=True)
    return made


def list_keys(where: Where, tenant: str) -> dict[str, Any]:
    """{"keys": [operations.Key]}, of all tenants unless one is named."""
    return {"keys": _ask(where, lambda operations: operations.keys(tenant or None))}


def set_key(where: Where, key_id: str, change: Callable[[int], KeyChange]) -> dict[str, Any]:
    """operations.Key as it is then. Raises Failed for an unknown id."""
    found: dict[str, Any] = _ask(where, lambda each: each.set_key(key_id, change(each.now())), change=True)
    return found


def revoke_key(where: Where, key_id: str) -> dict[str, Any]:
    """{"key_id", "revoked": true}. Raises Failed for an unknown id."""
    _ask(where, lambda operations: operations.revoke_key(key_id), change=True)
    return {"key_id": key_id, "revoked": True}


# ---- tenants ---------------------------------------------------------------------------------------------------------


def show_tenant(where: Where, name: str) -> dict[str, Any]:
    """operations.Tenant."""
    found: dict[str, Any] = _ask(where, lambda operations: operations.tenant(name))
    return found


def set_tenant(
    where: Where, name: str, *, mode: str | None, pii: str | None, keywords: str | None, clamp: bool | None,
    rpm: int | None, tpm: int | None,
) -> dict[str, Any]:  # fmt: skip
    """operations.Tenant as it is then. Raises ValueError."""
    given = {"mode": mode, "pii": pii, "clamp": clamp, "rpm": rpm, "tpm": tpm}
    change = msgspec.convert({name: value for name, value in given.items() if value is not None}, TenantChange)
    change.keywords = _words(keywords)
    if change == TenantChange():
        raise ValueError("nothing to set; `hotpath tenant set --help` shows what there is")
    found: dict[str, Any] = _ask(where, lambda operations: operations.set_tenant(name, change), change=True)
    return found


# ---- money -----------------------------------------------------------------------------------------------------------


def _level(key: str | None, user: str | None) -> dict[str, str]:
    """Raises ValueError for the empty text: a shell variable that is not set must not mean the tenant itself."""
    for option, given in (("--key", key), ("--user", user)):
        if given == "":
            raise ValueError(f"{option} is empty")
    return {"key": key or "", "user": user or ""}


def show_budget(where: Where, tenant: str, key: str | None = None, user: str | None = None) -> dict[str, Any]:
    """operations.Budget. Raises ValueError."""
    level = _level(key, user)
    found: dict[str, Any] = _ask(where, lambda operations: operations.budget(tenant, **level))
    return found


def set_budget(
    where: Where, tenant: str, limit: str, period: str, key: str | None = None, user: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """Set (or clear, with `none`) a limit; operations.Budget afterwards. Raises ValueError."""
    wanted, level = limits(limit, period), _level(key, user)
    found: dict[str, Any] = _ask(where, lambda operations: operations.set_limits(tenant, wanted, **level), change=True)
    return found


def spend(where: Where, tenant: str, by: str, days: int) -> dict[str, Any]:
    """operations.Spend. Raises ValueError."""
    if by not in get_args(By):
        raise ValueError(f"--by {by}: expected model, key or day")
    kind = cast("By", by)
    found: dict[str, Any] = _ask(where, lambda operations: operations.spend(tenant, kind, days))
    return found
