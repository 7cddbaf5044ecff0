"""One endpoint as the HTTP client sees it: where to connect, and what every request to it begins with."""

from urllib.parse import urlsplit

from msgspec import Struct

from shared.core.translators.base import Headers


class Origin(Struct, frozen=True, kw_only=True):
    """One endpoint as the client sees it. `head` is what every request to it begins with."""

    host: str
    port: int
    tls: bool
    allow_private: bool
    base: str  # path of the base URL
    head: bytes

    @classmethod
    def of(cls, base_url: str, headers: Headers, *, allow_private: bool) -> "Origin":
        """The origin of a base URL that the catalogue has checked; `headers` go with every request."""
        parts = urlsplit(base_url)
        assert parts.hostname is not None
        lines = [("Host", parts.netloc), *headers, ("Accept-Encoding", "identity"), ("User-Agent", "hotpath/1")]
        return cls(
            host=parts.hostname,
            port=parts.port or (443 if parts.scheme == "https" else 80),
            tls=parts.scheme == "https",
            allow_private=allow_private,
            base=parts.path.rstrip("/"),
            head="".join(f"{name}: {value}\r\n" for name, value in lines).encode("latin-1"),
        )

    def request(self, path: str, headers: Headers, body: bytes) -> bytes:
        """The bytes of a POST."""
        own = "".join([f"{name}: {value}\r\n" for name, value in headers])
        start = f"POST {self.base}{path} HTTP/1.1\r\n{own}Content-Length: {len(body)}\r\n"
        return b"".join((start.encode("latin-1"), self.head, b"\r\n", body))
