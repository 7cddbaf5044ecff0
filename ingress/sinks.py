"""Where an answer goes: collected whole, or written to the client as it comes.

`Live` writes straight to the transport from the bus callback: aiohttp's `StreamResponse.write` costs a coroutine and a
wake-up of the handler per chunk (deploy/decisions has the figures). What the kernel has not taken does not count as
taken by the client, so a slow reader stops its own upstream (DESIGN 3).
"""

from collections.abc import Callable
from typing import Final, Protocol

from ingress import render
from ingress.protocol import Connection
from shared.wire.messages import ErrorBody, Summary

_NEVER: Final = float("inf")

Fields = list[tuple[str, str]]


class Sink(Protocol):
    """What an exchange writes to."""

    started: bool  # whether the client has seen a status line
    due: float  # when `tick` wants to be called

    def write(self, data: bytes, head: dict[str, str] | None, now: float) -> None:
        """Text; `head` comes with the first."""

    def taken(self, received: int) -> int:
        """How many of the bytes received the client has taken."""

    def discard(self) -> None:
        """What was written is void. Only of a whole answer: a stream's text is with the client."""

    def finish(self, summary: Summary) -> None:
        """The good terminal."""

    def fail(self, error: ErrorBody) -> None:
        """The bad terminal, if the client has seen a status line."""

    def tick(self, now: float) -> None:
        """`due` has come."""

    def close(self) -> None:
        """Nothing more will be written."""


class Whole:
    """Collects an answer: its status goes out after the terminal."""

    __slots__ = ("due", "head", "parts", "started")

    def __init__(self) -> None:
        self.started = False
        self.due = _NEVER
        self.head: dict[str, str] | None = None
        self.parts: list[bytes] = []

    def write(self, data: bytes, head: dict[str, str] | None, now: float) -> None:  # noqa: ARG002 - Sink
        """Keep the bytes; MAX_RESPONSE_BYTES bounds them (the stream machine counts)."""
        if head is not None:
            self.head = head
        self.parts.append(data)

    def taken(self, received: int) -> int:
        """A whole answer drains into the ingress."""
        return received

    def discard(self) -> None:
        """Its worker died with the answer half way here."""
        self.parts.clear()
        self.head = None

    def finish(self, summary: Summary) -> None:
        """The handler sends it."""

    def fail(self, error: ErrorBody) -> None:
        """The handler sends the error."""

    def tick(self, now: float) -> None:
        """It has no timers."""

    def close(self) -> None:
        """Nothing to let go of."""


class Live:
    """Writes server-sent events in chunked coding (HTTP/1.0: until the connection closes)."""

    __slots__ = (
        "_connection",
        "_date",
        "_done_form",
        "_fields",
        "_http10",
        "_keep",
        "_keepalive",
        "_last",
        "_leaving",
        "_notify",
        "_open",
        "due",
        "started",
    )  # fmt: skip

    def __init__(
        self, connection: Connection, fields: Fields, *, http10: bool, keep: bool, done: str, commit: float,
        keepalive: float, date: Callable[[], str], leaving: Callable[[], bool], now: float, notify: "Notify",
    ) -> None:  # fmt: skip
        self._connection = connection
        self._fields = fields
        self._http10 = http10
        self._keep = keep and not http10
        self._done_form = done
        self._keepalive = keepalive
        self._last = now
        self._notify = notify
        self._open = True
        self._date = date
        self._leaving = leaving
        self.started = False
        self.due = now + commit

    @property
    def keep(self) -> bool:
        """Whether the connection may carry another request."""
        return self._keep

    def write(self, data: bytes, head: dict[str, str] | None, now: float) -> None:
        """Send; the head goes out before the first bytes."""
        if not self.started:
            self._start(head, now)
        self._last = now
        self._send(data)

    def taken(self, received: int) -> int:
        """What the kernel has not taken, framing included, is not taken."""
        return received - self._connection.untaken()

    def drained(self) -> None:
        """The connection says that the client took bytes."""
        self._notify.credit_due()

    def discard(self) -> None:
        """Never asked for: the machine ends a stream whose text was given out. Raises AssertionError."""
        raise AssertionError("text of a stream cannot be taken back")

    def finish(self, summary: Summary) -> None:
        """The terminal in the form the client asked for, and the end of the body."""
        if not self.started:
            self._start(None, self._last)
        self._end(render.terminal(self._done_form, summary.payload))

    def fail(self, error: ErrorBody) -> None:
        """An error after the 200 is an event, without [DONE]; before it, the handler answers with the status."""
        if self.started:
            self._end(render.error_event(error))

    def tick(self, now: float) -> None:
        """Commit to 200 when nothing came for STREAM_COMMIT_MS; then a comment in each KEEPALIVE_MS of silence."""
        if not self.started:
            self._start(None, now)
            self._last = now - self._keepalive
        if now >= self._last + self._keepalive:
            self._last = now
            self._send(render.KEEP_ALIVE)
        self.due = self._last + self._keepalive

    def close(self) -> None:
        """Let go of the connection."""
        self._open = False
        if self._connection.listener is self:
            self._connection.listener = None

    def _start(self, head: dict[str, str] | None, now: float) -> None:
        self.started = True
        self._keep = self._keep and not self._leaving()
        self.due = now + self._keepalive
        self._connection.listener = self
        fields = [*self._fields, *render.STREAM_FIELDS, *render.br_fields(head)]
        if not self._http10:
            fields.append(("Transfer-Encoding", "chunked"))
        self._put(render.head(200, fields, self._date(), http10=self._http10, keep=self._keep))

    def _send(self, data: bytes) -> None:
        if data:
            self._put(data if self._http10 else render.chunk(data))

    def _end(self, data: bytes) -> None:
        self._put(data if self._http10 else render.chunk(data) + render.LAST_CHUNK)
        self.close()

    def _put(self, data: bytes) -> None:
        try:
            self._connection.write(data)
        except ConnectionResetError:  # aiohttp cancels the handler, and that ends the exchange
            self._open = False


class Notify(Protocol):
    """Whom a sink tells that credit may be given."""

    def credit_due(self) -> None:
        """The client took bytes."""
