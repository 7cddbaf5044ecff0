"""From a request to its operation, and back (S1-G01, D7)."""

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from ingress import body as bodies
from ingress.admin import openapi
from ingress.admin.operations import OPERATIONS, PARAMETERS, Operation
from ingress.admin.resources import Resources
from ingress.auth import Auth
from ingress.middleware import Door, Route, Visit
from ingress.observe import Tally
from ingress.protocol import Reply
from shared.state.admin import Contrary
from shared.state.base import StateUnavailable
from shared.state.books import MAX_AMOUNT
from shared.state.operations import Missing
from shared.wire import errors, strict

#: A thousand keywords of 128 characters, four bytes each, and room for JSON.
MAX_BODY: Final = 768 * 1024
#: The whole body must have come within this.
BODY_S: Final = 10.0
#: Requests at once: an operator and a few dashboards. Redis is shared with the money.
MAX_IN_FLIGHT: Final = 32

_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_SHOWN: Final = 300  # characters of a reason
_json: Final = msgspec.json.Encoder().encode


class Router(Door):
    """The front door with paths that have parameters; every one of them is for the admin key only."""

    unknown = "Unknown path. GET /openapi.json lists what there is."

    def __init__(self, resources: Resources, auth: Auth, tally: Tally, changed: Callable[[], None]) -> None:
        """`changed` is called after each change: this process need not wait for its poll."""
        super().__init__(max_in_flight=MAX_IN_FLIGHT, per_tenant=MAX_IN_FLIGHT, tally=tally)
        self._resources = resources
        self._auth = auth
        self._changed = changed
        self._document = b""
        self._templates: list[tuple[re.Pattern[str], str, dict[str, Route]]] = []
        for operation in OPERATIONS:
            self._add(operation.method, operation.path, self._route(operation))
        self._add("GET", "/openapi.json", self._openapi)

    def _add(self, method: str, template: str, route: Route) -> None:
        pattern = _pattern(template)
        for known, _, table in self._templates:
            if known == pattern:
                table[method] = route
                return
        self._templates.append((pattern, f"admin {template}", {method: route}))

    def _table(self, visit: Visit) -> dict[str, Route] | None:
        for pattern, name, table in self._templates:
            if pattern.fullmatch(visit.path):
                visit.route = name
                return table
        return None

    def _allowed(self, visit: Visit) -> str:
        visit.path = (
            visit.path or visit.request.raw_path.partition("?")[0]
        )  # a method no resource has was refused first
        return super()._allowed(visit)

    def _route(self, operation: Operation) -> Route:
        pattern = _pattern(operation.path)
        does: Callable[..., Awaitable[Any]] = getattr(self._resources, operation.does)

        async def route(visit: Visit) -> Reply:
            self._auth.admin(visit.request, visit.label)
            match = pattern.fullmatch(visit.path)
            assert match is not None
            words: list[Any] = [*match.groups()]
            given = _query(visit.request.raw_path)
            if operation.query is not None:
                words.append(_convert(given, operation.query, text=True))
            elif given:
                raise errors.ClientError("This takes no query.")
            if operation.body is not None:
                bodies.check_type(visit.request)
                sent = await bodies.read(visit, MAX_BODY, BODY_S)
                words.append(_convert(_whole(strict.parse(sent)), operation.body))
            answer = await _done(does(*words))
            if operation.method != "GET":
                self._changed()
            return visit.reply(operation.status, _json(answer), [("Content-Type", "application/json")])

        return route

    async def _openapi(self, visit: Visit) -> Reply:
        self._auth.admin(visit.request, visit.label)
        if not self._document:
            self._document = openapi.render()
        return visit.json(self._document)


def _whole(value: Any) -> Any:
    """JSON knows numbers only: 5.0 and 5e0 are the integer 5 (JSON Schema, "integer"). What a double does not hold
    exactly stays what it is, and is refused."""
    if type(value) is dict:
        return {name: _whole(each) for name, each in value.items()}
    if type(value) is list:
        return [_whole(each) for each in value]
    return int(value) if type(value) is float and value.is_integer() and abs(value) <= MAX_AMOUNT else value


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(
        _PARAMETER.sub(
            lambda found: f"({PARAMETERS[found[1]][0]})", re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        )
    )


def _query(target: str) -> dict[str, str]:
    """The query of a request target. Raises ClientError for what is none, or names something twice."""
    text = target.partition("?")[2]
    if not text:
        return {}
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=8)
    except ValueError as error:
        raise errors.ClientError("The query is not valid: name=value pairs, in UTF-8.") from error
    found = dict(pairs)
    if len(found) != len(pairs):
        raise errors.ClientError("The query names something twice.")
    return found


def _convert(given: dict[str, Any], to: type[Any], *, text: bool = False) -> Any:
    """The Struct in it; `text`: numbers are written as text. Raises ClientError."""
    try:
        return msgspec.convert(given, to, strict=not text)
    except msgspec.ValidationError as error:
        raise errors.ClientError(str(error)[:_SHOWN]) from error


async def _done(work: Awaitable[Any]) -> Any:
    """Its result. Raises NotFound, Conflict, ClientError, RegistryDown."""
    try:
        return await work
    except Missing as error:
        raise errors.NotFound(f"T{str(error)[1:]}.") from error
    except Contrary as error:
        raise errors.Conflict(f"{error}.") from error
    except ValueError as error:
        raise errors.ClientError(f"{str(error)[:_SHOWN]}.") from error
    except StateUnavailable as error:
        raise errors.RegistryDown("Redis does not answer; nothing may have been changed. Ask again.") from error
