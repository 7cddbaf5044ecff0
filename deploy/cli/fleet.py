"""Decides what `hotpath up` starts: pure but for picking free ports and writing the configuration files."""

import os
import socket
import sys
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from deploy import servers
from deploy.cli import confs
from deploy.cli.credentials import ROLES, nats_password
from deploy.cli.slot import Spec
from deploy.cli.supervise import ORDER, OTHER
from shared.settings import SETTLE_S, Settings
from shared.settings import load as load_settings

#: Keys whose presence means that a real provider is meant.
PROVIDER_KEYS: Final = ("OPENAI_API_KEY",)
#: What stands for a provider's key in the roles that only need to know that there is one.
KEY_ELSEWHERE: Final = "held-by-the-provider-role"
STREAMING: Final = frozenset({"ingress", "provider"})  # roles that hold streams
SERVER_S: Final = 5.0  # for NATS and the simulator, which hold nothing
MARGIN_S: Final = 10.0  # a drain that takes its whole time still closes its connections and ends by itself

#: The sockets handed down to each ingress: the gateway's and the admin API's.
_HANDED: Final = ("HOTPATH_LISTEN_FD", "HOTPATH_ADMIN_FD")

Missing = servers.ServerMissing


@dataclass(kw_only=True)
class Plan:
    """What to start, and what is told about it."""

    specs: list[Spec] = field(default_factory=list)
    url: str
    nats_url: str
    loadgen_nats_url: str
    redis_url: str
    simulator_url: str | None
    admin_url: str
    api_key: str
    api_key_given: bool  # by the environment: then it is the operator's secret, not a demo key to be shown
    admin_key: str
    admin_key_given: bool
    data: Path

    def run_fields(self) -> dict[str, Any]:
        """The fixed part of run.json."""
        names = (
            "url",
            "nats_url",
            "loadgen_nats_url",
            "redis_url",
            "simulator_url",
            "api_key",
            "admin_key",
            "admin_url",
        )
        return {name: getattr(self, name) for name in names}


def wants_simulator(env: Mapping[str, str]) -> bool:
    """Neither a catalogue nor a provider's key is given."""
    return not env.get("HOTPATH_CATALOG") and not any(env.get(name) for name in PROVIDER_KEYS)


def url_of(host: str, port: int) -> str:
    """What a client on this machine uses to reach a listener."""
    if host in {"0.0.0.0", ""}:
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def embedded_nats_url(user: str, secrets: Mapping[str, str], port: int) -> str:
    """The embedded server's URL for one of its users (credentials.NATS_USERS)."""
    return f"nats://{user}:{secrets[nats_password(user)]}@127.0.0.1:{port}"


def nats_setting(role: str) -> str:
    """The setting with the URL of a role's own NATS user."""
    return f"NATS_URL_{role.upper()}"


def role_nats_urls(secrets: Mapping[str, str], port: int) -> dict[str, str]:
    """The embedded server's URLs of the four roles, by setting."""
    return {nats_setting(role): embedded_nats_url(role, secrets, port) for role in ROLES}


def embedded_redis_url(secrets: Mapping[str, str], port: int) -> str:
    """The embedded Valkey's URL."""
    return f"redis://:{secrets['REDIS_PASSWORD']}@127.0.0.1:{port}/0"


def bare(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that has no business with our secrets."""
    return {name: env[name] for name in ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ") if name in env}


def own_env(
    process: str, env: Mapping[str, str], combined: tuple[str, ...], provider_keys: Collection[str]
) -> dict[str, str]:  # fmt: skip
    """What a process of the Procfile is told: of NATS its own role's user, of the providers' keys (the names are
    `provider_keys`) only that they are there, unless it is who uses them.

    One that is not named like a role runs those of WORKER_ROLES (`combined`), or any of the four. NATS_URL (usually the
    operator's) is for those without a user of their own.
    """
    runs = (process,) if process in ROLES else combined or ROLES
    mine = {nats_setting(role) for role in runs}
    found = {name: value for name, value in env.items() if not name.startswith("NATS_URL_") or name in mine}
    if all(found.get(name) for name in mine):
        found.pop("NATS_URL", None)
    if "provider" not in runs:
        found |= {name: KEY_ELSEWHERE for name in provider_keys if found.get(name, "").strip()}
    return found


def provider_keys(catalogue: str) -> set[str]:
    """The variables a catalogue takes its endpoints' keys from; none if it cannot be read: the roles refuse it."""
    try:
        rows = tomllib.loads(Path(catalogue).read_text("utf-8")).get("endpoints", [])
        return {row["api_key_env"] for row in rows if isinstance(row.get("api_key_env"), str)}
    except (OSError, ValueError, AttributeError):
        return set()


def plan(
    *, env: Mapping[str, str], data: Path, secrets: Mapping[str, str], listener: socket.socket, admin: socket.socket,
    roles: Mapping[str, list[str]], scale: Mapping[str, int], simulator: bool,
) -> Plan:  # fmt: skip
    """Servers first, then the simulator and the roles: all are started at once, and the roles wait for what they need.

    Raises ServerMissing, SettingsError, ValueError (a path that cannot stand in a configuration file).
    """
    host, port = listener.getsockname()[:2]
    admin_host, admin_port = admin.getsockname()[:2]
    own = {**env, **{name: secrets[name] for name in ("GATEWAY_API_KEY", "KEY_PEPPER", "ADMIN_API_KEY")}}
    own |= {"HOTPATH_DATA": str(data), "GATEWAY_PORT": str(port), "HOTPATH_LISTEN_FD": str(listener.fileno())}
    own |= {"ADMIN_PORT": str(admin_port), "HOTPATH_ADMIN_FD": str(admin.fileno())}
    settings = load_settings(own)
    result = Plan(
        url=url_of(host, port), nats_url=env.get("NATS_URL", ""), redis_url=env.get("REDIS_URL", ""),
        loadgen_nats_url=env.get("NATS_URL_LOADGEN") or env.get("NATS_URL", ""),
        simulator_url=None, admin_url=url_of(admin_host, admin_port),
        api_key=secrets["GATEWAY_API_KEY"], api_key_given="GATEWAY_API_KEY" in env,
        admin_key=secrets["ADMIN_API_KEY"], admin_key_given="ADMIN_API_KEY" in env, data=data,
    )  # fmt: skip
    if not result.nats_url:
        own |= _add_nats(result, env, secrets, settings)
    if not result.redis_url:
        own["REDIS_URL"] = _add_redis(result, env, secrets)
    if env.get("HOTPATH_CATALOG"):
        own["HOTPATH_CATALOG"] = str(Path(env["HOTPATH_CATALOG"]).resolve())
    elif simulator and wants_simulator(env):
        own["HOTPATH_CATALOG"] = _add_simulator(result, env)
    own |= dict.fromkeys(_HANDED, "-1")
    _add_roles(result, own, (listener.fileno(), admin.fileno()), settings, roles, scale)
    return result


def _log(data: Path, role: str, number: int) -> Path:
    return data / "logs" / f"{role}.{number}.log"


def _add_nats(result: Plan, env: Mapping[str, str], secrets: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The settings that name it, with each role's own user."""
    port = servers.free_port()
    conf = confs.nats_conf(result.data, "127.0.0.1", port, secrets, settings.max_body_bytes)
    result.nats_url = embedded_nats_url("operator", secrets, port)
    result.loadgen_nats_url = embedded_nats_url("loadgen", secrets, port)
    result.specs.append(
        Spec(
            role="nats",
            number=1,
            command=servers.nats_command(conf),
            env=bare(env),
            log=_log(result.data, "nats", 1),
            order=ORDER["nats"],
            grace=SERVER_S,
            probe=partial(servers.wait_port_async, port),
            quiet=True,
        )
    )
    return role_nats_urls(secrets, port)


def _add_redis(result: Plan, env: Mapping[str, str], secrets: Mapping[str, str]) -> str:
    port = servers.free_port()
    conf = confs.redis_conf(result.data, port, secrets["REDIS_PASSWORD"])
    result.redis_url = embedded_redis_url(secrets, port)
    result.specs.append(
        Spec(
            role="redis",
            number=1,
            command=[servers.valkey_binary(), str(conf)],
            env=bare(env),
            log=_log(result.data, "redis", 1),
            order=ORDER["redis"],
            grace=MARGIN_S,
            probe=partial(servers.wait_port_async, port),
            quiet=True,
        )
    )
    return result.redis_url


def _add_simulator(result: Plan, env: Mapping[str, str]) -> str:
    """Its port is chosen here, so that the catalogue can name it before it runs and still after a restart of it."""
    port = servers.free_port()
    result.simulator_url = f"http://127.0.0.1:{port}"
    result.specs.append(
        Spec(
            role="simulator",
            number=1,
            command=[sys.executable, "-m", "deploy.simulator", "--port", str(port)],
            env=bare(env),
            log=_log(result.data, "simulator", 1),
            order=ORDER["simulator"],
            grace=SERVER_S,
        )
    )
    return str(confs.sim_catalog(result.data, result.simulator_url))


def _add_roles(
    result: Plan, env: Mapping[str, str], fds: tuple[int, int], settings: Settings,
    roles: Mapping[str, list[str]], scale: Mapping[str, int],
) -> None:  # fmt: skip
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{env.get('PATH', os.defpath)}"  # noqa: PTH120 - of the venv, not what it links to
    held = provider_keys(env.get("HOTPATH_CATALOG") or settings.hotpath_catalog)
    for role, command in roles.items():
        listens = role == "ingress"
        own = {**own_env(role, env, settings.roles(), held), "PATH": path}
        if listens:
            own |= dict(zip(_HANDED, map(str, fds), strict=True))
        for number in range(1, scale[role] + 1):
            result.specs.append(
                Spec(
                    role=role,
                    number=number,
                    command=command,
                    env=own,
                    log=_log(result.data, role, number),
                    order=ORDER.get(role, OTHER),
                    grace=settings.drain_s(streams=role in STREAMING) + SETTLE_S + MARGIN_S,
                    fds=fds if listens else (),
                    rolls=True,
                )
            )
