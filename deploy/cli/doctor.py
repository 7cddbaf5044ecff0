"""`hotpath doctor`: what is wrong on this machine or with what runs on it, and what to do about it."""

import asyncio
import json
import platform
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Literal

from deploy import servers
from deploy.cli import envfile
from deploy.cli.confs import ENVELOPE
from deploy.cli.credentials import ROLES
from deploy.cli.http import get
from deploy.cli.where import Where
from shared.catalog import CatalogError
from shared.catalog import load as load_catalog
from shared.settings import SECRETS, Settings, SettingsError
from shared.settings import load as load_settings
from shared.telemetry.metrics import loopback

#: Python versions the lock file is made for.
PYTHONS: Final = ((3, 11), (3, 13))

#: Seconds a server has to answer the doctor.
PATIENCE_S: Final = 2.0
#: Script flags (allow-oom) came with 7.0.
OLDEST_REDIS: Final = 7

Check = dict[str, str]


def _check(name: str, state: Literal["ok", "warn", "fail"], found: str, do: str = "") -> Check:
    return {"name": name, "state": state, "found": found, "do": do}


def examine(where: Where) -> dict[str, Any]:
    """{"checks": [{"name", "state": ok|warn|fail, "found", "do"}]}."""
    checks = [_python(), *_binaries()]
    settings, told = _settings(where)
    checks += told
    if settings is not None:
        checks += _catalogue(where)
        checks += asyncio.run(_running(where, settings))
    return {"checks": checks}


def _python() -> Check:
    version = sys.version_info[:2]
    if version < PYTHONS[0]:
        return _check("python", "fail", platform.python_version(), "install Python 3.11 or newer")
    if version > PYTHONS[1]:
        return _check("python", "warn", f"{platform.python_version()}: newer than what is tested (3.11 to 3.13)")
    return _check("python", "ok", platform.python_version())


def _binaries() -> Iterator[Check]:
    places: tuple[tuple[str, Callable[[], str]], ...] = (
        ("nats-server", servers.nats_binary),
        ("valkey-server", servers.valkey_binary),
    )
    for name, place in places:
        try:
            yield _check(name, "ok", place())
        except servers.ServerMissing as exc:
            yield _check(name, "warn", "not installed", str(exc))


def _settings(where: Where) -> tuple[Settings | None, list[Check]]:
    """The settings; secrets that nobody has made yet are no fault: `hotpath up` makes them."""
    missing = [name.upper() for name in SECRETS if not where.env.get(name.upper())]
    stand_in = {name: f"{name}_".ljust(40, "x") for name in missing}
    try:
        settings = load_settings({**where.env, **stand_in})
    except SettingsError as exc:
        return None, [_check("settings", "fail", error, "correct it: deploy/env.example") for error in exc.errors]
    if missing:
        do = "`hotpath up` generates them; for your own runner: hotpath env > .env"
        return settings, [_check("secrets", "warn", f"not set: {', '.join(missing)}", do)]
    return settings, [_check("settings", "ok", "valid")]


def _catalogue(where: Where) -> Iterator[Check]:
    path = where.catalogue()
    try:
        catalog = load_catalog(path, where.env)
    except (CatalogError, OSError) as exc:
        yield _check("catalogue", "fail", f"{path}: {exc}", "correct it, or set HOTPATH_CATALOG")
        return
    found = f"{path}: {len(catalog.models)} models on {len(catalog.endpoints)} endpoints"
    if catalog.models:
        yield _check("catalogue", "ok", found)
    else:
        yield _check("catalogue", "warn", found, "no endpoint has its key: set one, or `hotpath up` uses its simulator")
    for endpoint in catalog.left_out:
        yield _check(f"endpoint {endpoint}", "warn", f"left out: {catalog.why[endpoint]}", "set its key to use it")


async def _running(where: Where, settings: Settings) -> list[Check]:
    checks: list[Coroutine[Any, Any, list[Check]]] = [
        _gateway(where, settings),
        _admin(where, settings),
        _nats(where, settings),
        _redis(settings),
    ]
    return [check for found in await asyncio.gather(*checks) for check in found]


async def _gateway(where: Where, settings: Settings) -> list[Check]:
    if where.run is None:
        port = settings.gateway_port
        if envfile.free(port):
            return [_check("gateway", "warn", f"not running; port {port} is free", "hotpath up")]
        return [_check("gateway", "warn", f"port {port} is taken", "stop what listens there, or: hotpath up --port N")]
    url = where.run["url"]
    status, body = await get(url, "/ready")
    if status == 200:
        return [_check("gateway", "ok", f"{url} is ready")]
    if not status:
        return [_check("gateway", "fail", f"{url} does not answer", f"hotpath up, or delete {where.data}/run.json")]
    return [_check("gateway", "fail", f"{url}/ready says {status}: {_short(body)}", f"look into {where.data}/logs")]


async def _admin(where: Where, settings: Settings) -> list[Check]:
    """Whether the admin API answers, and whom it lets in."""
    name = "admin API"
    if where.run is None:
        if settings.admin_port and not envfile.free(settings.admin_port):
            do = "stop what listens there, or set ADMIN_PORT"
            return [_check(name, "warn", f"port {settings.admin_port} is taken", do)]
        return []
    url = where.run.get("admin_url", "")
    status, _ = await get(url, "/openapi.json", settings.admin_api_key)
    if status != 200:
        return [_check(name, "fail", f"{url} says {status or 'nothing'}", f"look into {where.data}/logs")]
    if not loopback(settings.admin_host):
        return [_check(name, "warn", f"{url} is open to other machines", "put TLS in front, or ADMIN_HOST=127.0.0.1")]
    return [_check(name, "ok", f"{url} answers")]


def _short(body: bytes) -> str:
    try:
        return json.dumps(json.loads(body))[:200]
    except ValueError:
        return body[:200].decode("utf-8", "replace")


async def _nats(where: Where, settings: Settings) -> list[Check]:
    """Asked with nats-py, not with our own client: a fault that only one of them has is then told apart."""
    import nats  # noqa: PLC0415 - 0.26 s, and only the doctor's run needs it

    async def quiet(_error: Exception) -> None:
        """It is raised as well."""

    try:
        async with asyncio.timeout(PATIENCE_S):
            client = await nats.connect(settings.nats_url, allow_reconnect=False, error_cb=quiet)
            payload = client.max_payload
            await client.close()
    except (nats.errors.Error, OSError, TimeoutError, ValueError) as exc:
        return [_not_there("nats", str(exc) or "does not answer", where, "NATS_URL")]
    need = settings.max_body_bytes + ENVELOPE
    if payload < need:
        do = f"raise max_payload to {need}, or lower MAX_BODY_BYTES"
        return [_check("nats", "fail", f"max_payload is {payload}, below MAX_BODY_BYTES + {ENVELOPE}", do)]
    return [_check("nats", "ok", f"answers; max_payload {payload}"), _users(where, settings)]


def _users(where: Where, settings: Settings) -> Check:
    own = [role for role in ROLES if settings.nats_url_for(role) != settings.nats_url]
    if len(own) == len(ROLES):
        return _check("nats users", "ok", "a user per role")
    if where.run is not None and where.run["loadgen_nats_url"] != where.run["nats_url"]:
        return _check("nats users", "ok", "embedded: operator, loadgen, a user per role")
    without = ", ".join(role for role in ROLES if role not in own)
    do = "give each role its own: NATS_URL_GUARDIAN=nats://user:password@host ...; deploy/nats.conf has the allow-lists"
    return _check("nats users", "warn", f"no user of their own: {without}", do)


def _not_there(name: str, why: str, where: Where, setting: str) -> Check:
    if where.run is not None:
        return _check(name, "fail", why, f"look into {where.data}/logs")
    return _check(name, "warn", why, f"`hotpath up` starts one; for your own set {setting}")


async def _redis(settings: Settings) -> list[Check]:
    """Asked with redis-py, for the same reason."""
    from redis.asyncio import Redis  # noqa: PLC0415 - 0.18 s, and only the doctor's run needs it
    from redis.exceptions import RedisError  # noqa: PLC0415

    client = Redis.from_url(settings.redis_url, socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S)
    try:
        async with client:
            version = str((await client.info("server"))["redis_version"])
            config = {name: (await client.config_get(name))[name] for name in ("maxmemory-policy", "appendonly")}
    except (RedisError, OSError, KeyError) as exc:
        do = "`hotpath up` starts one; for your own set REDIS_URL, and let its user run INFO and CONFIG GET"
        return [_check("redis", "warn", str(exc), do)]
    if int(version.partition(".")[0]) < OLDEST_REDIS:
        do = "run Redis 7 or newer, or Valkey: the ledger's scripts carry flags that older ones do not know"
        return [_check("redis", "fail", f"version {version}", do)]
    checks = [_check("redis", "ok", "answers")]
    if config["maxmemory-policy"] != "noeviction":
        found = f"maxmemory-policy is {config['maxmemory-policy']}: budgets may be evicted"
        checks.append(_check("redis eviction", "fail", found, "CONFIG SET maxmemory-policy noeviction"))
    if config["appendonly"] != "yes":
        found = "no append-only file: a restart of Redis forgets the ledger"
        checks.append(_check("redis aof", "fail", found, "CONFIG SET appendonly yes"))
    return checks
