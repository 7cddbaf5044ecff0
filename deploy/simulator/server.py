"""The simulator as an aiohttp application.

`/v1/...` is the endpoint "default"; `/e/NAME/v1/...` is the same server under another name, so that one process can
stand for several endpoints of a catalogue: the name is in the bill, and faults can be aimed at it.
"""

import asyncio
import hmac
from typing import Final

import msgspec
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from deploy.simulator import wanted
from deploy.simulator.answer import CREATED, Answer
from deploy.simulator.bill import MAX_LINES, PRICES, Line, now_ms
from deploy.simulator.control import DESK, Desk, routes
from deploy.simulator.faults import Fault
from deploy.simulator.player import ClientLeft, Player, error_response, replacement
from deploy.simulator.wanted import Defaults, Refused, Wanted

MAX_BODY: Final = 64 << 20
MAX_LABEL: Final = 256  # characters of an X-Request-ID that are kept

_DEFAULTS: Final = web.AppKey("defaults", Defaults)
_API_KEY: Final = web.AppKey("api_key", str)


def _known(request: web.Request) -> bool:
    wished = request.app[_API_KEY]
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return not wished or hmac.compare_digest(given.encode(), wished.encode())


def _unauthorized(request: web.Request) -> web.Response:
    request.app[DESK].counts.refused += 1
    message = "Incorrect API key provided. You can find your API key in the simulator's command line."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    return error_response(401, {"error": error})


def _fault(desk: Desk, wish: Wanted, endpoint: str, label: str) -> Fault | None:
    """The scripted fault, else the one the prompt asks for."""
    fault = desk.faults.take(wish.model, endpoint, label, wish.stream)
    if fault is None and wish.faults:
        fault = msgspec.convert(wish.faults, Fault)
    desk.counts.struck += fault is not None
    return fault


async def _chat(request: web.Request) -> web.StreamResponse:
    desk = request.app[DESK]
    if not _known(request):
        return _unauthorized(request)
    try:
        wish = wanted.parse(await request.read(), request.app[_DEFAULTS])
    except Refused as refused:
        desk.counts.refused += 1
        return error_response(refused.status, refused.body)
    endpoint = request.match_info.get("endpoint", "default")
    label = request.headers.get("X-Request-ID", "")[:MAX_LABEL]
    fault = _fault(desk, wish, endpoint, label)
    left, transport = False, request.transport
    line = Line(label, wish.model, endpoint, wish.stream, wish.prompt_tokens, wish.cached_tokens)
    desk.enter(transport, stream=wish.stream)
    try:
        return await _answer(request, desk, wish, fault, line)
    except (asyncio.CancelledError, ConnectionError):
        left = True
        raise
    finally:
        line.ended_ms = now_ms()
        desk.leave(transport, left=left)


async def _answer(
    request: web.Request, desk: Desk, wish: Wanted, fault: Fault | None, line: Line
) -> web.StreamResponse:
    if fault is None or fault.bill or not fault.replaces:
        desk.bill.open(line)
    await desk.gate()
    if fault is not None and fault.replaces:
        if fault.delay_ms:
            await asyncio.sleep(fault.delay_ms / 1000)
        return replacement(request, fault)
    if fault is not None and fault.ignore_cap:
        wish.cap = None
    return await Player(request, Answer(wish, line.request_id), line, fault).play()


async def _models(request: web.Request) -> web.Response:
    if not _known(request):
        return _unauthorized(request)
    data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "simulator"} for name in PRICES]
    return web.Response(body=orjson.dumps({"object": "list", "data": data}), content_type="application/json")


@web.middleware
async def _shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors of the framework in the provider's words; a client that left needs no answer."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return error_response(error.status, {"error": {"message": error.reason, "type": "invalid_request_error"}})
    except ClientLeft:
        return web.Response()  # to a closing connection: goes nowhere


def application(defaults: Defaults | None = None, *, api_key: str = "", max_lines: int = MAX_LINES) -> web.Application:
    """A simulator with its own books. An empty `api_key` accepts any."""
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_shape])
    app[DESK] = Desk(max_lines)
    app[_DEFAULTS] = defaults or Defaults()
    app[_API_KEY] = api_key
    for prefix in ("", "/e/{endpoint}"):
        app.router.add_post(prefix + "/v1/chat/completions", _chat)
        app.router.add_get(prefix + "/v1/models", _models)
    app.add_routes(routes())
    return app
