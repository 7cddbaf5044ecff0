"""`hotpath env`: what honcho (or any Procfile runner) needs in its .env."""

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from deploy import servers
from deploy.cli import confs, credentials, fleet
from deploy.cli.where import find
from shared.settings import load as load_settings

NATS_PORT: Final = 4222
REDIS_PORT: Final = 6379
SIMULATOR_PORT: Final = 8090
GATEWAY_PORT: Final = 8080
ADMIN_PORT: Final = 8081

#: Passed through from the environment where they are set.
_GIVEN: Final = (
    "HOTPATH_CATALOG",
    "OPENAI_API_KEY",
    "GATEWAY_HOST",
    "ADMIN_HOST",
    "WORKER_ROLES",
    "METRICS_HOST",
    "LOG_LEVEL",
)


def free(port: int) -> bool:
    """Whether nobody listens on 127.0.0.1:port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def _port(usual: int) -> int:
    return usual if free(usual) else servers.free_port()


def lines(data: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables: secrets (generated where missing), the servers' URLs with each role's user, the gateway's port,
    the catalogue. With a running `hotpath up` on the directory they name its servers; else URLs that are given, else
    the embedded servers of deploy/Procfile.dev."""
    env = os.environ if env is None else env
    where = find(data, env)
    directory = where.data
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    secrets = credentials.ensure(directory / "secrets.env", env)
    found = {name: secrets[name] for name in credentials.SETTINGS}
    found["HOTPATH_DATA"] = str(directory)
    found |= {name: env[name] for name in _GIVEN if env.get(name)}
    found["GATEWAY_PORT"] = env.get("GATEWAY_PORT") or str(_port(GATEWAY_PORT))
    found["ADMIN_PORT"] = env.get("ADMIN_PORT") or str(_port(ADMIN_PORT))
    if where.run is not None:
        found |= _nats(env.get("NATS_URL") or where.run["nats_url"], secrets)
        found["REDIS_URL"] = where.run["redis_url"]
    else:
        nats_url = env.get("NATS_URL") or fleet.embedded_nats_url("operator", secrets, _port(NATS_PORT))
        found |= _nats(nats_url, secrets)
        found["REDIS_URL"] = env.get("REDIS_URL") or fleet.embedded_redis_url(secrets, _port(REDIS_PORT))
    found |= {name: env[name] for name in env if name.startswith("NATS_URL_")}
    if env.get("HOTPATH_CATALOG"):
        found["HOTPATH_CATALOG"] = str(Path(env["HOTPATH_CATALOG"]).resolve())
    elif fleet.wants_simulator(env):
        found |= _simulator(directory, None if where.run is None else where.run["simulator_url"])
    # honcho runs commands through a shell: `python` and `hotpath` are to be those of this environment.
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return found


def of_role(found: Mapping[str, str], role: str) -> dict[str, str]:
    """Of those what one role needs: no other role's NATS user, and the providers' keys for the providers only.

    Raises ValueError for what is no role.
    """
    if role not in credentials.ROLES:
        raise ValueError(f"--role {role}: expected {', '.join(credentials.ROLES)}")
    keys = fleet.provider_keys(load_settings(dict(found)).hotpath_catalog)
    return fleet.own_env(role, found, (), keys)


def _nats(url: str, secrets: Mapping[str, str]) -> dict[str, str]:
    """NATS_URL, and for the embedded server each role's own user beside the operator (whom the commands
    use, `hotpath serve nats` too); a server of one's own as it was given."""
    parts = urlsplit(url)
    ours = (parts.username, parts.password) == ("operator", secrets[credentials.nats_password("operator")])
    return {"NATS_URL": url, **(fleet.role_nats_urls(secrets, parts.port or NATS_PORT) if ours else {})}


def _simulator(directory: Path, running: str | None) -> dict[str, str]:
    """The running simulator's catalogue as it stands, else one for the simulator of deploy/Procfile.dev."""
    if running:
        return {"HOTPATH_CATALOG": str(directory / "catalog.toml")}
    port = _port(SIMULATOR_PORT)
    path = confs.sim_catalog(directory, f"http://127.0.0.1:{port}")
    return {"HOTPATH_CATALOG": str(path), "SIMULATOR_PORT": str(port)}
