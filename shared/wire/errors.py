"""Every error a client can get: one class each, with its HTTP status, OpenAI `type` and `code`.

    HotpathError
     +- ClientError     the request is wrong; sending it again changes nothing
     +- UpstreamError   the provider failed or refused
     +- GatewayFault    we cannot serve it now; `retry_after_ms` says when to come back

Messages are safe to show: no secret, no upstream URL, no client text beyond a bounded, quoted name.
`body()` is the wire form (`messages.ErrorBody`); `render()` the JSON of the OpenAI surface.
"""

import re
from typing import ClassVar, Final

import msgspec

from shared.wire.messages import ErrorBody

_json: Final = msgspec.json.Encoder().encode
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]+")


def quote(text: str, limit: int = 64) -> str:
    """A client's string made safe to show inside a message: control characters replaced, cut at `limit` characters."""
    clean = _CONTROL.sub("?", text)
    return f"'{clean[:limit]}...'" if len(clean) > limit else f"'{clean}'"


class HotpathError(Exception):
    """Root of the errors that know their own HTTP status."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "api_error"
    code: ClassVar[str] = "internal_error"
    message: ClassVar[str] = "The gateway failed; the request was not completed."

    def __init__(self, message: str = "", *, param: str | None = None, retry_after_ms: int = 0) -> None:
        self.text = message or type(self).message
        self.param = param
        self.retry_after_ms = retry_after_ms
        super().__init__(self.text)

    def body(self) -> ErrorBody:
        """The wire form of this error."""
        return ErrorBody(
            status=self.status,
            code=self.code,
            type=self.type,
            message=self.text,
            param=self.param,
            retry_after_ms=self.retry_after_ms,
        )


def render(error: ErrorBody) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`: OpenAI's shape, without a bare CR or LF."""
    return _json({"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}})


# ---- the client's --------------------------------------------------------------------------------------------------


class ClientError(HotpathError):
    """The request is wrong."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    message = "The request is not valid."


class InvalidJson(ClientError):
    """S1-H4b: the seed's own message and code."""

    code = "invalid_json"
    message = "Invalid JSON in request body"


class MissingModel(ClientError):
    """S1-H4c."""

    code = "missing_model"
    message = "missing model"


class Unauthorized(ClientError):
    """No key, or one we do not know."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    message = "Incorrect or missing API key. Send it as: Authorization: Bearer <key>"


class KeyExpired(Unauthorized):
    """The key was good once: it may say so to whoever has it."""

    code = "expired_api_key"
    message = "This API key has expired; ask for a new one."


class InsufficientBudget(ClientError):
    """The reservation does not fit under a limit; the message says whose and what is left."""

    status = 402
    type = "insufficient_quota"
    code = "insufficient_budget"
    message = "The budget does not cover this request."


class EstimateExceeded(ClientError):
    """S2-12, the seatbelt: dearer, by the estimate, than X-BR-Max-Estimated-Cost allows."""

    status = 402
    code = "estimated_cost_exceeded"
    message = "The request's estimated cost is above X-BR-Max-Estimated-Cost."


class Forbidden(ClientError):
    """The key is known but may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"
    message = "This key may not do that."


class NotFound(ClientError):
    """No such path."""

    status = 404
    code = "not_found"
    message = "Unknown path. Try POST /v1/chat/completions or GET /v1/models."


class ModelNotFound(ClientError):
    """D6: the name is looked up exactly, and is not in the catalogue; or this key may not ask for it, which reads the
    same, as it does at OpenAI."""

    status = 404
    code = "model_not_found"
    message = "The model does not exist here, or this key may not use it. GET /v1/models lists those it may."


class MethodNotAllowed(ClientError):
    """The path exists, not for this method."""

    status = 405
    code = "method_not_allowed"
    message = "Method not allowed on this path."


class ContentBlocked(ClientError):
    """The tenant's policy on personal data and keywords is `block`; the message names kinds, never the text (I9).
    OpenAI's own code for what its policy refuses: clients that know one know this."""

    code = "content_policy_violation"
    message = "This tenant's policy does not let the request pass."

    def __init__(self, message: str = "", *, param: str | None = "messages", retry_after_ms: int = 0) -> None:
        super().__init__(message, param=param, retry_after_ms=retry_after_ms)


class Conflict(ClientError):
    """The admin API: well formed, and contrary to what is there."""

    status = 409
    code = "conflict"
    message = "That cannot be, as things stand."


class TooLarge(ClientError):
    """S1-G02: over MAX_BODY_BYTES."""

    status = 413
    code = "request_too_large"
    message = "The request body is too large."


class UnsupportedMedia(ClientError):
    """S1-R4: not application/json, or a Content-Encoding."""

    status = 415
    code = "unsupported_media_type"
    message = "Send Content-Type: application/json, without Content-Encoding."


class HeadersTooLarge(ClientError):
    """A header line or the head as a whole is too long."""

    status = 431
    code = "headers_too_large"
    message = "The request's headers are too large."


class TenantBusy(ClientError):
    """The tenant's own limit of requests in flight (faults 91). OpenAI's code: its clients wait and try again."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    message = "Too many requests in flight for this tenant."

    def __init__(self, message: str = "", *, param: str | None = None, retry_after_ms: int = 1000) -> None:
        super().__init__(message, param=param, retry_after_ms=retry_after_ms)


class RateLimited(ClientError):
    """S1-G07: a limit of requests or tokens a minute. OpenAI's code; `retry_after_ms` is exact (D15), 0: never."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    message = "Rate limit reached."


class NotRead(ClientError):
    """The client took nothing for too long: said by the provider to askers that do not cut such clients themselves."""

    status = 408
    type = "timeout_error"
    code = "not_read"
    message = "The answer was not read for too long, so it was ended."


# ---- the provider's --------------------------------------------------------------------------------------------------


class UpstreamError(HotpathError):
    """The provider failed before or while answering."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"
    message = "The provider failed to answer."


class UpstreamInvalid(UpstreamError):
    """The provider answered with something that is not its own format."""

    code = "upstream_invalid_response"
    message = "The provider sent a malformed answer."


class UpstreamTruncated(UpstreamError):
    """The provider closed its stream without a terminal (faults 63)."""

    code = "upstream_truncated"
    message = "The provider closed its stream before the end."


class UpstreamTimeout(UpstreamError):
    """No first token, or silence in the middle (faults 61, 62)."""

    status = 504
    code = "upstream_timeout"
    message = "The provider did not answer in time."


class UpstreamAuth(UpstreamError):
    """The provider refused *our* key (faults 70): never the client's 401."""

    code = "provider_auth"
    message = "The gateway's credential was refused by the provider; the operator has been told."


class UpstreamRateLimited(UpstreamError):
    """The provider's 429, when no other endpoint could serve."""

    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"
    message = "The provider's rate limit is reached."


class UpstreamRefused(UpstreamError):
    """The provider says that the request itself is wrong (400, 404, 413, 422): passed on, no retry, no breaker."""

    status = 400
    type = "invalid_request_error"
    code = "upstream_rejected"
    message = "The provider rejected the request."


class WorkerLost(UpstreamError):
    """The provider worker of a started stream died (faults 14)."""

    code = "upstream_worker_lost"
    message = "The worker that served this stream was lost; the answer is incomplete."


class ResponseTooLarge(UpstreamError):
    """S1-R5: over MAX_RESPONSE_BYTES."""

    code = "response_too_large"
    message = "The answer is larger than this gateway allows."


# ---- ours ------------------------------------------------------------------------------------------------------------


class GatewayFault(HotpathError):
    """We cannot serve the request now."""

    status = 503
    type = "service_unavailable"
    code = "service_unavailable"
    message = "Service temporarily unavailable."

    def __init__(self, message: str = "", *, param: str | None = None, retry_after_ms: int = 1000) -> None:
        super().__init__(message, param=param, retry_after_ms=retry_after_ms)


class NoWorker(GatewayFault):
    """A role has no live worker."""

    code = "no_worker"
    message = "No worker is available for this request."


class NewerVersion(NoWorker):
    """The envelope is of a version that this build does not read (faults 83)."""

    message = "The worker that got this request is of an older version than what sent it."


class LedgerDown(GatewayFault):
    """D4: money fails closed for a tenant with a hard limit."""

    code = "ledger_unavailable"
    message = "The budget ledger is unreachable; this tenant has a hard limit, so the request was not started."


class RegistryDown(GatewayFault):
    """The key is not in the local copy and Redis cannot be asked: 503, not 401 (DESIGN 5)."""

    code = "registry_unavailable"
    message = "The key registry is unreachable and this key is not known here."


class ScanDown(GatewayFault):
    """A policy of `redact` or `block` could not be carried out: what it protects is not sent (fails closed)."""

    code = "scan_unavailable"
    message = "The request could not be scanned as this tenant's policy requires, so it was not started."


class BusDown(GatewayFault):
    """NATS is away."""

    code = "bus_unavailable"
    message = "The message bus is unreachable."


class CircuitOpen(GatewayFault):
    """Every endpoint of the model has an open circuit."""

    code = "circuit_open"
    message = "Every endpoint of this model is failing; its circuits are open."


class ShuttingDown(GatewayFault):
    """S1-H5b: the seed's own words."""

    code = "shutting_down"
    message = "Service Unavailable - shutting down"


class Overloaded(GatewayFault):
    """A process has as many requests as it takes, or they wait too long in its queue: this one was not begun."""

    code = "overloaded"
    message = "The gateway has as many requests as it can serve; this one was not begun."


class DeadlineExceeded(GatewayFault):
    """The request's own deadline passed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    message = "The request's deadline passed before it was answered."


class StreamGap(GatewayFault):
    """A frame of a stream was lost: the stream ends with an error, never with silence."""

    status = 502
    code = "stream_gap"
    message = "A part of the answer was lost inside the gateway; the answer is incomplete."
