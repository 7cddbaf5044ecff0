"""DIR/secrets.env: what `hotpath up` generates on its first start and keeps (mode 0600)."""

import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: Settings of the processes: one given by the environment is used as it stands and is not kept in the file.
SETTINGS: Final = ("GATEWAY_API_KEY", "KEY_PEPPER", "ADMIN_API_KEY")
#: The roles, each with a NATS user of its own name.
ROLES: Final = ("ingress", "guardian", "routing", "provider")
#: Every user of deploy/nats.conf.
NATS_USERS: Final = ("operator", *ROLES, "loadgen")


def nats_password(user: str) -> str:
    """The name of a NATS user's password."""
    return f"NATS_{user.upper()}_PASSWORD"


#: Passwords of the embedded servers' users.
SERVERS: Final = (*map(nats_password, NATS_USERS), "REDIS_PASSWORD")

_LINE: Final = re.compile(r"([A-Z_]+)=([A-Za-z0-9+/=_-]+)\Z")
_PREFIX: Final = {"GATEWAY_API_KEY": "br_live_demo_"}


def read(path: Path) -> dict[str, str]:
    """NAME=value lines; {} when there is no such file. Raises ValueError on a line of another shape."""
    try:
        text = path.read_text("ascii")
    except FileNotFoundError:
        return {}
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"{path} line {number}: expected NAME=value; delete the file to have a new one")
        found[match[1]] = match[2]
    return found


def ensure(path: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Every secret `up` needs: from `env` where it is set (even if empty: it is then refused), else from the file,
    else new. The file afterwards holds exactly those that `env` does not bring, so that the command line of another
    shell never works with a pepper that the running processes do not use."""
    kept = read(path)
    found = {name: env[name] if name in env else kept.get(name) or _new(name) for name in SETTINGS}
    found |= {name: kept.get(name) or _new(name) for name in SERVERS}
    wanted = {name: value for name, value in found.items() if name not in env or name in SERVERS}
    if wanted != kept:
        write_private(path, "".join(f"{name}={value}\n" for name, value in wanted.items()))
    return found


def _new(name: str) -> str:
    return _PREFIX.get(name, "") + base64.urlsafe_b64encode(os.urandom(33)).decode()


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step; nobody but its owner can ever read it (0600 from the start)."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)
