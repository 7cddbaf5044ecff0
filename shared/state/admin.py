"""What `hotpath keys|budget` changes: tenants, keys, limits. Each change and its announcement are one transaction.

(One transaction over two hash tags: the registry wants one Redis, not a cluster. The ledger's scripts do not care.)
"""

import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

from hiredis import ReplyError
from msgspec import Struct

from shared.state import keys
from shared.state.base import StateUnavailable
from shared.state.books import MAX_AMOUNT
from shared.state.keys import Period
from shared.state.pipeline import Pipeline
from shared.state.registry import DEFAULT_TENANT, KEY_ID_LENGTH, KEY_PREFIX, digest
from shared.state.scripts import load

#: What an operator may call a tenant: it appears in logs and metrics.
TENANT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
_ANNOUNCE: Final = load("announce")
_TIMEOUT: Final = 1.0


class NewKey(Struct, frozen=True, kw_only=True):
    """A key just made: the only time that `key` is seen."""

    key: str
    key_id: str
    tenant_id: str


class KeyInfo(Struct, frozen=True, kw_only=True):
    """One key as `hotpath keys list` shows it; times are ms since 1970, `revoked` 0 while it is good."""

    key_id: str
    tenant_id: str
    tenant: str
    synthetic: bool
    created: int
    revoked: int = 0


def _opaque() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(KEY_ID_LENGTH))


def _announcement(tenant: str) -> tuple[bytes | str, ...]:
    return (b"EVAL", _ANNOUNCE.text, b"2", keys.REGISTRY_VERSION, keys.REGISTRY_CHANGES, tenant)


async def announce(pipeline: Pipeline, tenant: str) -> None:
    """Tell every process that something of the tenant changed. Raises StateUnavailable."""
    await pipeline.execute(*_announcement(tenant), within=_TIMEOUT)


class Admin:
    """The admin calls. All raise StateUnavailable when Redis does not answer; ask again, each is idempotent enough."""

    def __init__(self, pipeline: Pipeline, *, pepper: str, set_limit: Callable[..., Awaitable[None]]) -> None:
        """`set_limit`: the ledger's, which journals it."""
        self._pipeline = pipeline
        self._set_limit = set_limit
        self._pepper = pepper.encode()

    async def create_key(
        self, tenant_name: str, limit: int | None = None, period: Period = "month", *, synthetic: bool = False
    ) -> NewKey:
        """Make a key, and the tenant with it when the name is new. `limit` (nano-USD) is the tenant's, set when given.

        Raises ValueError for a name, period or limit that cannot be, and for a real tenant to be made synthetic: its
        money would be open to direct publishers.
        """
        if not TENANT_NAME.fullmatch(tenant_name):
            raise ValueError(f"a tenant's name is letters, digits, '.', '_' and '-', at most 64: {tenant_name[:80]!r}")
        if period not in keys.PERIODS or (limit is not None and not 0 <= limit <= MAX_AMOUNT):
            raise ValueError(f"not a limit: {limit} per {period}")
        tenant = await self._tenant(tenant_name)
        made = _opaque()
        key = KEY_PREFIX.decode() + made + "_" + secrets.token_urlsafe(32)
        now = await self._now()
        conf = keys.config(tenant)
        if synthetic and await self._is_real(conf, tenant):
            raise ValueError(f"{tenant_name} is a real tenant; make one of its own for load tests")
        stored = digest(self._pepper, key.encode()).hex()
        changes: list[tuple[bytes | str | int, ...]] = [
            (b"HSET", conf, "name", tenant_name, f"key:{made}", stored, f"made:{made}", now),
            (b"HSETNX", conf, "created", now),
            (b"HSETNX", keys.REGISTRY_KEYS, made, tenant),
            (b"HSET", keys.REGISTRY_TENANTS, tenant, tenant_name),
        ]
        if synthetic:
            changes.append((b"HSET", conf, "synthetic", 1))
        if limit is not None:  # first: no key is ever good without it
            await self._set_limit(tenant=tenant, period=period, limit=limit)
        await self._atomically(*changes, _announcement(tenant))
        return NewKey(key=key, key_id=made, tenant_id=tenant)

    async def revoke_key(self, key_id: str) -> bool:
        """Revoke a key everywhere within a second; False when there is none of that id."""
        if not keys.OPAQUE.fullmatch(key_id):
            return False
        tenant = await self._pipeline.execute(b"HGET", keys.REGISTRY_KEYS, key_id, within=_TIMEOUT)
        if tenant is None:
            return False
        name = tenant.decode()
        await self._atomically(
            (b"HSETNX", keys.config(name), f"revoked:{key_id}", await self._now()), _announcement(name)
        )
        return True

    async def list_keys(self) -> list[KeyInfo]:
        """Every key ever made, revoked ones too; not the bootstrap key, which lives in the settings."""
        flat = await self._pipeline.execute(b"HKEYS", keys.REGISTRY_TENANTS, within=_TIMEOUT)
        found = []
        for tenant in (each.decode() for each in flat):
            pairs = await self._pipeline.execute(b"HGETALL", keys.config(tenant), within=_TIMEOUT)
            texts = [each.decode() for each in pairs]
            fields = dict(zip(texts[::2], texts[1::2], strict=True))
            found += [
                KeyInfo(
                    key_id=key_id,
                    tenant_id=tenant,
                    tenant=fields.get("name", ""),
                    synthetic=fields.get("synthetic") == "1",
                    created=int(fields.get(f"made:{key_id}", 0)),
                    revoked=int(fields.get(f"revoked:{key_id}", 0)),
                )
                for kind, _, key_id in (field.partition(":") for field in fields)
                if kind == "key"
            ]
        return sorted(found, key=lambda each: (each.tenant, each.created, each.key_id))

    async def tenant_by_name(self, name: str) -> str | None:
        """The id of the tenant of that name."""
        if name == DEFAULT_TENANT:
            return DEFAULT_TENANT
        tenant = await self._pipeline.execute(b"HGET", keys.REGISTRY_NAMES, name, within=_TIMEOUT)
        return None if tenant is None else tenant.decode()

    async def _tenant(self, name: str) -> str:
        """The id of a name, made when it is new: of two who make one at once, both get the first's."""
        if name == DEFAULT_TENANT:
            return DEFAULT_TENANT
        await self._pipeline.execute(b"HSETNX", keys.REGISTRY_NAMES, name, _opaque(), within=_TIMEOUT)
        tenant = await self._pipeline.execute(b"HGET", keys.REGISTRY_NAMES, name, within=_TIMEOUT)
        return str(tenant.decode())

    async def _is_real(self, conf: bytes, tenant: str) -> bool:
        created, synthetic = await self._pipeline.execute(b"HMGET", conf, "created", "synthetic", within=_TIMEOUT)
        return tenant == DEFAULT_TENANT or (created is not None and synthetic != b"1")

    async def _now(self) -> int:
        seconds, microseconds = await self._pipeline.execute(b"TIME", within=_TIMEOUT)
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _atomically(self, *commands: tuple[Any, ...]) -> None:
        replies = await self._pipeline.many([(b"MULTI",), *commands, (b"EXEC",)], _TIMEOUT)
        for reply in (*replies, *(replies[-1] if isinstance(replies[-1], list) else ())):
            if type(reply) is ReplyError:
                raise StateUnavailable(f"redis: {reply}")
