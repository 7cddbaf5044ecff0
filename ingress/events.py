"""What a SIEM is told of clients (S1-R3): bad keys, model names that nobody types by mistake, rate limits."""

import logging
import re
from collections.abc import Callable
from typing import Final

from aiohttp import web

from shared.telemetry.log import security
from shared.wire import errors

#: A flood costs at most this many log lines of an event a second; the rest are counted.
LINES_PER_S: Final = 10
#: Proxies put a handful of addresses there; more is somebody's text.
FORWARDED_SHOWN: Final = 128
#: As the catalogues of real providers name models (D6); anything else as a model is somebody's attempt.
_USUAL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}\Z")


class Events:
    """Tells security events, bounded."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._second = 0
        self._lines: dict[str, int] = {}  # by event, in this second
        self.counts = {"auth_failure": 0, "unusual_model": 0, "rate_limited": 0}

    def auth_failure(self, request: web.BaseRequest, label: str, reason: str) -> None:
        """A request without a valid key; never the key."""
        self._tell("auth_failure", request, label, reason=reason)

    def unknown_model(self, request: web.BaseRequest, label: str, tenant: str, name: str) -> None:
        """A model that is not in the catalogue: told when its name is no name (S1-C3b)."""
        if not _USUAL.match(name):
            self._tell("unusual_model", request, label, tenant=tenant, model=errors.quote(name))

    def rate_limited(self, request: web.BaseRequest, label: str, tenant: str, key: str) -> None:
        """A guardian refused a request for a rate limit, or for the tenant's requests in flight."""
        self._tell("rate_limited", request, label, tenant=tenant, key=key)

    def _tell(self, event: str, request: web.BaseRequest, label: str, **fields: object) -> None:
        self.counts[event] += 1
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._lines.clear()
        lines = self._lines[event] = self._lines.get(event, 0) + 1
        if lines > LINES_PER_S:
            return
        forwarded = request.headers.get("X-Forwarded-For", "")
        security(
            self._log,
            event,
            **fields,
            requestId=label,
            ip=request.remote or "",
            forwarded=errors.quote(forwarded.encode("ascii", "replace").decode(), FORWARDED_SHOWN) if forwarded else "",
            count=self.counts[event],
        )
