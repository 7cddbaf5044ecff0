"""One upstream call: request out, events through the translator, bytes for the client out; its timers; its end.

Driven by the connection's callbacks; the request's task sleeps on one future until the `Ended` is known. Phases:

    DIAL  -> SENT -> BODY -> over                the good way
                  -> DRAIN -> over               cancelled, timed out, cut, or broken in mid-body

DRAIN counts what was generated: on a plain connection our side is shut down, the upstream notices, and everything it
wrote before is still read and counted, though nobody gets it: for `drain_s`, and on while there is more, since behind a
client that did not read megabytes may wait. A TLS connection is aborted (one that was paused is read first, likewise),
and the settlement adds an allowance for what was on its way.

What is generated may be metered (metering.py): then the upstream is held while more is asked of the ledger, and cut
when it is denied.

Nothing is given out before something billed has come (`translator.started`): until then another endpoint may serve.
"""

import asyncio
from collections.abc import Callable, Mapping

from shared.core.meter import NEVER
from shared.core.translators.base import Failure, Translator, UpstreamFailure
from shared.service.killat import reach, reach_soon
from shared.wire import errors
from shared.wire.errors import HotpathError, UpstreamError
from workers.provider.bounds import MAX_DRAIN_S, MAX_PREFIX, TAIL_S
from workers.provider.ended import UNPAID, Ended, Limits, failure_of, late, slow, unsent
from workers.provider.metering import Metering
from workers.provider.reading import Reading
from workers.provider.upstream import Connection, Lost, Pool

DIAL, SENT, BODY, DRAIN, OVER = range(5)


class Exchange:
    """See the module. `out` gets bytes for the client, in order."""

    __slots__ = (
        "_cancelled", "_connection", "_dialling", "_failure", "_future", "_held", "_last_event", "_limits", "_loop",
        "_metering", "_out", "_paused", "_phase", "_pool", "_prefix", "_reading", "_replaced", "_replacing", "_request",
        "_stalled", "_stream", "_tail_due", "_timer", "_timer_due", "_translator", "due", "started_at",
    )  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pool: Pool, translator: Translator, limits: Limits, *,
        stream: bool, out: Callable[[bytes], None], metering: Metering | None = None,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._pool = pool
        self._translator = translator
        self._limits = limits
        self._stream = stream
        self._out = out
        self._phase = DIAL
        self._request = b""
        self._future: asyncio.Future[Ended] = loop.create_future()
        self._connection: Connection | None = None
        self._dialling: asyncio.Task[Connection] | None = None
        self._replaced = False
        self._replacing: asyncio.Task[None] | None = None
        self._reading = Reading(translator, stream=stream)
        self._prefix: list[bytes] = []
        self._failure: Failure | None = None  # why it is being drained
        self._cancelled = False
        self._metering = metering
        self.due = NEVER if metering is None else metering.due  # bytes of text at which it looks
        self._stalled = False  # by the client, who does not read
        self._held = False  # by us, while the ledger is asked
        self._paused = False  # one of the two
        self._last_event = 0.0
        self._tail_due = 0.0
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0  # kept here: uvloop's handle of a time that has passed has no `when`
        self.started_at = 0.0  # loop time at which something was first given out

    async def run(self, request: bytes) -> Ended:
        """Make the call. Never raises but CancelledError."""
        self._request = request
        connection = self._pool.take()
        try:
            if connection is None:
                await self._dial()
            else:
                self._begin(connection)
            return await self._future
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _dial(self) -> None:
        self._dialling = self._loop.create_task(self._pool.dial(self._limits.connect_s))
        try:
            connection = await self._dialling
        except HotpathError as exc:
            self._finish(unsent(exc, self._limits, self._loop.time()))
        except asyncio.CancelledError:
            if not self._cancelled:
                raise  # the request's own task was cancelled
            self._finish(Ended(cancelled=True))
        else:
            if self._cancelled:
                connection.release()
                self._finish(Ended(cancelled=True))
            else:
                self._begin(connection)
        finally:
            self._dialling = None

    def _begin(self, connection: Connection) -> None:
        self._connection = connection
        self._phase = SENT
        if self._paused:
            connection.pause(paused=True)
        connection.send(self._request, self)
        reach_soon("provider.after_send")
        self._arm()

    def cancel(self) -> None:
        """Nobody wants the answer."""
        self._cancelled = True
        if self._phase == DIAL and self._dialling is not None:
            self._dialling.cancel()
        elif self._phase == BODY and self._tail_due:
            self._hold_back(stalled=False, held=False)  # all was generated, its usage is to come: within TAIL_S
        elif self._phase in (SENT, BODY):
            self._drain(late(self._limits, self._loop.time(), silent=self._silent()))

    def _silent(self) -> bool:
        """Whether a head or a first token is still waited for."""
        return self._phase == SENT or (self._stream and not self._translator.started)

    def pause(self, paused: bool) -> None:
        """The client does not take what there is, or does again."""
        self._hold_back(stalled=paused, held=self._held)

    @property
    def generating(self) -> bool:
        """Whether it is read, and more text may come."""
        return self._phase == BODY and not self._translator.finished

    def hold(self, held: bool) -> None:
        """What was generated passes what is reserved, and more is asked for; or it was answered."""
        self._hold_back(stalled=self._stalled, held=held)

    def _hold_back(self, *, stalled: bool, held: bool) -> None:
        self._stalled, self._held = stalled, held
        paused, before = stalled or held, self._paused
        self._paused = paused
        if paused != before and self._connection is not None and self._phase in (SENT, BODY):
            self._connection.pause(paused)
            if not paused:
                self._last_event = self._loop.time()  # the silence was ours
                self._arm()

    def cut(self) -> None:
        """Nothing more is paid for. What was read is given out and will be billed, and so will what is on its way."""
        if self.generating:
            self._drain(UNPAID)
        else:
            self.hold(held=False)  # it ends by itself

    # ---- timers: one handle, set again when it fires too early -------------------------------------------------------

    def _due(self) -> float:
        limits = self._limits
        due = limits.deadline
        if self._phase == SENT:
            due = min(due, limits.head)
        if self._stream:
            if not self._translator.started:
                due = min(due, limits.first_token)
            elif self._tail_due:
                due = min(due, self._tail_due)
            elif not self._paused:
                due = min(due, self._last_event + limits.idle_s)
        return due

    def _arm(self) -> None:
        """What is due may have come nearer."""
        due = self._due()
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._set(due)

    def _set(self, due: float) -> None:
        self._timer_due = due
        self._timer = self._loop.call_at(due, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._phase not in (SENT, BODY):
            return
        now, due = self._loop.time(), self._due()
        if now < due:
            self._set(due)
        elif now >= self._limits.deadline:
            self._drain(late(self._limits, now, silent=self._silent()))
        elif self._tail_due and now >= self._tail_due:
            self._complete()
        else:
            head = self._phase == SENT
            self._drain(slow(self._limits, now, head=head, begun=self._translator.started))

    # ---- the connection's callbacks ----------------------------------------------------------------------------------

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Status, encoding and type decide how the body is read."""
        reach("provider.after_head")
        if self._phase == SENT:
            self._phase = BODY
        self._last_event = self._loop.time()
        wrong = self._reading.head(status, headers)
        if wrong and self._phase == BODY:
            self._drain(failure_of(errors.UpstreamInvalid(wrong)))

    def on_body(self, data: bytes) -> None:
        """A read's worth of body."""
        reading = self._reading
        reading.size += len(data)
        if reading.mode == "sse":
            if self._phase != BODY:
                self._count(reading.parser.feed(data))
                return
            self._on_events(data)
            too_large = reading.size > self._limits.max_bytes
        else:
            too_large = reading.keep(data, self._limits.max_bytes)
        if too_large and reading.mode == "error":
            self._refused()
        elif too_large and self._phase == BODY:
            self._drain(Failure(errors.ResponseTooLarge().body(), False, False, False))

    def on_end(self) -> None:
        """The HTTP message is complete."""
        self._at_end(complete=True)

    def on_lost(self, lost: Lost) -> None:
        """The connection ended first."""
        connection, self._connection = self._connection, None
        if lost.unsent and self._phase == SENT and connection is not None:
            if self._replaced or connection.fresh:
                self._finish(unsent(UpstreamError("The provider closed the connection."), self._limits, 0.0))
            else:
                self._replaced = True
                self._phase = DIAL
                self._replacing = self._loop.create_task(self._dial())
        elif lost.malformed and self._reading.mode != "error":
            self._failure = self._failure or failure_of(errors.UpstreamInvalid())
            self._finish(self._ended(complete=False))
        elif self._phase == SENT:
            self._failure = failure_of(UpstreamError("The provider closed the connection."))
            self._finish(self._ended(complete=lost.clean))
        else:
            self._at_end(complete=lost.clean, cut=True)

    # ---- inside: events ----------------------------------------------------------------------------------------------

    def _on_events(self, data: bytes) -> None:
        translator, outs, parser = self._translator, self._prefix, self._reading.parser
        events = parser.feed(data)
        if events:
            self._last_event = self._loop.time()
        for number, event in enumerate(events):
            try:
                out = translator.feed(event)
            except (HotpathError, UpstreamFailure) as exc:
                self._give_out()
                self._drain(failure_of(exc))
                self._count(events[number + 1 :])
                return
            if out:
                outs.append(out)
        if outs:
            self._give_out()
        if parser.failed or translator.done or translator.finished:
            self._ending()
        elif translator.written > self.due and self._metering is not None:
            self._metering.look(self)

    def _ending(self) -> None:
        """No more text will come of it."""
        translator = self._translator
        if self._reading.parser.failed:
            self._reading.readable = False
            self._drain(failure_of(errors.UpstreamInvalid("The provider sent an event that is too large.")))
        elif translator.done:
            self._complete()
        elif not self._tail_due:
            self._tail_due = self._last_event + TAIL_S
            self._arm()

    def _count(self, events: list[bytes]) -> None:
        """Events of a drain."""
        self._reading.count(events)
        if self._translator.done:
            self._finish(self._ended(complete=True))

    def _give_out(self) -> None:
        outs = self._prefix
        if not outs or self._phase != BODY:
            return
        if not self._translator.started:
            if sum(map(len, outs)) <= MAX_PREFIX:
                return
            self._translator.started = True  # too much to hold back: it counts as begun
        if not self.started_at:
            self.started_at = self._loop.time()
            self._arm()
        data = outs[0] if len(outs) == 1 else b"".join(outs)
        outs.clear()
        self._out(data)

    def _at_end(self, *, complete: bool, cut: bool = False) -> None:
        """No more bytes will come."""
        if self._reading.mode == "error" and self._phase != OVER:
            self._refused()
        elif self._phase == DRAIN:
            try:
                self._reading.end(cut=cut)
            except (HotpathError, UpstreamFailure):
                pass  # it ends in an error anyway; what was understood is counted
            self._finish(self._ended(complete=complete))
        elif self._phase == BODY:
            try:
                if out := self._reading.end(cut=cut):
                    self._prefix.append(out)
            except (HotpathError, UpstreamFailure) as exc:
                self._failure = failure_of(exc)
                self._finish(self._ended(complete=complete))
            else:
                self._give_out()
                self._complete()

    # ---- inside: ends ------------------------------------------------------------------------------------------------

    def _drain(self, failure: Failure) -> None:
        self._give_out()
        if failure is UNPAID:
            self._translator.cut()
        self._failure = failure
        self._phase = DRAIN
        connection = self._connection
        if connection is None or not (connection.half_close() or self._paused):
            self._finish(self._ended(complete=False))
            return
        connection.pause(paused=False)
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = self._loop.time() + MAX_DRAIN_S
        self._timer = self._loop.call_later(self._limits.drain_s, self._drained)

    def _drained(self) -> None:
        connection, self._timer = self._connection, None
        if connection is not None and connection.has_unread() and self._loop.time() < self._timer_due:
            self._timer = self._loop.call_later(self._limits.drain_s, self._drained)
        else:
            self._finish(self._ended(complete=False))

    def _complete(self) -> None:
        self._finish(self._reading.good())

    def _refused(self) -> None:
        self._finish(self._reading.refusal(cancelled=self._cancelled))

    def _ended(self, *, complete: bool) -> Ended:
        assert self._failure is not None
        return self._reading.broken(self._failure, cancelled=self._cancelled, complete=complete)

    def _finish(self, ended: Ended) -> None:
        """The one end."""
        if self._phase == OVER:
            return
        self._phase = OVER
        connection, self._connection = self._connection, None
        if connection is not None:
            if ended.error is None or self._reading.mode == "error":
                connection.release()
            else:
                connection.abort()
        if not self._future.done():
            self._future.set_result(ended)
