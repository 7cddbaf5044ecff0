"""One request: dispatch -> Accepted -> the calls of its Plan, before the first token only -> settle -> the terminal.

Every way out settles every call that was dispatched (D3): at the provider's usage, at what was counted, or at 0.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Final

from shared.core import pricing, tokens
from shared.core.translators.base import Translator
from shared.service.killat import reach_soon
from shared.wire import errors
from shared.wire import headers as names
from shared.wire.errors import HotpathError
from shared.wire.messages import Call, ErrorBody, Hop, Step, Summary
from workers.provider import settlement
from workers.provider.account import Account
from workers.provider.ended import TOO_LATE, Ended, Limits
from workers.provider.exchange import Exchange
from workers.provider.gate import ORDINARY
from workers.provider.metering import Metering
from workers.provider.mux import Channel
from workers.provider.order import Tried, remaining
from workers.provider.settlement import Charge

if TYPE_CHECKING:
    from workers.provider.call import Provider, Target

#: Prompts and texts over this many bytes are counted in a thread: 32 KiB take half a millisecond.
COUNT_INLINE: Final = 32_768


class Walk:
    """The state of one request in this process."""

    __slots__ = (
        "_account", "_at", "_began", "_chain_until", "_channel", "_deadline", "_error", "_exchange", "_head_sent",
        "_left_at", "_message", "_probe", "_provider", "_step", "_tried", "_wake", "cancelled",
    )  # fmt: skip

    def __init__(self, provider: "Provider", message: Call) -> None:
        self._provider = provider
        self._message = message
        self._account = Account(provider, message)
        self._at = provider.clock.now()
        # moved on by what the upstream took: what is left is our own work (uvloop's own clock steps by a millisecond)
        self._began = time.perf_counter()
        self._left_at = self._began  # when the last upstream call began
        self._deadline = 0.0
        self._chain_until = 0.0
        self._channel: Channel | None = None
        self._exchange: Exchange | None = None
        self._step: Step | None = None
        self._probe = ORDINARY  # the id of the probe that the call under way is, until its verdict is told
        self._error: ErrorBody | None = None  # of the last call that failed
        self._head_sent = False
        self._tried: list[Tried] = []
        self._wake: asyncio.Future[None] | None = None
        self.cancelled = False

    # ---- control -----------------------------------------------------------------------------------------------------

    def cancel(self, _reason: str) -> None:
        """The asker gave up, or is gone."""
        self.cancelled = True
        if self._exchange is not None:
            self._exchange.cancel()
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def pause(self, paused: bool) -> None:
        """Credit is used up, or there again."""
        if self._exchange is not None:
            self._exchange.pause(paused)

    @property
    def streams(self) -> bool:
        """Whether the client asked for a stream."""
        return self._message.ask.stream

    @property
    def rid(self) -> str:
        """The request id."""
        return self._message.ask.rid

    @property
    def key(self) -> tuple[str, str, int]:
        """Tenant, request id and delivery: no two walks of a process have the same."""
        ask = self._message.ask
        return ask.tenant, ask.rid, ask.delivery

    def done(self, task: "asyncio.Task[None]") -> None:
        """The task's callback. Channel and walk know each other: one lets go, so that no cycle is left to collect."""
        self._provider.ended(self, task)
        self._channel = None

    def crashed(self) -> None:
        """A fault of our own: the client is told; a dispatched call stays open and becomes unconfirmed by its lease."""
        self._fail(HotpathError().body())

    def shut_down(self) -> None:
        """The drain's time is over: the client is told, the upstream closed, the call settled."""
        if not self.cancelled:
            self._fail(errors.ShuttingDown().body())
            self.cancel("shutting down")

    # ---- the flow ----------------------------------------------------------------------------------------------------

    async def run(self, channel: Channel) -> None:
        """From the message to the terminal. Never raises but CancelledError."""
        provider, ask = self._provider, self._message.ask
        self._channel = channel
        now = provider.loop.time()
        left = ask.deadline - provider.clock.now() if ask.deadline else provider.settings.timeout_ms
        self._deadline = now + left / 1000
        self._chain_until = min(self._deadline, now + provider.settings.fallback_chain_timeout_ms / 1000)
        target = self._next_target()
        if target is None:
            self._fail(provider.gate.refusal(self._message.plan.steps).body())
            provider.void(self._message)
            return
        if ask.answer_by and provider.clock.now() > ask.answer_by:  # somebody on its way was frozen, and thawed
            self._fail(errors.NoWorker().body())
            provider.void(self._message)
            return
        if (lost := await self._account.dispatch()) is not None:
            if lost.error is None:
                channel.refused(lost.holder, lost.delivery)
            else:
                self._fail(lost.error)
            return
        channel.accepted(provider.instance, self._account.call if self._message.admission.reserved else 0)
        reach_soon("provider.after_accepted")
        while target is not None:
            target = await self._one_call(target)

    async def _one_call(self, target: "Target") -> "Target | None":
        """Call one endpoint to its end; the next one to call, None when the request is over."""
        provider, message = self._provider, self._message
        if not provider.gate.closed(target.step.endpoint):
            entered = await self._enter(target)
            if entered is None:
                return None
            target = entered
        self._step = target.step
        translator = target.dialect.translator(message.ask, target.secrets)
        if self.cancelled:
            self._tell(None)
            await self._account.settle(settlement.FREE, target.step.endpoint)
            return None
        ended = await self._call_upstream(target, translator)
        now = provider.loop.time()
        self._began += time.perf_counter() - self._left_at
        self._tell(ended.outcome)
        paid = await self._charge(target, translator, ended)
        settled = await self._account.settle(paid, target.step.endpoint)
        if ended.error is None or ended.cut:
            self._finish(target, translator, ended, paid, settled)
            return None
        provider.count(target.step.endpoint, ended)
        if ended.cancelled or self.cancelled:
            return None
        self._tried.append(Tried(target.step, now, ended.same_endpoint))
        self._error = ended.error
        following = await self._following(ended)
        if following is None:
            self._fail(ended.error)
        return following

    async def _enter(self, target: "Target | None") -> "Target | None":
        """The first endpoint of the Plan, from this one on, whose circuit lets the call pass, under the number the call
        has already; None: there is none, the call is settled at 0 and the answer given."""
        gate = self._provider.gate
        while target is not None and not self.cancelled:
            passed = await gate.enter(target.step.endpoint)
            if passed is not None:
                self._probe = passed
                return target
            self._tried.append(Tried(target.step, self._provider.loop.time(), again=False))
            target = self._next_target()
            if target is not None and not await self._back_off(target.step):
                target = None
        await self._account.settle(settlement.FREE, "")
        self._account.call -= 1  # for X-BR-Calls: it was not made
        if not self.cancelled:
            self._fail(self._error or gate.refusal(self._message.plan.steps).body())
        return None

    def _tell(self, ok: bool | None) -> None:
        """How the call went, to the breakers. A probe has its verdict once, at the first billed token or, without one,
        at its end: a long stream must not keep the circuit half open. What comes of it later counts as any call."""
        probe, self._probe = self._probe, ORDINARY
        if self._step is not None:
            self._provider.gate.tell(self._step.endpoint, ok, probe)

    async def _call_upstream(self, target: "Target", translator: Translator) -> Ended:
        provider, ask = self._provider, self._message.ask
        if provider.loop.time() >= self._deadline:  # we may have been frozen since the dispatch
            return TOO_LATE
        request = translator.request(ask, target.step, self._message.admission.output_cap, target.cap_field)
        limits = Limits.of(
            provider.settings, provider.loop.time(), self._deadline, stream=ask.stream,
            chain_until=self._chain_until if self._tried else None,
        )  # fmt: skip
        label = ((names.REQUEST_ID, f"{ask.rid}.{self._account.call}"), *request.headers)
        metering = self._metering(target, translator)
        exchange = Exchange(
            provider.loop, target.pool, translator, limits, stream=ask.stream, out=self._write, metering=metering
        )
        self._exchange = exchange
        self._left_at = time.perf_counter()
        try:
            return await exchange.run(target.pool.origin.request(request.path, label, request.body))
        finally:
            self._exchange = None
            if metering is not None:
                await metering.done()

    def _write(self, data: bytes) -> None:
        """Bytes of a stream."""
        channel = self._channel
        if channel is None:
            return
        reach_soon("provider.mid_stream" if self._head_sent else "provider.after_delta")
        if self._head_sent:
            channel.write(data)
        else:
            self._head_sent = True
            if self._probe:
                self._tell(ok=True)
            channel.write(data, settlement.head(self._message.admission, self._step, self._account.call))

    # ---- money -------------------------------------------------------------------------------------------------------

    def _metering(self, target: "Target", translator: Translator) -> Metering | None:
        """Of a stream something is reserved for; a whole answer is settled in full when it is there."""
        ask, admission = self._message.ask, self._message.admission
        if not (ask.stream and admission.reserved):
            return None
        return Metering(
            self._account, translator, self._encoding(target),
            price=pricing.price_of(admission, target.step), prompt=admission.input_tokens,
            floor=self._provider.settings.budget_min_reservation, hard=admission.hard,
        )  # fmt: skip

    def _encoding(self, target: "Target") -> tokens.Encoding:
        model = self._provider.catalog.models.get(self._message.ask.model)
        return model.encoding if model is not None else tokens.encoding_for(target.step.model)

    async def _charge(self, target: "Target", translator: Translator, ended: Ended) -> Charge:
        message = self._message
        model = self._provider.catalog.models.get(message.ask.model)
        hides = model.hidden_reasoning if model is not None else tokens.hides_reasoning(target.step.model)
        hidden = int((time.perf_counter() - self._left_at) * tokens.HIDDEN_PER_S) + 1 if hides else 0
        args = (message.ask, message.admission, target.step, translator, ended, self._encoding(target), hidden)
        if ended.billed and not (translator.usage is not None and translator.finished):  # it will have to count
            size = len(message.ask.body) + sum(len(text) for text, _ in translator.texts())
            if size > COUNT_INLINE:
                return await asyncio.to_thread(settlement.charge, *args)
        return settlement.charge(*args)

    # ---- a further call ----------------------------------------------------------------------------------------------

    async def _following(self, ended: Ended) -> "Target | None":
        """The target of a further call, opened in the ledger; None: there is none."""
        if not ended.retryable or self._account.call >= self._message.plan.max_calls:
            return None
        target = self._next_target()
        if target is None or not await self._back_off(target.step):
            return None
        return target if await self._account.top_up() else None

    def _next_target(self) -> "Target | None":
        """The next step of the Plan that this process's catalogue knows."""
        provider = self._provider
        steps = remaining(self._message.plan.steps, self._tried, provider.gate.shut)
        return next(filter(None, map(provider.targets, steps)), None)

    async def _back_off(self, step: Step) -> bool:
        """Wait until the endpoint may be called again (S2-06); False when the chain's time does not allow it."""
        loop = self._provider.loop
        backoff = self._provider.settings.routing_retry_backoff_ms / 1000
        last = max((e.ended_at for e in self._tried if e.step.endpoint == step.endpoint), default=None)
        now = loop.time()
        due = now if last is None else max(now, last + backoff)
        if due >= self._chain_until:
            return False
        if due > now:
            self._wake = loop.create_future()
            timer = loop.call_at(due, _wake, self._wake)
            try:
                await self._wake
            finally:
                timer.cancel()
                self._wake = None
        return not self.cancelled

    # ---- terminals ---------------------------------------------------------------------------------------------------

    def _finish(self, target: "Target", translator: Translator, ended: Ended, paid: Charge, settled: bool) -> None:
        message = self._message
        ask, admission, step = message.ask, message.admission, target.step
        assert self._channel is not None
        if ended.cut:
            translator.close(paid.usage.input_tokens, paid.usage.cache_read, paid.usage.output_tokens)
        call, efficiency = self._account.call, settlement.efficiency(message, translator, paid)
        x_br = b""
        if ask.stream:
            x_br = settlement.payload(ask, admission, step, call, paid, efficiency, "budget" if ended.cut else "")
            tail = translator.tail(x_br if ask.done == "inline" else b"")
            if tail:
                self._write(tail)
        else:
            self._channel.write(ended.body, settlement.head(admission, step, call, paid.cost, efficiency))
        summary = Summary(
            call=self._account.call,
            endpoint=step.endpoint,
            model=step.model,
            cost=paid.cost,
            input_tokens=paid.usage.input_tokens,
            output_tokens=paid.usage.output_tokens,
            cached_tokens=paid.usage.cache_read,
            estimated=paid.estimated,
            settled=settled,
            payload=x_br if ask.done != "inline" else b"",
        )
        self._provider.count(step.endpoint, ended)
        self._channel.end(summary, self._hops())
        reach_soon("provider.after_end")

    def _fail(self, error: ErrorBody) -> None:
        if self._channel is not None:
            head = None if self._head_sent else settlement.head(self._message.admission, self._step, self._account.call)
            self._channel.failed(error, head, self._hops())

    def _hops(self) -> tuple[Hop, ...]:
        provider = self._provider
        took = int((time.perf_counter() - self._began) * 1_000_000)
        return (*self._message.hops, Hop(provider.name, provider.instance, provider.pid, self._at, took))


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
