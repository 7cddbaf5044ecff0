"""Every Redis key and field name of the shared state, once; lua/_balances.lua composes the same balance fields.

Keys carry opaque ids only, never a string of a client's (D6). All keys of one script share one hash tag.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

Period = Literal["day", "month", "lifetime"]
PERIODS: Final[tuple[Period, ...]] = ("day", "month", "lifetime")

#: Ids that may stand in a key: what the registry makes, and what NATS subjects and hash tags leave alone.
OPAQUE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

TENANT_LEVEL: Final = "t"

# the registry: read by all, written by the admin calls
REGISTRY_VERSION: Final = b"hp:{registry}:version"  # string, counts changes
REGISTRY_CHANGES: Final = b"hp:{registry}:changes"  # zset: tenant id -> version of its last change
REGISTRY_TENANTS: Final = b"hp:{registry}:tenants"  # hash: tenant id -> name
REGISTRY_NAMES: Final = b"hp:{registry}:names"  # hash: name -> tenant id
REGISTRY_KEYS: Final = b"hp:{registry}:keys"  # hash: key id -> tenant id

#: String: the token of who reconciles; one at a time, since what is forgotten is put right by what the journal says.
RECONCILE: Final = b"hp:{registry}:reconcile"

CIRCUITS: Final = b"hp:{circuits}"  # hash: version, and <endpoint>:<field>; lua/circuit.lua says what they are
CIRCUITS_VERSION: Final = b"version"
CIRCUIT_FIELDS: Final = (b"failures", b"until", b"openings", b"probes", b"probing", b"window")


def _tag(tenant: str) -> str:
    """The tenant's hash tag. Raises ValueError for what is not an opaque id: it could name another tenant's keys."""
    if not OPAQUE.fullmatch(tenant):
        raise ValueError(f"not a tenant id: {tenant[:80]!r}")
    return f"hp:{{{tenant}}}"


def balances(tenant: str) -> bytes:
    """Hash: <level>:<bucket> -> "settled pending unconfirmed", <level>:limit -> "day month lifetime", nano-USD."""
    return f"{_tag(tenant)}:bal".encode()


def entries(tenant: str) -> bytes:
    """Hash: rid (16 bytes) -> entry (msgpack; lua/_balances.lua says its shape)."""
    return f"{_tag(tenant)}:ent".encode()


def leases(tenant: str) -> bytes:
    """Zset: rid (16 bytes) -> server ms when the entry is next due."""
    return f"{_tag(tenant)}:lease".encode()


def journal(tenant: str) -> bytes:
    """Stream: r: rid, l: a line (msgpack; lua/_balances.lua says its shape)."""
    return f"{_tag(tenant)}:journal".encode()


def rates(tenant: str) -> bytes:
    """Hash: t and k:<key id> -> token buckets and velocity (msgpack; lua/_rated.lua)."""
    return f"{_tag(tenant)}:rate".encode()


def costs(tenant: str) -> bytes:
    """Hash: the cost tracker (lua/learn.lua says its shape)."""
    return f"{_tag(tenant)}:cost".encode()


def seen(tenant: str) -> bytes:
    """Hash: <instance>:<page> -> a bit for each batch of usage records of that process (lua/learn.lua)."""
    return f"{_tag(tenant)}:seen".encode()


def late(tenant: str) -> bytes:
    """Zset: <rid>.<number> of each call that a guardian posted -> ms (lua/learn.lua)."""
    return f"{_tag(tenant)}:late".encode()


def ledger(tenant: str) -> tuple[bytes, ...]:
    """The keys of every ledger script, in order."""
    return balances(tenant), entries(tenant), leases(tenant), journal(tenant), rates(tenant)


def config(tenant: str) -> bytes:
    """Hash: name, synthetic (0|1), created (ms), key:<id> -> HMAC in hex, made:<id> and revoked:<id> -> ms;
    and the policies of policies.py."""
    return f"{_tag(tenant)}:conf".encode()


#: Field of the balances: how many users have a limit.
USERS: Final = b"users"


def limit_field(level: str = TENANT_LEVEL) -> bytes:
    """Field of a level's three limits in the balances."""
    return f"{level}:limit".encode()


def balance_field(level: str, bucket: str) -> bytes:
    """Field of a level's balance in a bucket."""
    return f"{level}:{bucket}".encode()


def bucket(period: Period, now: int) -> str:
    """The bucket of a period at `now` (ms): 2026-11-21, 2026-11 or lifetime."""
    if period == "lifetime":
        return "lifetime"
    date = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=now)).date().isoformat()
    return date if period == "day" else date[:7]
