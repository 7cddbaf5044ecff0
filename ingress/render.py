"""Bytes for the client: heads, whole answers, server-sent events, errors. Pure.

The provider's Deltas are ready to write and pass untouched; what the ingress itself writes into a stream (errors, the
terminal, comments) comes from here and cannot carry a bare CR or LF inside a line (S0-10).
"""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Final

from shared.wire import errors, headers
from shared.wire.messages import ErrorBody

Fields = Iterable[tuple[str, str]]

JSON: Final = "application/json"
#: What keeps proxies from buffering a stream: nginx reads X-Accel-Buffering, caches read no-cache.
STREAM_FIELDS: Final = (
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),
)
#: A comment line: the SSE grammar tells every client to ignore it.
KEEP_ALIVE: Final = b": keep-alive\n\n"
LAST_CHUNK: Final = b"0\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_LINES: Final = {status.value: f"{status.value} {status.phrase}\r\n" for status in HTTPStatus}
_NEWLINES: Final = re.compile(rb"[\r\n]+")
#: Header values as RFC 9110 5.5 has them, ASCII only.
_VALUE: Final = re.compile(r"[\x20-\x7e]*\Z")


def head(status: int, fields: Fields, date: str, *, http10: bool = False, keep: bool = True) -> bytes:
    """The status line and the header fields, with the empty line. Values are ours or checked before."""
    parts = ["HTTP/1.0 " if http10 else "HTTP/1.1 ", _LINES.get(status) or f"{status} \r\n"]
    for name, value in fields:
        parts += (name, ": ", value, "\r\n")
    parts += ("Date: ", date, "\r\n")
    if not keep:
        parts.append("Connection: close\r\n")
    elif http10:
        parts.append("Connection: keep-alive\r\n")
    parts.append("\r\n")
    return "".join(parts).encode("latin-1")


def br_fields(given: Mapping[str, str] | None) -> list[tuple[str, str]]:
    """The X-BR and rate limit headers a worker sent, in its order; what is none, or could not stand in a head, is left
    out."""
    if not given:
        return []
    return [
        (name, value)
        for name, value in given.items()
        if (name.startswith(headers.BR_PREFIX) or name in headers.PASSED) and _VALUE.match(value)
    ]


def error_fields(error: ErrorBody) -> list[tuple[str, str]]:
    """Content type and, when it helps, how long to wait (D15: whole seconds, at least 1, and the exact ms)."""
    fields = [("Content-Type", JSON)]
    if error.status == 401:
        fields.append(("WWW-Authenticate", "Bearer"))
    if error.retry_after_ms > 0:
        fields.append((headers.RETRY_AFTER, str(max(1, -(-error.retry_after_ms // 1000)))))
        fields.append((headers.RETRY_AFTER_MS, str(error.retry_after_ms)))
    return fields


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked transfer coding (RFC 9112 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def one_line(data: bytes) -> bytes:
    """JSON as it may stand in a `data:` line. Newlines inside JSON text are only ever white space between tokens."""
    return _NEWLINES.sub(b" ", data) if b"\n" in data or b"\r" in data else data


def error_event(error: ErrorBody) -> bytes:
    """An error after the 200: one event, then nothing, and no [DONE]."""
    return b"data: %b\n\n" % one_line(errors.render(error))


def terminal(form: str, payload: bytes) -> bytes:
    """The good end of a stream in the three forms of D5."""
    if form == "append" and payload:
        return b"data: [DONE] %b\n\n" % one_line(payload)
    if form == "comment" and payload:
        return b": x-br %b\ndata: [DONE]\n\n" % one_line(payload)
    return b"data: [DONE]\n\n"
