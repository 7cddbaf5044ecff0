"""Tenants and keys: one source of truth in Redis (D17), a whole copy in every process, a version polled.

A key is `br_live_<key id>_<secret>`. Only HMAC-SHA-256(KEY_PEPPER, key) is stored (D7): keys have 256 random bits, so a
slow password hash would cost milliseconds and protect nothing. GATEWAY_API_KEY is the key `bootstrap` of the tenant
`default`, known to every process from its settings (D16).

Policies are read as policies.py says: what is damaged fails towards safety.
"""

import hmac
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from hiredis import ReplyError
from msgspec import Struct

from shared.state import keys, policies
from shared.state.base import Principal, StateUnavailable
from shared.state.pipeline import Pipeline

DEFAULT_TENANT: Final = "default"
BOOTSTRAP_KEY: Final = "bootstrap"

KEY_PREFIX: Final = b"br_live_"
KEY_ID_LENGTH: Final = 12
KEY_LENGTH: Final = 64  # prefix 8, id 12, underscore, 43 characters of secret (32 bytes in base64)

#: Longer tokens are refused by their length alone, so that a 1 MB one costs no hashing (faults 72).
MAX_TOKEN: Final = 256
#: Tenants loaded in one pipelined write (S0-06).
AT_ONCE: Final = 50
#: The copy counts as fresh while the last answered poll is younger (three polls).
FRESH_S: Final = 1.5
#: Unknown key ids remembered, and for how long: a client that keeps sending one costs one look-up a second.
UNKNOWN_KEPT: Final = 4096
UNKNOWN_S: Final = 1.0
#: Look-ups of unknown keys under way at once.
FETCHES: Final = 32

_log: Final = logging.getLogger("hotpath.state")

_TIMEOUT: Final = 1.0
_NOBODY: Final = bytes(32)


class _Record(Struct, frozen=True):
    digest: bytes
    principal: Principal


def digest(pepper: bytes, token: bytes) -> bytes:
    """What is stored of a key (D7)."""
    return hmac.digest(pepper, token, "sha256")


def _live(tenant: str, fields: Mapping[bytes, bytes]) -> list[str]:
    """The ids of a tenant's keys that were not revoked."""
    made = [field[4:].decode("ascii", "replace") for field in fields if field.startswith(b"key:")]
    live = [key for key in made if keys.OPAQUE.fullmatch(key) and f"revoked:{key}".encode() not in fields]
    return [*live, BOOTSTRAP_KEY] if tenant == DEFAULT_TENANT else live


def _digest(text: bytes) -> bytes:
    """A stored digest; empty for what is none."""
    try:
        found = bytes.fromhex(text.decode())
    except ValueError:
        return b""
    return found if len(found) == len(_NOBODY) else b""


def _limits(tenant: str, fields: Mapping[bytes, bytes]) -> tuple[bytes, ...]:
    """The command that reads what `_install` wants to know of the limits."""
    of_keys = [keys.limit_field(f"k:{key}") for key in _live(tenant, fields)]
    return b"HMGET", keys.balances(tenant), keys.USERS, keys.limit_field(), *of_keys


def key_id(token: bytes) -> bytes:
    """The public id inside a key, empty for what is not one of ours."""
    if len(token) == KEY_LENGTH and token.startswith(KEY_PREFIX) and token[20:21] == b"_":
        return token[8:20]
    return b""


class RedisRegistry:
    """`base.Registry`. `State` polls it; `fetch` and `find` are the lazy path for a key made just now (S0-07)."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        pepper: str,
        bootstrap_key: str,
        monotonic: Callable[[], float],
        now: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        """`pipeline` is not the one of the hot calls (long replies); `now` is the shared clock, by which keys expire;
        `wake` makes the poll run now."""
        self._pipeline = pipeline
        self._pepper = pepper.encode()
        self._monotonic = monotonic
        self._now = now
        self.refresh_soon: Final = wake
        self._version = -1
        self._answered = float("-inf")
        self._keys: dict[bytes, _Record] = {}
        self._pairs: dict[tuple[str, str], Principal] = {}
        self._tenants: dict[str, list[bytes]] = {}
        self._unknown: dict[bytes, float] = {}
        self._fetching = 0
        self._bootstrap = _Record(
            digest(self._pepper, bootstrap_key.encode()),
            Principal(tenant=DEFAULT_TENANT, key=BOOTSTRAP_KEY, tenant_name=DEFAULT_TENANT),
        )
        self._install(DEFAULT_TENANT, {}, None)  # its limit is not known yet: money fails closed (D4)

    @property
    def ready(self) -> bool:
        """Loaded at least once."""
        return self._version >= 0

    @property
    def fresh(self) -> bool:
        """Whether Redis answered a poll lately: an unknown key is then really unknown (401), else 503 (DESIGN 5)."""
        return self._monotonic() - self._answered < FRESH_S

    @property
    def unknown(self) -> int:
        """Keys asked for in vain and remembered for a moment."""
        return len(self._unknown)

    def knows(self, tenant: str) -> bool:
        """Whether this is a tenant of ours, as far as this copy goes."""
        return tenant in self._tenants

    def tenants(self) -> list[str]:
        """The ids of all tenants: what the idle sweep walks."""
        return list(self._tenants)

    def name_of(self, tenant: str) -> str:
        """The tenant's name, its id when it is not known or has no key."""
        keys_of = self._tenants.get(tenant)
        return self._pairs[tenant, keys_of[0].decode()].tenant_name if keys_of else tenant

    def authenticate(self, token: bytes) -> Principal | None:
        """The principal of a key as presented; None when unknown or revoked. The ingress looks at its expiry itself,
        to say so (401 `expired_api_key`).

        Always one HMAC and two comparisons of 32 bytes, known id or not (D7, S1-C1d).
        """
        if len(token) > MAX_TOKEN:
            return None
        presented = digest(self._pepper, token)
        record = self._keys.get(key_id(token))
        known = hmac.compare_digest(presented, record.digest if record else _NOBODY)
        if hmac.compare_digest(presented, self._bootstrap.digest):
            return self._bootstrap.principal
        return record.principal if record and known else None

    def lookup(self, tenant: str, key: str) -> Principal | None:
        """The principal by ids: what guardian and provider check an envelope against."""
        principal = self._pairs.get((tenant, key))
        if principal is not None and 0 < principal.expires <= self._now():
            return None  # as one that was revoked
        return principal

    def expired(self, tenant: str, key: str) -> bool:
        """Whether `lookup` has none because the key's time is over."""
        return (tenant, key) in self._pairs and self.lookup(tenant, key) is None

    async def find(self, tenant: str, key: str) -> Principal | None:
        """As `lookup`, asking Redis once for a pair this copy does not have. Raises StateUnavailable (503)."""
        if (tenant, key) not in self._pairs and keys.OPAQUE.fullmatch(key):
            await self._ask(key.encode())
        return self.lookup(tenant, key)

    async def fetch(self, token: bytes) -> Principal | None:
        """As `authenticate`, asking Redis once for a key id this copy does not have. Raises StateUnavailable (503)."""
        principal, wanted = self.authenticate(token), key_id(token)
        if principal is not None or not wanted or wanted in self._keys:
            return principal
        await self._ask(wanted)
        return self.authenticate(token)

    async def _ask(self, wanted: bytes) -> None:
        """Load the tenant of a key id, if there is one; ids without are remembered for a while."""
        if self._unknown.get(wanted, 0.0) > self._monotonic():
            return
        if self._fetching >= FETCHES:
            raise StateUnavailable("too many unknown keys are being looked up")
        self._fetching += 1
        try:
            tenant = await self._pipeline.execute(b"HGET", keys.REGISTRY_KEYS, wanted, within=_TIMEOUT)
            if tenant is not None:
                await self._load([tenant.decode()])
        finally:
            self._fetching -= 1
        if wanted not in self._keys:
            if len(self._unknown) >= UNKNOWN_KEPT:
                self._unknown.clear()
            self._unknown[wanted] = self._monotonic() + UNKNOWN_S

    async def poll(self) -> None:
        """Read what changed since the last poll; all at first, or after Redis lost data. Raises StateUnavailable."""
        version = int(await self._pipeline.execute(b"GET", keys.REGISTRY_VERSION, within=_TIMEOUT) or 0)
        if version != self._version:
            if 0 <= self._version < version:
                since = b"(%d" % self._version
                changed = await self._pipeline.execute(
                    b"ZRANGEBYSCORE", keys.REGISTRY_CHANGES, since, b"+inf", within=_TIMEOUT
                )
                await self._load([tenant.decode() for tenant in changed])
            else:
                await self._load_all()
            self._version = version
            self._unknown.clear()
        self._answered = self._monotonic()

    async def _load_all(self) -> None:
        names = await self._pipeline.execute(b"HKEYS", keys.REGISTRY_TENANTS, within=_TIMEOUT)
        tenants = [name.decode() for name in names]
        for gone in self._tenants.keys() - {*tenants, DEFAULT_TENANT}:
            self._forget(gone)
        await self._load([DEFAULT_TENANT, *(tenant for tenant in tenants if tenant != DEFAULT_TENANT)])

    async def _load(self, tenants: list[str]) -> None:
        for first in range(0, len(tenants), AT_ONCE):
            some = tenants[first : first + AT_ONCE]
            found = await self._many([(b"HGETALL", keys.config(tenant)) for tenant in some])
            configs = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in found]
            # the limits after the keys: a key is never made before its limits
            asked = [_limits(tenant, config) for tenant, config in zip(some, configs, strict=True)]
            limits = await self._many(asked)
            for tenant, config, values in zip(some, configs, limits, strict=True):
                self._install(tenant, config, values)

    async def _many(self, commands: list[tuple[bytes, ...]]) -> list[Any]:
        replies = await self._pipeline.many(commands, _TIMEOUT)
        for reply in replies:
            if type(reply) is ReplyError:
                raise StateUnavailable(f"redis: {reply}")
        return replies

    def _forget(self, tenant: str) -> None:
        for known in self._tenants.pop(tenant, []):
            self._keys.pop(known, None)
            self._pairs.pop((tenant, known.decode()), None)

    def _install(self, tenant: str, fields: dict[bytes, bytes], limits: list[bytes | None] | None) -> None:
        """Put a tenant as read from its config hash in place of what was known of it.

        `limits`: how many of its users have one, its own, and each live key's as far as they are there (not one of them
        is parsed: a limit that is not a number limits too, the ledger answers with an error then, D2). None: unknown.
        """
        self._forget(tenant)
        default = tenant == DEFAULT_TENANT
        if not fields and not default:
            return
        live = _live(tenant, fields)
        users, own, *of_keys = limits or (b"", b"", *(b"" for _ in live))
        # which user a request names is known to the ledger alone: while it is away, any of them may have a limit
        limited = own is not None or users not in {None, b"0"}
        policy, damaged = policies.read_tenant(fields)
        name = tenant if default else fields.get(b"name", b"").decode("utf-8", "replace")
        common = Principal(
            tenant=tenant, key="", tenant_name=name,
            synthetic=not default and fields.get(b"synthetic") == b"1",
            mode=policy.mode, pii=policy.pii, keywords=policy.keywords, clamp=policy.clamp,
            tenant_rpm=policy.rpm, tenant_tpm=policy.tpm,
        )  # fmt: skip
        self._tenants[tenant] = []
        for key, limit in zip(live, of_keys, strict=True):
            of_key, more = policies.read_key(fields, key)
            principal = msgspec.structs.replace(
                common, key=key, limited=limited or limit is not None, key_rpm=of_key.rpm, key_tpm=of_key.tpm,
                expires=policies.GONE_BY if policy.closed else of_key.expires, models=of_key.models,
            )  # fmt: skip
            damaged += more + self._keep(principal, fields)
        if damaged:
            _log.error("damaged fields count as the strictest", extra={"tenant": tenant, "fields": damaged})

    def _keep(self, principal: Principal, fields: Mapping[bytes, bytes]) -> list[str]:
        """Know a key from now on; the name of its field when that is damaged: it is then no key."""
        tenant, key = principal.tenant, principal.key
        if (tenant, key) == (DEFAULT_TENANT, BOOTSTRAP_KEY):
            self._bootstrap = _Record(self._bootstrap.digest, principal)
        else:
            stored = _digest(fields[b"key:" + key.encode()])
            if not stored:
                return [f"key:{key}"]
            self._keys[key.encode()] = _Record(stored, principal)
            self._tenants[tenant].append(key.encode())
        self._pairs[tenant, key] = principal
        return []
