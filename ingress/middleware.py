"""The door: every request passes here once, whatever its path (S1-H1, S1-H4d, S1-H5).

One wrapper in place of a stack of middlewares: request id, in-flight bound and drain, route, error shape, metrics.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Final, cast

from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.web_protocol import RequestPayloadError

from ingress import render
from ingress.observe import Tally
from ingress.protocol import Connection, Reply
from shared.core.overload import Queue, Shares
from shared.wire import errors, headers
from shared.wire.messages import ErrorBody

#: What a client may call its request (S1-H1a); anything else is replaced by our own id.
_LABEL: Final = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
#: RFC 9112 3.2: a Host that could name two servers is refused before it can be read in two ways (faults 62).
_HOST: Final = re.compile(r"[A-Za-z0-9._~%!$&'()*+;=\[\]:-]*\Z")
#: nginx's status for a client that left: in the metrics only, nobody is there to read it.
GONE: Final = 499
#: What may be refused without being parsed, and what of its head must be seen for that: a good label (1), the length
#: (2), or anything else about the connection, the label or the body. Two lengths or a coding are for the parser.
_CHAT: Final = "/v1/chat/completions"
_PLAIN: Final = b"POST /v1/chat/completions HTTP/1.1\r\n"
_TELLING: Final = re.compile(
    rb"\n(?i:x-request-id:[ \t]*([A-Za-z0-9._-]{1,64})[ \t]*(?=\r\n)|(content-length:)"
    rb"|x-request-id|content-length|transfer-encoding|connection|expect|upgrade)"
)
#: Methods no resource has (faults 68).
_NEVER: Final = frozenset({"TRACE", "CONNECT", "PRI"})


class Visit:
    """One request on its way through the ingress."""

    __slots__ = ("arrived", "door", "http10", "keep", "label", "path", "request", "rid", "route", "stages", "tenant",
                 "work")  # fmt: skip

    def __init__(self, door: "Door", request: web.BaseRequest) -> None:
        self.door = door
        self.request = request
        self.arrived = time.monotonic()
        self.rid = secrets.token_hex(16)
        self.label = self.rid
        self.path = ""
        self.route = "other"
        self.http10 = request.version < HttpVersion11
        self.keep = request.keep_alive and not door.leaving
        self.work = True  # counts as in flight
        self.tenant = ""  # whose share it counts in
        self.stages: list[tuple[str, float]] | None = None  # of the first three requests (S0-03)

    def stage(self, name: str) -> None:
        """A stage ended."""
        if self.stages is not None:
            self.stages.append((name, time.monotonic()))

    def fields(self) -> list[tuple[str, str]]:
        """The header fields of every answer."""
        return [(headers.REQUEST_ID, self.label), (headers.BR_REQUEST_ID, self.rid)]

    def reply(self, status: int, body: bytes, fields: render.Fields) -> Reply:
        """A whole answer."""
        unread = not self.request.content.is_eof()
        keep = self.keep and not self.door.leaving
        if unread and "Expect" in self.request.headers:  # whether the body still comes is the client's choice now, so
            keep = False  # what it sends next could be that body or a request (RFC 9110 10.1.1)
        named = [*self.fields(), *fields, ("Content-Length", str(len(body)))]
        top = render.head(status, named, self.door.date(), http10=self.http10, keep=keep)
        if self.request.method == "HEAD":
            return Reply(status, top, keep=keep)
        linger = not keep and unread
        if len(body) > 65_536:  # joining would copy it once more
            return Reply(status, top, body, keep=keep, linger=linger)
        return Reply(status, top + body, keep=keep, linger=linger)

    def json(self, body: bytes) -> Reply:
        """A 200 with JSON."""
        return self.reply(200, body, [("Content-Type", render.JSON)])

    def error(self, error: ErrorBody, extra: render.Fields = ()) -> Reply:
        """An error in the OpenAI shape."""
        return self.reply(error.status, errors.render(error), [*render.error_fields(error), *extra])


Route = Callable[[Visit], Awaitable[Reply]]


class Door:
    """Calls the route of each request and turns whatever it raises into an answer."""

    unknown = errors.NotFound.message  # to who asks for a path that there is not

    def __init__(self, *, max_in_flight: int, per_tenant: int, tally: Tally) -> None:
        self._routes: dict[str, dict[str, Route]] = {}
        self._prefixes: list[tuple[str, dict[str, Route], str]] = []
        self._names: dict[str, str] = {}
        self._public: set[str] = set()
        self._max = max_in_flight
        self._shares = Shares(per_tenant)
        self.queue = Queue()
        self._tally = tally
        self._date = ""
        self._date_at = 0.0
        self._busy = b""  # the answer to what is not parsed, as of `_busy_date`
        self._busy_date = ""
        self._idle: asyncio.Future[None] | None = None
        self.in_flight = 0
        self.draining = False  # new requests are refused
        self.leaving = False  # every answer is its connection's last

    def add(self, method: str, path: str, route: Route, *, prefix: bool = False, public: bool = False) -> None:
        """A route. `prefix`: the rest of the path belongs to it. `public`: answered while draining and when full."""
        table = self._routes.setdefault(path, {})
        table[method] = route
        if method == "GET":
            table["HEAD"] = route
        if prefix and not any(known == path for known, _, _ in self._prefixes):
            self._prefixes.append((path, table, path + "*"))
        if public:
            self._public.add(path)

    def is_leaving(self) -> bool:
        """Whether an answer that begins now is its connection's last."""
        return self.leaving

    def date(self) -> str:
        """The Date field, made once a second (RFC 9110 6.6.1)."""
        now = time.monotonic()
        if now - self._date_at >= 1.0:
            self._date_at = now
            self._date = formatdate(usegmt=True)
        return self._date

    def crowded(self) -> bool:
        """Whether the request just read may have to be refused: nothing of it should be parsed then. One that leaves
        says more in its answers than `answer_unparsed` does."""
        return (self.queue.stands or self.in_flight >= self._max) and not self.draining and not self.leaving

    def answer_unparsed(self, data: bytes) -> bytes:
        """The 503 for `data`, one whole request, without reading more of it than must be; b"": it is to be parsed.

        A fifth of what a refusal costs by way of the parser, so that a flood of them leaves time for work. Only for
        the plainest requests: what says anything about its connection goes the long way.
        """
        if not data.startswith(_PLAIN):
            return b""
        label, lengths = b"", 0
        for found in _TELLING.finditer(data, len(_PLAIN) - 1, data.find(b"\r\n\r\n") + 2):
            if found[2] is not None:
                lengths += 1
            elif found[1] is None or label:
                return b""
            else:
                label = found[1]
        if lengths != 1 or (self.in_flight < self._max and not self.queue.turn_is_full()):
            return b""
        rid = secrets.token_hex(16).encode()
        if self._busy_date != self.date():
            self._busy_date = self._date
            self._busy = _overloaded(self._date)
        self._tally.count(_CHAT, errors.Overloaded.status, 0.0)
        return self._busy % (label or rid, rid)

    async def __call__(self, request: web.BaseRequest) -> Reply:
        """The handler aiohttp calls."""
        visit = Visit(self, request)
        entered = False
        try:
            route = self._find(visit)
            if visit.work:
                self._enter(visit)
                entered = True
            reply = await route(visit)
        except errors.HotpathError as error:
            reply = visit.error(error.body(), _allow(self._allowed(visit), error))
        except RequestPayloadError:
            visit.keep = False
            reply = visit.error(errors.ClientError("The request body is not framed as HTTP/1.1 asks.").body())
        except asyncio.CancelledError:  # the client is gone
            self._tally.count(visit.route, GONE, time.monotonic() - visit.arrived)
            raise
        finally:
            if entered:
                self._leave(visit)
        self._tally.count(visit.route, reply.status, time.monotonic() - visit.arrived)
        return reply

    def refuse(self, error: errors.HotpathError) -> Reply:
        """The answer to what never became a request."""
        body = errors.render(error.body())
        rid = secrets.token_hex(16)
        fields = [
            (headers.REQUEST_ID, rid),
            *render.error_fields(error.body()),
            ("Content-Length", str(len(body))),
        ]
        self._tally.count("refused", error.status, 0.0)
        return Reply(
            error.status, render.head(error.status, fields, self.date(), keep=False) + body, keep=False, linger=True
        )

    def share(self, visit: Visit, tenant: str) -> None:
        """The visit is this tenant's from now on. Raises TenantBusy."""
        if not self._shares.take(tenant):
            raise errors.TenantBusy
        visit.tenant = tenant

    async def emptied(self) -> None:
        """Return once nothing is in flight."""
        while self.in_flight:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _find(self, visit: Visit) -> Route:
        """Label, host, path, method. Raises ClientError, NotFound, MethodNotAllowed."""
        request = visit.request
        given = request.headers.getall(headers.REQUEST_ID, ())
        if len(given) == 1 and _LABEL.match(given[0]):
            visit.label = given[0]
        host = request.headers.get("Host", "")
        if not _HOST.match(host):
            raise errors.ClientError("The Host header is not valid.")
        if request.method in _NEVER:
            visit.keep = False
            raise errors.MethodNotAllowed
        visit.path = _path(request.raw_path, host)
        table = self._table(visit)
        if table is None:
            raise errors.NotFound(self.unknown)
        visit.work = visit.path not in self._public
        route = table.get(request.method)
        if route is None:
            raise errors.MethodNotAllowed
        return route

    def _table(self, visit: Visit) -> "dict[str, Route] | None":
        table = self._routes.get(visit.path)
        if table is not None and not visit.path.endswith("/"):
            visit.route = visit.path
            return table
        for prefix, routes, name in self._prefixes:
            if visit.path.startswith(prefix) and len(visit.path) > len(prefix):
                visit.route = name
                return routes
        return None

    def _allowed(self, visit: Visit) -> str:
        table = self._table(visit) if visit.path else None
        return ", ".join(sorted(table)) if table else ""

    def _enter(self, visit: Visit) -> None:
        """Before anything of the request is looked at. Raises ShuttingDown (S1-H5b), Overloaded."""
        if self.draining:
            raise errors.ShuttingDown
        connection = cast("Connection", visit.request.protocol)
        since, connection.since = connection.since or visit.arrived, 0.0
        if not self.queue.begin(since, visit.arrived) or self.in_flight >= self._max:
            raise errors.Overloaded
        self.in_flight += 1

    def _leave(self, visit: Visit) -> None:
        self.in_flight -= 1
        if visit.tenant:
            self._shares.give(visit.tenant)
        if not self.in_flight and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
            self._idle = None


def _overloaded(date: str) -> bytes:
    """The whole answer, with places for the label and the id."""
    error = errors.Overloaded().body()
    body = errors.render(error)
    fields = [
        (headers.REQUEST_ID, "%b"),
        (headers.BR_REQUEST_ID, "%b"),
        *render.error_fields(error),
        ("Content-Length", str(len(body))),
    ]
    return render.head(error.status, fields, date) + body.replace(b"%", b"%%")


def _path(target: str, host: str) -> str:
    """The path of the request target as sent: nothing is decoded or normalised, nothing can be smuggled (faults 67).

    Raises ClientError for an absolute target that names another host than the Host header (faults 62).
    """
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        authority, slash, path = rest.partition("/")
        if not separator or scheme.lower() not in {"http", "https"}:
            return ""
        if authority.lower() != host.lower():
            raise errors.ClientError("The request target and the Host header name different hosts.")
        target = slash + path
    return target.partition("?")[0]


def _allow(methods: str, error: errors.HotpathError) -> render.Fields:
    return [("Allow", methods)] if methods and isinstance(error, errors.MethodNotAllowed) else []
