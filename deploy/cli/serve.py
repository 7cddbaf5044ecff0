"""`hotpath serve nats|redis|simulator`: one embedded server in the foreground, for deploy/Procfile.dev."""

import os
import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

from deploy import servers
from deploy.cli import confs, credentials
from deploy.cli.fleet import bare
from deploy.cli.where import find
from shared.settings import load as load_settings


def command(what: str, data: str, env: Mapping[str, str]) -> list[str]:
    """The command that serves `what` where NATS_URL, REDIS_URL or SIMULATOR_PORT say, its configuration written.

    Raises ValueError for another name or a URL without a port, ServerMissing without the binary, SettingsError.
    """
    where = find(data, env)
    where.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    if what == "simulator":
        return [sys.executable, "-m", "deploy.simulator", "--port", env.get("SIMULATOR_PORT", "8090")]
    secrets = credentials.ensure(where.data / "secrets.env", env)
    settings = load_settings({**where.env, **secrets})
    if what == "nats":
        host, port = _address(env.get("NATS_URL", ""), "NATS_URL", 4222)
        return servers.nats_command(confs.nats_conf(where.data, host, port, secrets, settings.max_body_bytes))
    if what == "redis":
        _, port = _address(env.get("REDIS_URL", ""), "REDIS_URL", 6379)
        return [servers.valkey_binary(), str(confs.redis_conf(where.data, port, secrets["REDIS_PASSWORD"]))]
    raise ValueError(f"serve {what}: expected nats, redis or simulator")


def _address(url: str, name: str, usual: int) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.hostname not in {None, "127.0.0.1", "localhost", "::1"}:
        raise ValueError(f"{name} names another machine ({parts.hostname}); its server is not started here")
    return "127.0.0.1", parts.port or usual


def run(what: str, data: str) -> None:
    """Become the server."""
    words = command(what, data, os.environ)
    os.execve(words[0], words, bare(os.environ))  # noqa: S606 - our own binary, no shell
