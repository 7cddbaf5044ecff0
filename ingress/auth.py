"""Who asks: Bearer keys only, compared as bytes in constant time (S1-C1d, D7), failures told to the SIEM (S1-R3)."""

import hashlib
import hmac
import logging
from collections.abc import Callable
from typing import Final, Protocol

from aiohttp import web

from shared.state.base import Principal, StateUnavailable
from shared.telemetry.log import security
from shared.wire import errors

#: A flood of bad keys costs at most this many log lines a second; the rest are counted.
LINES_PER_S: Final = 10
#: Proxies put a handful of addresses there; more is somebody's text.
FORWARDED_SHOWN: Final = 128


class Registry(Protocol):
    """What is asked of the registry of tenants and keys (shared/state/registry.py)."""

    @property
    def ready(self) -> bool:
        """Loaded at least once."""

    @property
    def fresh(self) -> bool:
        """Whether Redis answered lately."""

    def authenticate(self, token: bytes) -> Principal | None:
        """From this process's copy."""

    async def fetch(self, token: bytes) -> Principal | None:
        """Asking Redis once. Raises StateUnavailable."""


class Auth:
    """Authenticates requests."""

    def __init__(self, registry: Registry, admin_key: str, log: logging.Logger, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._admin = hashlib.sha256(admin_key.encode()).digest()
        self._log = log
        self._clock = clock
        self._second = 0
        self._lines = 0
        self.failures = 0

    async def tenant(self, request: web.BaseRequest, request_id: str) -> Principal:
        """The principal of the request's key.

        Raises ClientError (two Authorization headers), Unauthorized, RegistryDown (the key is not in our copy and
        Redis cannot be asked: DESIGN 5).
        """
        token = bearer(request)
        principal = self._registry.authenticate(token) if token else None
        if principal is not None:
            return principal
        if token:
            try:
                principal = await self._registry.fetch(token)
            except StateUnavailable as error:
                raise errors.RegistryDown from error
            if principal is not None:
                return principal
            if not self._registry.fresh:
                raise errors.RegistryDown
        self._failed(request, request_id, "key missing" if not token else "key unknown")
        raise errors.Unauthorized

    def admin(self, request: web.BaseRequest, request_id: str) -> None:
        """Let only the admin key pass (S1-G01). Raises ClientError, Unauthorized."""
        token = bearer(request)
        if not hmac.compare_digest(hashlib.sha256(token).digest(), self._admin):
            self._failed(request, request_id, "not the admin key")
            raise errors.Unauthorized("This needs the admin key: Authorization: Bearer <ADMIN_API_KEY>")

    def _failed(self, request: web.BaseRequest, request_id: str, reason: str) -> None:
        """One security event, never the key."""
        self.failures += 1
        second = int(self._clock())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > LINES_PER_S:
            return
        forwarded = request.headers.get("X-Forwarded-For", "")
        security(
            self._log,
            "auth_failure",
            reason=reason,
            requestId=request_id,
            ip=request.remote or "",
            forwarded=errors.quote(forwarded.encode("ascii", "replace").decode(), FORWARDED_SHOWN) if forwarded else "",
            failures=self.failures,
        )


def bearer(request: web.BaseRequest) -> bytes:
    """The token of the Authorization header, b"" when there is none. Raises ClientError when there are two headers."""
    values = request.headers.getall("Authorization", ())
    if not values:
        return b""
    if len(values) > 1:
        raise errors.ClientError("Send one Authorization header, not several.")
    scheme, _, token = values[0].partition(" ")
    if scheme != "Bearer" and scheme.lower() != "bearer":
        return b""
    return token.strip(" ").encode("utf-8", "surrogateescape")
