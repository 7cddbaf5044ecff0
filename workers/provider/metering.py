"""Metering one streamed call: when its output passes what is reserved, more is asked of the ledger, or it is cut.

    the read that passes `due`   -> counted (shared/core/meter.py); mostly nothing is lacking, and `due` moves on
    more is lacking              -> the upstream is not read while the ledger is asked, once, for what was generated and
                                    a slice more
    granted                      -> goes on
    denied, but something left   -> goes on with that, if it pays for what was generated, and the next time is denied
    denied                       -> cut: the client gets a legal end, the upstream is drained as for a cancel
    no answer, or too late       -> a hard limit: cut; without one it goes on unmetered and is settled in full

What this read brought goes to the client before anything is asked: it will be billed. So a bill passes what is held by
one read, and by what the provider generates while the ledger answers (0.3 ms, 100 ms at most).
"""

import asyncio
from typing import Final, Protocol

from shared.core import meter, tokens
from shared.core.meter import Meter
from shared.core.translators.base import Translator
from shared.wire.messages import Price
from workers.provider.account import Account

#: A denial says what is left of one limit; what is left of another may be less.
MAX_RESTS: Final = 3


class Metered(Protocol):
    """The exchange, as this file sees it."""

    due: int

    @property
    def generating(self) -> bool:
        """Whether it is read, and more text may come."""

    def hold(self, held: bool) -> None:
        """Stop reading the upstream, or go on."""

    def cut(self) -> None:
        """Nothing more is paid for."""


class Metering:
    """Of one call."""

    __slots__ = ("_account", "_encoding", "_floor", "_hard", "_meter", "_price", "_prompt", "_task", "_translator")

    def __init__(
        self, account: Account, translator: Translator, encoding: tokens.Encoding, *, price: Price, prompt: int,
        floor: int, hard: bool,
    ) -> None:  # fmt: skip
        """`prompt`: its tokens at their bound; `floor`: the smallest reservation, nano-USD; `hard`: whether the tenant
        has a hard limit."""
        self._account = account
        self._translator = translator
        self._encoding = encoding
        self._price = price
        self._prompt = prompt
        self._floor = floor
        self._hard = hard
        self._meter = Meter(meter.affordable(price, account.held, prompt))
        self._task: asyncio.Task[None] | None = None

    @property
    def due(self) -> int:
        """Bytes of text at which the exchange is to `look`."""
        return self._meter.due

    def look(self, exchange: Metered) -> None:
        """More bytes than `due` were written."""
        if self._task is not None:
            exchange.due = meter.NEVER  # looked at again when the ledger has answered
            return
        count = tokens.counter(self._encoding)
        lacking = self._meter.count(self._translator.written, self._translator.tokens(count))
        exchange.due = self._meter.due
        if lacking:
            exchange.hold(held=True)
            self._task = asyncio.get_running_loop().create_task(self._extend(exchange))

    async def _extend(self, exchange: Metered) -> None:
        """Ask for more, until what was generated is paid for, or it is not."""
        paid = False
        try:
            paid = await self._ask()
        finally:
            self._task = None
            if not paid:
                exchange.cut()
        exchange.due = self._meter.due
        exchange.hold(held=False)
        if exchange.generating and self._translator.written > exchange.due:
            self.look(exchange)  # some transports hand over what they had read already

    async def _ask(self) -> bool:
        account = self._account
        needed = meter.spent(self._price, self._prompt, self._meter.counted)
        answer = await account.extend(max(needed, account.held) + meter.slice_of(self._price, self._floor))
        for _ in range(MAX_RESTS):
            if answer.status == "denied" and answer.left > 0:
                answer = await account.extend(account.held + answer.left)
        if answer.status == "ok":
            return not self._meter.reserve(meter.affordable(self._price, account.held, self._prompt))
        if answer.status == "denied" or self._hard:
            return False
        self._meter.reserve(meter.NEVER)
        return True

    async def done(self) -> None:
        """The call is over: wait for the ledger's answer, if one is still to come."""
        while self._task is not None:
            await asyncio.wait((self._task,))
