"""Where Redis is: a redis://, rediss:// or unix:// URL, parsed once."""

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import parse_qs, unquote, urlsplit

from msgspec import Struct

from shared.state.resp import pack


class Address(Struct, frozen=True, kw_only=True):
    """What a URL says. `str()` shows no credentials."""

    host: str = ""
    port: int = 6379
    path: str = ""  # of a unix socket
    username: str = ""
    password: str = ""
    db: int = 0
    tls: bool = False
    ca_certs: str = ""  # ?ssl_ca_certs=FILE beside the system's
    certfile: str = ""  # ?ssl_certfile= and ?ssl_keyfile=: a client certificate
    keyfile: str = ""

    @classmethod
    def parse(cls, url: str) -> "Address":
        """redis[s]://[user:password@]host[:port][/db], unix://[user:password@]/path[?db=n]. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("a Redis URL begins with redis://, rediss:// or unix://")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        unix = parts.scheme == "unix"
        db = query.get("db", "" if unix else parts.path.strip("/")) or "0"
        if not db.isdecimal():
            raise ValueError("the database of a Redis URL is a number")
        return cls(
            host=parts.hostname or "localhost",
            port=parts.port or 6379,
            path=unquote(parts.path) if unix else "",
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            db=int(db),
            tls=parts.scheme == "rediss",
            ca_certs=query.get("ssl_ca_certs", ""),
            certfile=query.get("ssl_certfile", ""),
            keyfile=query.get("ssl_keyfile", ""),
        )

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Address({self})"

    async def open(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Connect a protocol. Raises OSError (ssl.SSLError is one)."""
        loop = asyncio.get_running_loop()
        if self.path:
            await loop.create_unix_connection(protocol, self.path)
        else:
            await loop.create_connection(protocol, self.host, self.port, ssl=self._tls())

    def greeting(self) -> list[bytes]:
        """Packed commands that a new connection begins with: AUTH and SELECT where needed, else PING."""
        commands: list[tuple[str | int, ...]] = []
        if self.password:
            commands.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        commands.append(("SELECT", self.db) if self.db else ("PING",))
        return [pack(command) for command in commands]

    def _tls(self) -> ssl.SSLContext | None:
        if not self.tls:
            return None
        context = ssl.create_default_context()
        if self.ca_certs:
            context.load_verify_locations(self.ca_certs)
        if self.certfile:
            context.load_cert_chain(self.certfile, self.keyfile or None)
        return context
