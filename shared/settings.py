"""Every setting, once: read from the environment at boot into one frozen Struct, or refused with every fault named.

An empty variable counts as not set. A secret has no default (S1-C1a-c, D16) and never shows in `repr`; URLs show
without their credentials. `describe()` is what `deploy/env.example` is made from, so the two cannot drift apart.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints
from urllib.parse import urlsplit, urlunsplit

import msgspec
from msgspec import Meta, Struct

from shared.core import money

MIN_SECRET: Final = 32  # characters (S1-C1a)
ROLES: Final = ("guardian", "routing", "provider")  # what WORKER_ROLES may name; the ingress is its own process
SECRETS: Final = ("gateway_api_key", "key_pepper", "admin_api_key")

#: After the requests have their answers: settlements that Redis did not take yet are tried for 40 s, which outlasts one
#: frozen for half a minute; then the connections are closed.
SETTLE_S: Final = 43.0

_SECRET: Final = re.compile(r"[A-Za-z0-9+/=_-]+\Z", re.ASCII)  # S1-C1b
_MAKE_ONE: Final = "run `hotpath env`, or: openssl rand -hex 32"
_DAY_MS: Final = 86_400_000

Port = Annotated[int, Meta(ge=0, le=65535)]
Descriptor = Annotated[int, Meta(ge=-1, le=1_000_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Millis = Annotated[int, Meta(ge=0, le=_DAY_MS)]
Timer = Annotated[int, Meta(ge=1, le=_DAY_MS)]
Bytes = Annotated[int, Meta(ge=1024, le=2**31)]


class SettingsError(Exception):
    """The environment is wrong: `errors` has one line for each fault, naming the variable and what to do."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


class Settings(Struct, frozen=True, kw_only=True):
    """The settings of one process; each attribute is the variable's name in lower case. `_ms` are milliseconds."""

    gateway_api_key: Annotated[str, Meta(description="Bootstrap API key of the tenant 'default' (D16).")]
    key_pepper: Annotated[str, Meta(description="HMAC key under which tenants' API keys are stored (D7).")]
    admin_api_key: Annotated[str, Meta(description="Bearer key of the admin calls and of a /metrics open to others.")]

    gateway_host: Annotated[str, Meta(description="Address the ingress listens on.")] = "127.0.0.1"
    gateway_port: Annotated[Port, Meta(description="Port the ingress listens on.")] = 8080
    hotpath_listen_fd: Annotated[Descriptor, Meta(description="Listening socket handed down by `hotpath up`.")] = -1
    admin_host: Annotated[str, Meta(description="Address of the admin API.")] = "127.0.0.1"
    admin_port: Annotated[
        Port, Meta(description="Port of the admin API; 0 = a free one for each ingress (it logs which).")
    ] = 8081
    hotpath_admin_fd: Annotated[Descriptor, Meta(description="Its listening socket, from `hotpath up`.")] = -1
    hotpath_ready_fd: Annotated[Descriptor, Meta(description="Where a role writes its ready line; -1 = nowhere.")] = -1
    hotpath_together: Annotated[bool, Meta(description="Starts with the whole fleet: set by `hotpath up`.")] = False
    hotpath_data: Annotated[str, Meta(description="Folder for what `hotpath up` keeps.")] = ".hotpath"
    hotpath_catalog: Annotated[str, Meta(description="Catalogue of endpoints, models, prices.")] = "deploy/catalog.toml"

    nats_url: Annotated[str, Meta(description="The bus.")] = "nats://127.0.0.1:4222"
    nats_url_ingress: Annotated[str, Meta(description="The bus as the ingress' own user; empty = NATS_URL.")] = ""
    nats_url_guardian: Annotated[str, Meta(description="The bus as the guardian's own user; empty = NATS_URL.")] = ""
    nats_url_routing: Annotated[str, Meta(description="The bus as routing's own user; empty = NATS_URL.")] = ""
    nats_url_provider: Annotated[str, Meta(description="The bus as the provider's own user; empty = NATS_URL.")] = ""
    redis_url: Annotated[str, Meta(description="The shared state (ledger, keys).")] = "redis://127.0.0.1:6379/0"
    state_required: Annotated[bool, Meta(description="Do not start while Redis is away (exit 1).")] = False
    metrics_host: Annotated[str, Meta(description="Address of each process's /metrics.")] = "127.0.0.1"
    metrics_port: Annotated[Port, Meta(description="Its port; 0 = a free one for each process.")] = 0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least level logged.")] = "info"
    worker_roles: Annotated[str, Meta(description="Roles of `python -m workers`, comma-separated.")] = ""

    max_body_bytes: Annotated[Bytes, Meta(description="Largest request body (D16b).")] = 1_048_576
    max_response_bytes: Annotated[Bytes, Meta(description="Largest answer (S1-R5).")] = 134_217_728
    max_in_flight: Annotated[Count, Meta(description="Requests in flight in one process; above it 503.")] = 2500
    max_in_flight_per_tenant: Annotated[
        Count, Meta(description="Of them, one tenant's in one process; above it 429. Streams count until they end.")
    ] = 2000
    max_connections: Annotated[Count, Meta(description="Client connections of one ingress process.")] = 12_000
    client_head_ms: Annotated[Timer, Meta(description="A request's head must be complete within this.")] = 10_000
    client_body_ms: Annotated[Timer, Meta(description="And its body within this: 140 kbit/s at 1 MiB.")] = 60_000
    client_idle_ms: Annotated[Timer, Meta(description="A connection without a request is closed after this.")] = 75_000
    client_stalled_ms: Annotated[Timer, Meta(description="A client that takes nothing is cut after this.")] = 60_000

    timeout_ms: Annotated[Timer, Meta(description="Total time of a whole answer.")] = 30_000
    timeout_streaming_ms: Annotated[Timer, Meta(description="Total time of a stream (S1-L1).")] = 120_000
    timeout_first_token_ms: Annotated[Timer, Meta(description="Time to the first token.")] = 30_000
    timeout_idle_ms: Annotated[Timer, Meta(description="Longest silence of an upstream in mid-stream.")] = 30_000
    timeout_min_ms: Annotated[Timer, Meta(description="Least X-Timeout-Ms; smaller ones are raised to it.")] = 100
    timeout_max_ms: Annotated[Timer, Meta(description="Largest X-Timeout-Ms; larger ones are cut to it.")] = 600_000
    timeout_openai_ms: Annotated[Timer, Meta(description="Connect and response head of one call (S1-L4).")] = 30_000

    fallback_chain_timeout_ms: Annotated[Timer, Meta(description="Total time of the fallback chain (S1-L4).")] = 30_000
    routing_max_retries: Annotated[int, Meta(ge=0, le=8, description="Upstream calls after the first (S1-L4).")] = 2
    routing_retry_backoff_ms: Annotated[
        Millis, Meta(description="Least wait before the same endpoint is called again (S1-L4, S2-06).")
    ] = 500
    circuit_failure_threshold: Annotated[Count, Meta(description="Failures in a row that open it (S2-20).")] = 5
    circuit_min_requests: Annotated[
        Count, Meta(description="Least calls in 60 s whose error rate opens it (S2-20).")
    ] = 10
    circuit_error_rate_percent: Annotated[int, Meta(ge=1, le=100, description="Error rate that opens it (S2-20).")] = 50
    circuit_breaker_cooldown_ms: Annotated[
        Timer,
        Meta(description="How long it stays open (S1-C2b); doubled by each failed probe, up to 16 times (S2-21)."),
    ] = 30_000
    circuit_probe_ms: Annotated[
        Annotated[int, Meta(ge=100, le=5000)],
        Meta(description="While a probe is younger than this, nobody else passes (S1-C2c)."),
    ] = 5000

    handoff_timeout_ms: Annotated[Timer, Meta(description="No Accepted within this: deliver again.")] = 500
    stream_commit_ms: Annotated[Timer, Meta(description="HTTP head of a stream goes out at the latest.")] = 15_000
    keepalive_ms: Annotated[Timer, Meta(description="Silence after which a stream gets a keep-alive.")] = 15_000
    reply_mux_ms: Annotated[Millis, Meta(description="Frames of all streams to one ingress share a message.")] = 2
    budget_min_reservation_usd: Annotated[str, Meta(description="Floor of a reservation in USD (D1).")] = "0.001"
    shutdown_drain_ms: Annotated[Millis, Meta(description="Drain time of whole answers (S1-H5c).")] = 5000
    shutdown_stream_drain_ms: Annotated[Millis, Meta(description="Drain time of streams (D8).")] = 120_000

    ledger_tombstone_ms: Annotated[
        # Whatever stands here, an entry stays until its deadline + grace: until then a duplicate could begin it anew.
        # Beyond that it is remembered for settlements that are tried again (state/behind.py): 20 s leave them 18.
        Annotated[int, Meta(ge=20_000, le=31 * _DAY_MS)], Meta(description="How long a settled entry is remembered.")
    ] = 600_000
    ledger_unconfirmed_ms: Annotated[
        Annotated[int, Meta(ge=1000, le=31 * _DAY_MS)],
        Meta(
            description="A call whose worker died is posted at its upper bound after this; estimated ones are kept as"
            " long, for the provider's bill."
        ),
    ] = 86_400_000
    ledger_lease_grace_ms: Annotated[Millis, Meta(description="A reservation's lease outlives its deadline by.")] = (
        10_000
    )
    ledger_journal_lines: Annotated[
        Annotated[int, Meta(ge=100, le=10_000_000)],
        Meta(
            description="Lines of a tenant's journal between two snapshots; between one and two times as many are kept."
        ),
    ] = 100_000
    ledger_snapshot_ms: Annotated[
        Annotated[int, Meta(ge=100, le=_DAY_MS)],
        Meta(description="A journal that grew gets a snapshot at least this often."),
    ] = 600_000
    usage_retention_ms: Annotated[
        Annotated[int, Meta(ge=1000, le=31 * _DAY_MS)],
        Meta(description="How long JetStream keeps usage records, the second copy of the money."),
    ] = 3_600_000
    usage_max_bytes: Annotated[
        Annotated[int, Meta(ge=65_536, le=2**40)],
        Meta(description="And how many bytes at most; a full stream refuses new ones, which go to the spool."),
    ] = 1_073_741_824
    usage_replicas: Annotated[int, Meta(ge=1, le=5, description="Its copies in a NATS cluster.")] = 1
    spool_dir: Annotated[
        str,
        Meta(description="Where settlements go that neither Redis nor JetStream takes; empty = HOTPATH_DATA/spool."),
    ] = ""
    alert_webhook_url: Annotated[
        str, Meta(description="Where spend alerts are POSTed as JSON (README); https, or see the next one.")
    ] = ""
    alert_webhook_private: Annotated[bool, Meta(description="It may be http, and lead to a private address.")] = False
    cancel_drain_ms: Annotated[Millis, Meta(description="A cancelled call may still bring its usage for this.")] = 250

    @property
    def budget_min_reservation(self) -> int:
        """The floor of a reservation in nano-USD."""
        return money.usd_to_nano(self.budget_min_reservation_usd)

    @property
    def spool(self) -> Path:
        """The folder of the spool."""
        return Path(self.spool_dir) if self.spool_dir else Path(self.hotpath_data) / "spool"

    def drain_s(self, *, streams: bool = True) -> float:
        """Seconds that requests in flight may take after a SIGTERM (D8); `streams`: of a process that holds some."""
        longest = max(self.shutdown_drain_ms, self.shutdown_stream_drain_ms) if streams else self.shutdown_drain_ms
        return longest / 1000

    def nats_url_for(self, role: str) -> str:
        """The URL with the role's own user where one is set, else the common one."""
        own: str = getattr(self, f"nats_url_{role}", "")
        return own or self.nats_url

    def roles(self) -> tuple[str, ...]:
        """WORKER_ROLES, split."""
        return tuple(filter(None, (role.strip() for role in self.worker_roles.split(","))))

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, _shown(name, getattr(self, name))) for name in self.__struct_fields__]

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


def _shown(name: str, value: Any) -> Any:
    if name in SECRETS:
        return "***"
    if name == "alert_webhook_url" and value:  # its path is often the secret
        return urlunsplit(urlsplit(value)._replace(path="/***", query=""))
    if isinstance(value, str) and "_url" in name and "@" in value:
        url = urlsplit(value)
        return urlunsplit(url._replace(netloc=f"***@{url.netloc.rpartition('@')[2]}"))
    return value


def describe() -> list[tuple[str, str | None, str, bool]]:
    """(variable, default or None when it is required, what it is, secret) of every setting, in order."""
    hints = get_type_hints(Settings, include_extras=True)
    return [
        (
            field.name.upper(),
            None if field.default is msgspec.NODEFAULT else str(field.default),
            next(m.description or "" for m in reversed(get_args(hints[field.name])) if isinstance(m, Meta)),
            field.name in SECRETS,
        )
        for field in msgspec.structs.fields(Settings)
    ]


def load(env: Mapping[str, str]) -> Settings:
    """The settings of this environment. Raises SettingsError naming every wrong variable."""
    errors: list[str] = []
    values: dict[str, Any] = {}
    hints = get_type_hints(Settings, include_extras=True)
    for field in msgspec.structs.fields(Settings):
        name, text = field.name, env.get(field.name.upper(), "")
        if name in SECRETS:
            values[name] = text
            errors.extend(_secret_fault(name.upper(), text))
        elif text:
            try:
                values[name] = msgspec.convert(text, hints[name], strict=False)
            except msgspec.ValidationError as exc:
                errors.append(f"{name.upper()}: {exc}; correct it, or leave it out for {field.default!r}")
    if not errors:
        errors.extend(_secrets_differ(values))
        settings = Settings(**values)
        errors.extend(_faults(settings))
    if errors:
        raise SettingsError(errors)
    return settings


def _secret_fault(name: str, text: str) -> Iterator[str]:
    if len(text) < MIN_SECRET:
        found = f"it has {len(text)}" if text else "it is not set"
        yield f"{name} must be at least {MIN_SECRET} characters ({found}; {_MAKE_ONE})"
    elif not _SECRET.match(text):
        yield f"{name} contains invalid characters (allowed: A-Z a-z 0-9 + / = _ -; {_MAKE_ONE})"


def _secrets_differ(values: dict[str, Any]) -> Iterator[str]:
    for index, name in enumerate(SECRETS):
        for other in SECRETS[:index]:
            if values[name] == values[other]:
                yield f"{name.upper()} must differ from {other.upper()} ({_MAKE_ONE})"


def _faults(settings: Settings) -> Iterator[str]:
    """What one variable's type cannot say. Values that may hold credentials are not repeated."""
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if name.startswith("nats_url") and value and not _url_fits(value, ("nats", "tls")):
            yield f"{name.upper()}: expected nats://[user:password@]host:port (or tls://)"
    if not _url_fits(settings.redis_url, ("redis", "rediss")):
        yield "REDIS_URL: expected redis://[user:password@]host:port/number (or rediss://)"
    webhook = ("https", "http") if settings.alert_webhook_private else ("https",)
    url = settings.alert_webhook_url
    if url and not (_url_fits(url, webhook) and _PLAIN_URL.match(url)):
        yield (
            "ALERT_WEBHOOK_URL: expected https://host[:port]/path (no user before the host, escaped where it must be),"
            " or http:// with ALERT_WEBHOOK_PRIVATE=true"
        )
    try:
        floor = settings.budget_min_reservation
    except ValueError as exc:
        yield f"BUDGET_MIN_RESERVATION_USD: {exc}; default '0.001'"
    else:
        if floor == 0:
            yield "BUDGET_MIN_RESERVATION_USD: must be above 0; default '0.001'"
    if settings.timeout_min_ms > settings.timeout_max_ms:
        yield "TIMEOUT_MIN_MS: must not be above TIMEOUT_MAX_MS"
    yield from _role_faults(settings)


def _role_faults(settings: Settings) -> Iterator[str]:
    for role in settings.roles():
        if role not in ROLES:
            yield f"WORKER_ROLES: {role!r} is not a role; use {', '.join(ROLES)}"
    if len(set(settings.roles())) != len(settings.roles()):
        yield "WORKER_ROLES: a role is named twice; run a second process instead"


#: A URL that stands in a request line as it is. Credentials before an @ would be shown, and sent nowhere.
_PLAIN_URL: Final = re.compile(r"[A-Za-z]+://[^@/?#\s]+([/?][!-~]*)?\Z", re.ASCII)


def _url_fits(url: str, schemes: tuple[str, ...]) -> bool:
    """Whether it has one of the schemes and a host, and its port is a port."""
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme in schemes and bool(parts.hostname) and port_fits
