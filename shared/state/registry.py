"""Tenants and keys: one source of truth in Redis (D17), a whole copy in every process, a version polled.

A key is `br_live_<key id>_<secret>`. Only HMAC-SHA-256(KEY_PEPPER, key) is stored (D7): keys have 256 random bits, so a
slow password hash would cost milliseconds and protect nothing. GATEWAY_API_KEY is the key `bootstrap` of the tenant
`default`, known to every process from its settings (D16).
"""

import hmac
from collections.abc import Callable
from typing import Any, Final

from hiredis import ReplyError
from msgspec import Struct

from shared.state import keys
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

_TIMEOUT: Final = 1.0
_NOBODY: Final = bytes(32)


class _Record(Struct, frozen=True):
    digest: bytes
    principal: Principal


def digest(pepper: bytes, token: bytes) -> bytes:
    """What is stored of a key (D7)."""
    return hmac.digest(pepper, token, "sha256")


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
        wake: Callable[[], None],
    ) -> None:
        """`pipeline` is not the one of the hot calls (long replies); `wake` makes the poll run now."""
        self._pipeline = pipeline
        self._pepper = pepper.encode()
        self._monotonic = monotonic
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
        self._install(DEFAULT_TENANT, {}, limited=True)  # its limit is not known yet: money fails closed (D4)

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

    def authenticate(self, token: bytes) -> Principal | None:
        """The principal of a key as presented; None when unknown or revoked.

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
        return self._pairs.get((tenant, key))

    async def find(self, tenant: str, key: str) -> Principal | None:
        """As `lookup`, asking Redis once for a pair this copy does not have. Raises StateUnavailable (503)."""
        if (tenant, key) not in self._pairs and keys.OPAQUE.fullmatch(key):
            await self._ask(key.encode())
        return self._pairs.get((tenant, key))

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
        limits = keys.limit_field()
        for first in range(0, len(tenants), AT_ONCE):
            some = tenants[first : first + AT_ONCE]
            commands: list[tuple[bytes, ...]] = []
            for tenant in some:
                commands += [(b"HGETALL", keys.config(tenant)), (b"HGET", keys.balances(tenant), limits)]
            replies = await self._pipeline.many(commands, _TIMEOUT)
            for reply in replies:
                if type(reply) is ReplyError:
                    raise StateUnavailable(f"redis: {reply}")
            for tenant, flat, limit in zip(some, replies[::2], replies[1::2], strict=True):
                # a limit that is not a number limits too: the ledger answers with an error then (D2)
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                self._install(tenant, fields, limited=limit is not None)

    def _forget(self, tenant: str) -> None:
        for known in self._tenants.pop(tenant, []):
            self._keys.pop(known, None)
            self._pairs.pop((tenant, known.decode()), None)

    def _install(self, tenant: str, fields: dict[bytes, Any], *, limited: bool) -> None:
        """Put a tenant as read from its config hash in place of what was known of it."""
        self._forget(tenant)
        default = tenant == DEFAULT_TENANT
        if not fields and not default:
            return
        name = tenant if default else fields.get(b"name", b"").decode()
        synthetic = not default and fields.get(b"synthetic") == b"1"
        known = self._tenants[tenant] = []
        for field, value in fields.items():
            kind, _, made = field.partition(b":")
            if kind != b"key" or b"revoked:" + made in fields:
                continue
            principal = Principal(
                tenant=tenant, key=made.decode(), tenant_name=name, synthetic=synthetic, limited=limited
            )
            self._keys[made] = _Record(bytes.fromhex(value.decode()), principal)
            self._pairs[tenant, made.decode()] = principal
            known.append(made)
        if default:
            principal = Principal(tenant=tenant, key=BOOTSTRAP_KEY, tenant_name=tenant, limited=limited)
            self._bootstrap = _Record(self._bootstrap.digest, principal)
            self._pairs[tenant, BOOTSTRAP_KEY] = principal
