"""What `hotpath keys|tenant` and the admin API change: tenants, keys, policies. Each change and its announcement are
one transaction, which every process has seen 500 ms later.

(One transaction over two hash tags: the registry wants one Redis, not a cluster. The ledger's scripts do not care.)
"""

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from hiredis import ReplyError
from msgspec import Struct

from shared.state import keys
from shared.state.base import StateUnavailable
from shared.state.books import MAX_AMOUNT
from shared.state.keys import Period
from shared.state.pipeline import Pipeline
from shared.state.policies import (
    KeyChange,
    KeyPolicy,
    TenantChange,
    TenantPolicy,
    key_fields,
    read_key,
    read_tenant,
    tenant_fields,
)
from shared.state.registry import BOOTSTRAP_KEY, DEFAULT_TENANT, KEY_ID_LENGTH, KEY_PREFIX, digest
from shared.state.scripts import load

#: What an operator may call a tenant: it appears in logs and metrics.
TENANT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
_ANNOUNCE: Final = load("announce")
_TIMEOUT: Final = 1.0


class Contrary(ValueError):
    """Well formed, and contrary to what is there."""


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
    policy: KeyPolicy = KeyPolicy()


class TenantInfo(Struct, frozen=True, kw_only=True):
    """One tenant; `created` is ms since 1970, 0 for `default`, which was always there."""

    tenant_id: str
    tenant: str
    synthetic: bool
    created: int
    policy: TenantPolicy


def _opaque() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(KEY_ID_LENGTH))


def _announcement(tenant: str) -> tuple[bytes | str, ...]:
    return (b"EVAL", _ANNOUNCE.text, b"2", keys.REGISTRY_VERSION, keys.REGISTRY_CHANGES, tenant)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _name(tenant: str, fields: Mapping[bytes, bytes]) -> str:
    return tenant if tenant == DEFAULT_TENANT else _text(fields.get(b"name", b""))


def _number(fields: Mapping[bytes, bytes], name: str) -> int:
    text = fields.get(name.encode(), b"0")
    return int(text) if text.isdigit() else 0


def _key_info(tenant: str, key_id: str, fields: Mapping[bytes, bytes]) -> KeyInfo:
    return KeyInfo(
        key_id=key_id,
        tenant_id=tenant,
        tenant=_name(tenant, fields),
        synthetic=fields.get(b"synthetic") == b"1",
        created=_number(fields, f"made:{key_id}"),
        revoked=_number(fields, f"revoked:{key_id}"),
        policy=read_key(fields, key_id)[0],
    )


def _writes(tenant: str, fields: Mapping[str, str | None]) -> list[tuple[bytes | str, ...]]:
    """The commands that write fields of a tenant's config, and delete those that are None."""
    conf = keys.config(tenant)
    return [
        (b"HDEL", conf, name) if value is None else (b"HSET", conf, name, value.encode())
        for name, value in fields.items()
    ]


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
        self,
        tenant_name: str,
        limit: int | None = None,
        period: Period = "month",
        *,
        synthetic: bool = False,
        tenant_limits: Mapping[Period, int] | None = None,
        key_limits: Mapping[Period, int] | None = None,
        change: KeyChange | None = None,
    ) -> NewKey:
        """Make a key, and the tenant with it when the name is new. `limit` (nano-USD) and `tenant_limits` are the
        tenant's, set when given; `key_limits` are the key's own, `change` says what it may do.

        Raises ValueError for a name, period, limit or policy that cannot be, Contrary for a real tenant to be made
        synthetic: its money would be open to direct publishers.
        """
        if not TENANT_NAME.fullmatch(tenant_name):
            raise ValueError(f"a tenant's name is letters, digits, '.', '_' and '-', at most 64: {tenant_name[:80]!r}")
        limits: list[tuple[str, Period, int]] = [] if limit is None else [("t", period, limit)]
        limits += [("t", each, amount) for each, amount in (tenant_limits or {}).items()]
        made = _opaque()
        limits += [(f"k:{made}", each, amount) for each, amount in (key_limits or {}).items()]
        for _, each, amount in (*limits, ("t", period, 0)):
            if each not in keys.PERIODS or not 0 <= amount <= MAX_AMOUNT:
                raise ValueError(f"not a limit: {amount} per {each}")
        policy = key_fields(change or KeyChange(), made)
        tenant = await self._tenant(tenant_name)
        key = KEY_PREFIX.decode() + made + "_" + secrets.token_urlsafe(32)
        now = await self._now()
        conf = keys.config(tenant)
        if synthetic and await self._is_real(conf, tenant):
            raise Contrary(f"{tenant_name} is a real tenant; make one of its own for load tests")
        stored = digest(self._pepper, key.encode()).hex()
        changes: list[tuple[bytes | str | int, ...]] = [
            (b"HSET", conf, "name", tenant_name, f"key:{made}", stored, f"made:{made}", now),
            (b"HSETNX", conf, "created", now),
            (b"HSETNX", keys.REGISTRY_KEYS, made, tenant),
            (b"HSET", keys.REGISTRY_TENANTS, tenant, tenant_name),
            *_writes(tenant, policy),
        ]
        if synthetic:
            changes.append((b"HSET", conf, "synthetic", 1))
        for level, each, amount in limits:  # first: no key is ever good without them
            await self._set_limit(tenant=tenant, period=each, limit=amount, level=level)
        await self._atomically(*changes, _announcement(tenant))
        return NewKey(key=key, key_id=made, tenant_id=tenant)

    async def set_key(self, key_id: str, change: KeyChange) -> bool:
        """Change what a key may do; False when there is none of that id. Raises ValueError (policy)."""
        fields = key_fields(change, key_id)
        tenant = await self.tenant_of(key_id)
        if tenant is None:
            return False
        await self._atomically(*_writes(tenant, fields), _announcement(tenant))
        return True

    async def set_policy(self, tenant: str, change: TenantChange) -> None:
        """Change what holds for a tenant (its id). Raises ValueError (policy)."""
        await self._atomically(*_writes(tenant, tenant_fields(change)), _announcement(tenant))

    async def revoke_key(self, key_id: str) -> bool:
        """Revoke a key everywhere within a second; False when there is none of that id."""
        tenant = await self.tenant_of(key_id)
        if tenant is None or key_id == BOOTSTRAP_KEY:  # that one lives in the settings
            return False
        await self._atomically(
            (b"HSETNX", keys.config(tenant), f"revoked:{key_id}", await self._now()), _announcement(tenant)
        )
        return True

    async def tenant_of(self, key_id: str) -> str | None:
        """The id of the tenant a key belongs to, revoked or not."""
        if key_id == BOOTSTRAP_KEY:
            return DEFAULT_TENANT
        if not keys.OPAQUE.fullmatch(key_id):
            return None
        tenant = await self._pipeline.execute(b"HGET", keys.REGISTRY_KEYS, key_id, within=_TIMEOUT)
        return None if tenant is None else str(tenant.decode())

    async def list_keys(self, tenant: str | None = None) -> list[KeyInfo]:
        """Every key ever made (of the tenant with this id), revoked ones too; not the bootstrap key, which lives in the
        settings."""
        found: list[KeyInfo] = []
        for each, fields in await self._configs(tenant):
            made = [name.removeprefix("key:") for name in map(_text, fields) if name.startswith("key:")]
            found += [_key_info(each, key_id, fields) for key_id in made]
        return sorted(found, key=lambda each: (each.tenant, each.created, each.key_id))

    async def key(self, key_id: str) -> KeyInfo | None:
        """One key, the bootstrap key too."""
        tenant = await self.tenant_of(key_id)
        if tenant is None:
            return None
        ((_, fields),) = await self._configs(tenant)
        return _key_info(tenant, key_id, fields)

    async def list_tenants(self, tenant: str | None = None) -> list[TenantInfo]:
        """Every tenant (or the one with this id), `default` too."""
        found = [
            TenantInfo(
                tenant_id=each,
                tenant=_name(each, fields),
                synthetic=fields.get(b"synthetic") == b"1",
                created=_number(fields, "created"),
                policy=read_tenant(fields)[0],
            )
            for each, fields in await self._configs(tenant)
        ]
        return sorted(found, key=lambda each: each.tenant)

    async def _configs(self, tenant: str | None) -> list[tuple[str, dict[bytes, bytes]]]:
        """Tenant ids with their config hashes: of one, else of all."""
        tenants = [tenant] if tenant else [DEFAULT_TENANT]
        if not tenant:
            stored = await self._pipeline.execute(b"HKEYS", keys.REGISTRY_TENANTS, within=_TIMEOUT)
            tenants += [each for each in map(_text, stored) if each != DEFAULT_TENANT]
        found = []
        for each in tenants:
            flat = await self._pipeline.execute(b"HGETALL", keys.config(each), within=_TIMEOUT)
            found.append((each, dict(zip(flat[::2], flat[1::2], strict=True))))
        return found

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
