"""An upstream's error -> ours: which class, whose fault, worth another endpoint; its message bounded and scrubbed.

status              client sees                 another endpoint   same endpoint again   counts for the circuit
400 404 413 422     the same, with the message  no                 no                    no
401 403             502 provider_auth           yes                no                    yes
402                 502                         yes                no                    yes
408 409 425         502                         yes                yes                   no
429                 429 + Retry-After           yes                no (it said when)     no (it serves, others)
other 4xx           502                         yes                no                    yes
5xx (529 too)       502, 503, 504 -> 502        yes                yes                   yes
1xx 2xx 3xx         502 malformed               yes                no                    yes
"""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec
import orjson

from shared.core.translators.base import Failure
from shared.wire import errors
from shared.wire.errors import HotpathError
from shared.wire.messages import ErrorBody

MAX_MESSAGE: Final = 500  # characters of a provider's message shown to a client
MAX_BODY: Final = 65_536  # bytes of an error body looked at
MAX_RETRY_AFTER_MS: Final = 600_000  # faults 68
_DEFAULT_RETRY_MS: Final = 1000  # a 429 that does not say when

_REFUSED: Final = frozenset({400, 404, 413, 422})
_AUTH: Final = frozenset({401, 403})
_AGAIN: Final = frozenset({408, 409, 425})

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_URL: Final = re.compile(r"\b[a-z][a-z0-9+.-]{1,15}://[^\s\"'<>)\]}]+", re.IGNORECASE)
#: What keys look like (OpenAI, Anthropic, Google, GitHub, AWS, ours, JWTs, bearer tokens, any long unbroken token).
_SECRET: Final = re.compile(
    r"\b(?:sk|pk|rk|key[-_]|ghp|gho|xox[a-z]|br_live|AIza|AKIA|eyJ)[-_A-Za-z0-9*./+=]{8,}|\bBearer\s+\S+|[A-Za-z0-9_+/=-]{40,}",
    re.IGNORECASE,
)
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_PARAM: Final = re.compile(r"[A-Za-z0-9_.\[\]-]{1,128}\Z")
_INTEGER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?\Z", re.ASCII)


def scrub(text: str, secrets: tuple[str, ...] = ()) -> str:
    """A provider's words made safe to show: no secret of ours, nothing that looks like one, no URL, one line."""
    text = text[: 8 * MAX_MESSAGE]  # bounds the work below, with room for what is taken out
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[redacted]")
    text = _SECRET.sub("[redacted]", _URL.sub("[url]", _CONTROL.sub(" ", text))).strip()
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def by_status(status: int, headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...]) -> Failure:
    """What a status other than 200 means."""
    return _classify(status, headers, read_error(body), secrets)


def in_stream(error: Any, secrets: tuple[str, ...]) -> Failure:
    """An error object inside a 200: classified by its own numeric code or type, else a provider's failure."""
    fields = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else ""}
    status = next((value for value in (fields.get("code"), fields.get("status")) if type(value) is int), 0)
    if not 400 <= status <= 599:
        words = f"{fields.get('type')} {fields.get('code')}"
        if "rate_limit" in words:
            status = 429
        elif "invalid_request" in words or "context_length" in words:
            status = 400
        else:
            status = 500
    return _classify(status, {}, fields, secrets)


def read_error(body: bytes) -> dict[str, Any]:
    """The `error` object of an OpenAI-shaped body; of others whatever message is found. Never raises."""
    try:
        parsed = orjson.loads(body[:MAX_BODY])
    except ValueError:
        return {}
    if isinstance(parsed, list) and parsed:
        parsed = parsed[0]
    if not isinstance(parsed, dict):
        return {}
    error = parsed.get("error", parsed)
    if isinstance(error, dict):
        return error
    return {"message": error} if isinstance(error, str) else {}


def retry_after_ms(headers: Mapping[str, str]) -> int:
    """`retry-after-ms`, else `retry-after` in seconds or as a date: 1 ms to 600 s; a second for nonsense.

    A date is read against the answer's own `date` header: our wall clock does not matter.
    """
    for name, factor in (("retry-after-ms", 1.0), ("retry-after", 1000.0)):
        value = headers.get(name, "").strip()
        if _INTEGER.match(value):
            return max(1, min(int(float(value) * factor), MAX_RETRY_AFTER_MS))
    try:
        until = parsedate_to_datetime(headers.get("retry-after", ""))
        wait = (until - parsedate_to_datetime(headers.get("date", ""))).total_seconds()
    except (ValueError, TypeError):  # not dates; one with and one without a zone
        return _DEFAULT_RETRY_MS
    return max(1, min(int(wait * 1000), MAX_RETRY_AFTER_MS))


def _classify(status: int, headers: Mapping[str, str], fields: dict[str, Any], secrets: tuple[str, ...]) -> Failure:
    if status in _REFUSED:
        return Failure(_refused(status, fields, secrets), retryable=False, same_endpoint=False, endpoint_fault=False)
    if status in _AUTH:
        return _failure(errors.UpstreamAuth(), same=False, fault=True)
    if status == 429:
        return _failure(errors.UpstreamRateLimited(retry_after_ms=retry_after_ms(headers)), same=False, fault=False)
    if not 400 <= status <= 599:
        return _failure(errors.UpstreamInvalid(f"The provider answered {status}."), same=False, fault=True)
    message = fields.get("message") if status >= 500 else None  # a 4xx left here is about our account, not the client's
    said = f": {scrub(message, secrets)}" if isinstance(message, str) else "."
    error = errors.UpstreamError(f"The provider failed with {status}{said}")
    return _failure(error, same=status in _AGAIN or status >= 500, fault=status not in _AGAIN)


def _failure(error: HotpathError, *, same: bool, fault: bool) -> Failure:
    return Failure(error.body(), retryable=True, same_endpoint=same, endpoint_fault=fault)


def _refused(status: int, fields: dict[str, Any], secrets: tuple[str, ...]) -> ErrorBody:
    """The provider's own status, message, code and param, when they are what they should be."""
    message = fields.get("message")
    body = errors.UpstreamRefused(scrub(message, secrets) if isinstance(message, str) else "").body()
    code, param = fields.get("code"), fields.get("param")
    return msgspec.structs.replace(
        body,
        status=status,
        code=code if isinstance(code, str) and _NAME.match(code) and not _SECRET.search(code) else body.code,
        param=param if isinstance(param, str) and _PARAM.match(param) and not _SECRET.search(param) else None,
    )
