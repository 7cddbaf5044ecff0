"""Who asks: Bearer keys only, compared as bytes in constant time (S1-C1d, D7), failures told to the SIEM (S1-R3)."""

import hashlib
import hmac
from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from ingress.events import Events
from shared.state.base import Principal, StateUnavailable
from shared.wire import errors


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

    def __init__(self, registry: Registry, admin_key: str, events: Events, now: Callable[[], int]) -> None:
        """`now`: milliseconds of the shared clock, by which keys expire."""
        self._registry = registry
        self._now = now
        self._admin = hashlib.sha256(admin_key.encode()).digest()
        self._events = events

    async def tenant(self, request: web.BaseRequest, request_id: str) -> Principal:
        """The principal of the request's key.

        Raises ClientError (two Authorization headers), Unauthorized, KeyExpired, RegistryDown (the key is not in our
        copy and Redis cannot be asked: DESIGN 5).
        """
        token = bearer(request)
        principal = self._registry.authenticate(token) if token else None
        if principal is not None:
            return self._unexpired(principal, request, request_id)
        if token:
            try:
                principal = await self._registry.fetch(token)
            except StateUnavailable as error:
                raise errors.RegistryDown from error
            if principal is not None:
                return self._unexpired(principal, request, request_id)
            if not self._registry.fresh:
                raise errors.RegistryDown
        self._events.auth_failure(request, request_id, "key missing" if not token else "key unknown")
        raise errors.Unauthorized

    def _unexpired(self, principal: Principal, request: web.BaseRequest, request_id: str) -> Principal:
        if 0 < principal.expires <= self._now():
            self._events.auth_failure(request, request_id, "key expired")
            raise errors.KeyExpired
        return principal

    def admin(self, request: web.BaseRequest, request_id: str) -> None:
        """Let only the admin key pass (S1-G01). Raises ClientError, Unauthorized."""
        token = bearer(request)
        if not hmac.compare_digest(hashlib.sha256(token).digest(), self._admin):
            self._events.auth_failure(request, request_id, "not the admin key")
            raise errors.Unauthorized("This needs the admin key: Authorization: Bearer <ADMIN_API_KEY>")


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
