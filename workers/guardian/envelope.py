"""A direct publisher's envelope, read as hostile: checked and completed exactly as the ingress would have made it.

Whoever holds the NATS user `loadgen` may publish anything to the admit subject (DESIGN 3). What the ingress takes from
HTTP and checks there is checked here: the ids, the body (the same one parse), the times.
"""

import re
from typing import Final

import msgspec
from msgspec import Struct

from shared.core.users import user_id
from shared.settings import Settings
from shared.wire import openai, subjects
from shared.wire.errors import ClientError, TooLarge
from shared.wire.messages import Ask, Hop

DIRECT_ROLE: Final = "loadgen"  # the only role a direct publisher may be answered as
MAX_DELIVERY: Final = 1000
MAX_STREAM: Final = 2**53  # exact in every language's numbers
MAX_HOPS: Final = 4

RID: Final = re.compile(r"[0-9a-f]{32}\Z")
_LABEL: Final = re.compile(r"[A-Za-z0-9._-]{0,64}\Z")  # X-Request-ID's own rule (bad inputs 78)
_TRACE: Final = re.compile(r"([0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?\Z")  # W3C traceparent


class Times(Struct, frozen=True, kw_only=True):
    """The settings a deadline is made from, in milliseconds."""

    whole: int
    stream: int
    least: int
    most: int

    @classmethod
    def of(cls, settings: Settings) -> "Times":
        """From TIMEOUT_MS, TIMEOUT_STREAMING_MS, TIMEOUT_MIN_MS and TIMEOUT_MAX_MS."""
        return cls(
            whole=settings.timeout_ms,
            stream=settings.timeout_streaming_ms,
            least=settings.timeout_min_ms,
            most=settings.timeout_max_ms,
        )


def is_sane(ask: Ask) -> bool:
    """Whether frames can be addressed by it; a direct publisher whose envelope is not gets no answer."""
    reply = ask.reply
    return (
        reply.role == DIRECT_ROLE
        and subjects.TOKEN.match(reply.instance) is not None
        and 0 <= reply.stream <= MAX_STREAM
        and 1 <= ask.delivery <= MAX_DELIVERY
    )


def complete(ask: Ask, max_body: int, pepper: bytes) -> Ask:
    """The request with its body parsed and what stands in it filled in. Raises ClientError and its kin.

    `pepper`: KEY_PEPPER, under which the body's `user` becomes an opaque id.
    """
    for name, pattern in (("label", _LABEL), ("trace", _TRACE)):
        if pattern.match(getattr(ask, name)) is None:
            raise ClientError(f"{name} must match {pattern.pattern}", param=name)
    if ask.lost and subjects.TOKEN.match(ask.lost) is None:
        raise ClientError("lost must name an instance", param="lost")
    if len(ask.body) > max_body:
        raise TooLarge
    request = openai.parse_chat(ask.body)
    return msgspec.structs.replace(
        ask,
        model=request.model,
        stream=request.stream,
        include_usage=request.include_usage,
        max_output=request.max_output,
        n=request.n,
        user=user_id(pepper, ask.tenant, request.user),
        body=request.body,
    )


def sane_hops(hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
    """The publisher's own hops if they could be hops, else none: they only go back to it, but are bounded."""
    token = subjects.TOKEN
    fits = len(hops) <= MAX_HOPS and all(token.match(hop.role) and token.match(hop.instance) for hop in hops)
    return hops if fits else ()


def deadline(ask: Ask, now: int, times: Times) -> int:
    """The request's own deadline, else now + its own or the default time; never further than TIMEOUT_MAX_MS."""
    if ask.deadline:
        return min(ask.deadline, now + times.most)
    if ask.timeout_ms > 0:
        return now + min(max(ask.timeout_ms, times.least), times.most)
    return now + (times.stream if ask.stream else times.whole)
