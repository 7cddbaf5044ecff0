"""Where NATS is: the servers that a NATS_URL names."""

from typing import Final
from urllib.parse import unquote, urlsplit

from msgspec import Struct

_PORT: Final = 4222


class Server(Struct, frozen=True):
    """One server of NATS_URL. `login` is what CONNECT says of the user."""

    host: str
    port: int
    tls: bool
    login: dict[str, str]

    def __repr__(self) -> str:
        return f"Server({self.host}:{self.port})"  # without the login


def parse_url(url: str) -> list[Server]:
    """`nats://user:password@host:port`, `tls://...`, `nats://token@host`; several with commas. Raises ValueError."""
    return [_server(part.strip()) for part in url.split(",")]


def _server(url: str) -> Server:
    parts = urlsplit(url)
    if parts.scheme not in {"nats", "tls"} or not parts.hostname:
        raise ValueError("a NATS URL looks like nats://user:password@host:4222 (or tls://...)")
    login: dict[str, str] = {}
    if parts.username is not None:
        user = unquote(parts.username)
        login = {"auth_token": user} if parts.password is None else {"user": user, "pass": unquote(parts.password)}
    return Server(parts.hostname, parts.port or _PORT, parts.scheme == "tls", login)
