"""What bounds one upstream call, how its answer is to be read, and how it ended. Pure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Self

from msgspec import Struct

from shared.core.translators.base import Failure, UpstreamFailure
from shared.wire import errors
from shared.wire.errors import HotpathError
from shared.wire.messages import ErrorBody
from workers.provider.address import OutOfDescriptors
from workers.provider.bounds import EARLY_S, PATIENCE, TIMER_S

if TYPE_CHECKING:
    from shared.settings import Settings

_STREAM: Final = "text/event-stream"
_JSON: Final = ("application/json", "text/json")
_ANSWERS: Final = (
    *_JSON,
    _STREAM,
    "",
    "text/plain",
    "application/octet-stream",
)  # some servers name none, or a wrong one


class Limits(Struct, frozen=True, kw_only=True):
    """Loop times and seconds."""

    blame: float  # loop time: an endpoint silent until then is at fault (bounds.PATIENCE)
    connect_s: float
    head: float  # loop time until which the head must have come
    first_token: float  # loop time
    idle_s: float
    deadline: float  # loop time: the request's own
    drain_s: float
    max_bytes: int

    @classmethod
    def of(cls, settings: "Settings", now: float, deadline: float, *, stream: bool, chain_until: float | None) -> Self:
        """The timers of a call that begins at `now` (L1, S1-L4); `chain_until`: of a further call, when the chain ends.

        A whole answer has no first token: a client that asked for more time than the default gets it, else
        TIMEOUT_OPENAI_MS bounds each call so that another endpoint may still serve."""
        head = now + settings.timeout_openai_ms / 1000
        if not stream and deadline - now > settings.timeout_ms / 1000:
            head = deadline
        first = now + settings.timeout_first_token_ms / 1000
        if chain_until is not None:
            first = min(first, max(chain_until, now))
        patience = settings.timeout_first_token_ms if stream else min(settings.timeout_openai_ms, settings.timeout_ms)
        return cls(
            blame=now + PATIENCE * patience / 1000,
            connect_s=max(0.001, min(settings.timeout_openai_ms / 1000, deadline - now)),
            head=head,
            first_token=first,
            idle_s=settings.timeout_idle_ms / 1000,
            deadline=deadline,
            drain_s=settings.cancel_drain_ms / 1000,
            max_bytes=settings.max_response_bytes,
        )


class Ended(Struct, frozen=True, kw_only=True):
    """How it ended. `body`: a whole answer for the client. `outcome`: for the endpoint's circuit, None = says nothing.

    cut: we ended it, since nothing more is paid for; `error` says so, but to the client it is a good end. billed: the
    upstream accepted it (or may have). complete: everything it wrote was read. readable: and understood, so that
    counting it makes sense. size: bytes of a whole answer that came in part, as announced; 0 for what came whole and
    was no answer, whose size says nothing.
    """

    error: ErrorBody | None = None
    cancelled: bool = False
    cut: bool = False
    retryable: bool = False
    same_endpoint: bool = False
    outcome: bool | None = None
    billed: bool = False
    complete: bool = False
    readable: bool = True
    body: bytes = b""
    size: int = 0


#: Why a stream is cut for which nothing more is paid: no fault of the endpoint, and nothing for another one.
UNPAID: Final = Failure(errors.InsufficientBudget().body(), retryable=False, same_endpoint=False, endpoint_fault=False)
#: Of a call that was not made, since its request's time was up.
TOO_LATE: Final = Ended(error=errors.DeadlineExceeded().body())


def refused(failure: Failure, *, cancelled: bool) -> Ended:
    """Answered with a status other than 200: nothing was generated."""
    return Ended(
        error=failure.error,
        cancelled=cancelled,
        retryable=failure.retryable,
        same_endpoint=failure.same_endpoint,
        outcome=False if failure.endpoint_fault else None,  # a 400 or 429 says nothing (decisions/0011)
    )


def content_length(headers: Mapping[str, str]) -> int:
    """What the answer's head announced; 0 when it did not."""
    value = headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 16 else 0


def failure_of(exc: HotpathError | UpstreamFailure) -> Failure:
    """An answer that cannot be used is the endpoint's fault; another one, or later this one, may do better."""
    if isinstance(exc, UpstreamFailure):
        return exc.failure
    return Failure(exc.body(), retryable=True, same_endpoint=True, endpoint_fault=True)


def late(limits: Limits, now: float, *, silent: bool) -> Failure:
    """The request's own time is up, or its asker gave up. That is the endpoint's fault if it was `silent` and had the
    time it normally has: else one client in a hurry would open the circuit for all (I10)."""
    fault = silent and now >= max(limits.blame, limits.deadline - EARLY_S)
    return Failure(errors.DeadlineExceeded().body(), retryable=False, same_endpoint=False, endpoint_fault=fault)


def slow(limits: Limits, now: float, *, head: bool, begun: bool) -> Failure:
    """The upstream's time is up: for its `head`, the next event of what has `begun`, or a first token. The last is due
    sooner when the chain ends sooner, which is no fault of this endpoint."""
    fault = begun or now >= limits.blame or (head and now >= limits.head)
    return Failure(errors.UpstreamTimeout().body(), retryable=True, same_endpoint=False, endpoint_fault=fault)


def unsent(exc: HotpathError, limits: Limits, now: float) -> Ended:
    """No server has seen the request. What is our fault says nothing of the endpoint's circuit (faults 87)."""
    if isinstance(exc, errors.UpstreamTimeout) and now >= limits.deadline - TIMER_S:
        return Ended(error=errors.DeadlineExceeded().body(), outcome=False if now >= limits.blame else None)
    ours = isinstance(exc, errors.GatewayFault)
    further = not isinstance(exc, OutOfDescriptors)
    return Ended(error=exc.body(), retryable=further, same_endpoint=further, outcome=None if ours else False)


def mode_of(headers: Mapping[str, str], *, stream: bool) -> tuple[str, bool, str]:
    """How the body of a 200 is to be read, whether what it says can be counted, and what is wrong with it.

    sse, whole; json: a whole answer where a stream was asked for; other: nothing to be read.
    """
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        return "other", False, "The provider sent an encoding that was not asked for."
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if stream and kind in _JSON:
        return "json", True, ""
    if kind not in _ANSWERS or (kind == _STREAM and not stream):
        return "other", kind != _STREAM, "The provider sent something that is not an answer."
    return ("sse" if stream else "whole"), True, ""
