"""POST /v1/chat/completions: auth, content type and size, one strict parse, validate, hand over (S1-H4d, D18)."""

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Final, Literal

from aiohttp import web
from msgspec import Struct

from ingress import body as bodies
from ingress import render
from ingress.auth import Auth
from ingress.deliver import Desk, Exchange
from ingress.events import Events
from ingress.middleware import Visit
from ingress.observe import ColdStart, Trace, Traces
from ingress.protocol import Reply
from ingress.sinks import Live, Whole
from shared.core.money import usd_to_nano
from shared.core.stream import Fail, Finish, Limits
from shared.state.base import Principal
from shared.wire import errors, headers
from shared.wire.messages import Ask, ReplyTo, encode
from shared.wire.openai import ChatRequest, parse_chat

Done = Literal["inline", "append", "comment"]
DONE_FORMS: Final[dict[str, Done]] = {"inline": "inline", "append": "append", "comment": "comment"}

_DIGITS: Final = re.compile(r"[0-9]{1,12}\Z")


class Rules(Struct, frozen=True, kw_only=True):
    """The settings a request needs, in seconds and bytes."""

    max_body: int
    body: float  # a body must be complete within this (faults 66)
    max_response: int
    timeout_ms: int
    timeout_streaming_ms: int
    timeout_min_ms: int
    timeout_max_ms: int
    first_token: float
    idle: float
    commit: float
    keepalive: float


class Chat:
    """The chat completions route."""

    def __init__(
        self, *, rules: Rules, auth: Auth, events: Events, models: Mapping[str, object], epoch: int, desk: Desk,
        user_id: Callable[[str, str], str], traces: Traces, cold: ColdStart, ready: Callable[[], None],
    ) -> None:  # fmt: skip
        self._rules = rules
        self._auth = auth
        self._events = events
        self._models = models
        self._epoch = epoch
        self._desk = desk
        self._user_id = user_id  # of a tenant's id and a `user` field
        self._traces = traces
        self._cold = cold
        self._ready = ready  # raises a GatewayFault when a role has no live worker

    async def __call__(self, visit: Visit) -> Reply:
        """Raises HotpathError for what is refused before the hand-over."""
        visit.stages = self._cold.stages()
        request = visit.request
        principal = await self._auth.tenant(request, visit.label)
        visit.door.share(visit, principal.tenant)
        visit.stage("auth")
        bodies.check_type(request)
        body = await bodies.read(visit, self._rules.max_body, self._rules.body)
        visit.stage("read")
        chat = parse_chat(body)
        visit.stage("parse")
        if chat.model not in self._models:
            self._events.unknown_model(request, visit.label, principal.tenant, chat.model)
            raise errors.ModelNotFound(param="model")
        if principal.models and chat.model not in principal.models:
            raise errors.ModelNotFound(param="model")
        timeout_ms = self._timeout_ms(request, chat.stream)
        done = DONE_FORMS.get(request.headers.get(headers.DONE_PAYLOAD, "inline"))
        if done is None:
            raise errors.ClientError(f"{headers.DONE_PAYLOAD} must be one of: {', '.join(DONE_FORMS)}.")
        most = _max_estimate(request)
        self._ready()
        visit.stage("validate")
        return await self._serve(visit, chat, self._ask(visit, principal, chat, timeout_ms, done, most))

    # ---- before the hand-over ----------------------------------------------------------------------------------------

    def _timeout_ms(self, request: web.BaseRequest, stream: bool) -> int:
        """S1-G03: X-Timeout-Ms, clamped; what is not a whole number is refused. Raises ClientError."""
        rules = self._rules
        given = request.headers.get(headers.TIMEOUT_MS)
        if given is None:
            return rules.timeout_streaming_ms if stream else rules.timeout_ms
        if not _DIGITS.match(given):
            raise errors.ClientError(f"{headers.TIMEOUT_MS} must be a whole number of milliseconds.")
        return min(max(int(given), rules.timeout_min_ms), rules.timeout_max_ms)

    def _ask(
        self, visit: Visit, principal: Principal, chat: ChatRequest, timeout_ms: int, done: Done, most: int
    ) -> Ask:
        desk = self._desk
        now = desk.now_ms()
        return Ask(
            rid=visit.rid,
            tenant=principal.tenant,
            key=principal.key,
            reply=ReplyTo("ingress", desk.instance, desk.next_stream()),
            label=visit.label,
            model=chat.model,
            stream=chat.stream,
            include_usage=chat.include_usage,
            max_output=chat.max_output,
            n=chat.n,
            done=done,
            timeout_ms=timeout_ms,
            deadline=now + timeout_ms,
            epoch=self._epoch,
            user=self._user_id(principal.tenant, chat.user) if chat.user else "",
            max_estimate=most,
            body=chat.body,
        )

    # ---- the exchange ------------------------------------------------------------------------------------------------

    async def _serve(self, visit: Visit, chat: ChatRequest, ask: Ask) -> Reply:
        rules = self._rules
        desk = self._desk
        limits = Limits(
            streamed=chat.stream,
            first_token=rules.first_token,
            idle=rules.idle,
            total=ask.timeout_ms / 1000,
            max_bytes=rules.max_response,
        )
        exchange = Exchange(desk, ask, limits, int((desk.clock() - visit.arrived) * 1_000_000))
        sink = self._live(visit, exchange) if chat.stream else Whole()
        try:
            exchange.start(sink)
            visit.stage("hand over")
            end = await exchange.done
        except asyncio.CancelledError:
            exchange.leave()
            self._trace(visit, exchange, None)
            raise
        if visit.stages is not None:
            if exchange.first_at:
                visit.stages.append(("first text", exchange.first_at))
            visit.stage("end")
            self._cold.report(visit.stages, visit.arrived, visit.label, visit.rid)
        self._trace(visit, exchange, end)
        if isinstance(end, Fail) and end.error.code == errors.RateLimited.code:
            self._events.rate_limited(visit.request, visit.label, ask.tenant, ask.key)
        if isinstance(sink, Live):
            return self._streamed(visit, sink, end)
        return self._whole(visit, sink, end)

    def _live(self, visit: Visit, exchange: Exchange) -> Live:
        return Live(
            bodies.connection(visit),
            visit.fields(),
            http10=visit.http10,
            keep=visit.keep,
            done=exchange.ask.done,
            commit=self._rules.commit,
            keepalive=self._rules.keepalive,
            date=visit.door.date,
            leaving=visit.door.is_leaving,
            now=self._desk.clock(),
            notify=exchange,
        )

    @staticmethod
    def _streamed(visit: Visit, sink: Live, end: Finish | Fail) -> Reply:
        """Everything was written already, unless it failed before the first byte."""
        if not sink.started and isinstance(end, Fail):
            return visit.error(end.error, render.br_fields(end.head))
        return Reply(200, b"", keep=sink.keep)

    @staticmethod
    def _whole(visit: Visit, sink: Whole, end: Finish | Fail) -> Reply:
        if isinstance(end, Fail):
            return visit.error(end.error, render.br_fields(end.head or sink.head))
        body = sink.parts[0] if len(sink.parts) == 1 else b"".join(sink.parts)
        return visit.reply(200, body, [("Content-Type", render.JSON), *render.br_fields(sink.head)])

    def _trace(self, visit: Visit, exchange: Exchange, end: Finish | Fail | None) -> None:
        outcome = "client gone" if end is None else end.error.code if isinstance(end, Fail) else "ok"
        self._traces.add(
            Trace(
                rid=visit.rid,
                label=visit.label,
                model=exchange.ask.model,
                outcome=outcome,
                deliveries=exchange.machine.newest,
                ms=(self._desk.clock() - visit.arrived) * 1000,
                hops=encode(() if end is None else end.hops),
            )
        )


def _max_estimate(request: web.BaseRequest) -> int:
    """S2-12: X-BR-Max-Estimated-Cost in nano-USD, -1 when it is not there. Raises ClientError."""
    given = request.headers.getall(headers.MAX_ESTIMATE, ())
    if not given:
        return -1
    try:
        (text,) = given
        return usd_to_nano(text)
    except ValueError as error:
        raise errors.ClientError(
            f"{headers.MAX_ESTIMATE} must be one amount in USD such as 0.05: digits, at most nine after the point."
        ) from error
