"""Cancel and credit for this instance's streams, and askers that fell silent (DESIGN 3, flow control and liveness)."""

import asyncio
from collections.abc import Mapping
from typing import Final

from shared.bus.roster import Roster
from shared.wire import errors
from shared.wire.messages import Cancel, Credit
from workers.provider.mux import Mux, Pair

#: An ingress that is not heard for so long is gone, or cannot hear us: its upstream calls are cancelled and settled.
UNHEARD_S: Final = 5.0
LOOK_S: Final = 0.5
#: A look that is so late means that our own loop stood still: everybody is granted one beat.
LATE_S: Final = 0.25
GRACE_S: Final = 0.5
#: What waits for a client that takes nothing is dropped after this many times CLIENT_STALLED_MS: an ingress cuts such a
#: client by itself, direct publishers may not.
STALLED_TIMES: Final = 1.5


class Control:
    """Owns one timer; `message` is called for each control message."""

    def __init__(
        self, mux: Mux, rosters: Mapping[str, Roster], loop: asyncio.AbstractEventLoop, client_stalled_s: float
    ) -> None:
        self._stalled_s = client_stalled_s * STALLED_TIMES
        self._mux = mux
        self._rosters = rosters
        self._loop = loop
        self._due = loop.time() + LOOK_S
        self._timer = loop.call_at(self._due, self._look)

    def message(self, message: Cancel | Credit) -> None:
        """A cancel of an unknown stream is ignored: it crossed with the terminal."""
        if isinstance(message, Credit):
            self._mux.credit(message)
            return
        self._mux.hear(message.role, message.instance)
        channel = self._mux.find(message.role, message.instance, message.stream, message.delivery)
        if channel is not None:
            channel.close()
            channel.on_cancel(message.reason)

    def close(self) -> None:
        """No more looks."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        late = now - self._due > LATE_S
        self._due = now + LOOK_S
        self._timer = self._loop.call_at(self._due, self._look)
        for (role, instance), pair in list(self._mux.pairs()):
            if late:
                pair.heard = max(pair.heard, now - UNHEARD_S + GRACE_S)
            roster = self._rosters.get(role)
            beat = roster.heard(instance) if roster is not None else None
            if beat is not None and beat > pair.heard:
                pair.heard = beat
            self._cut(pair, now)

    def _cut(self, pair: Pair, now: float) -> None:
        silent = now - pair.heard > UNHEARD_S
        for channel in list(pair.channels.values() if silent else pair.waiting.values()):
            if silent:
                channel.give_up(errors.WorkerLost().body())  # an asker that was frozen reads it when it thaws
                channel.on_cancel("unheard")
            elif now - channel.stalled_since > self._stalled_s:
                channel.give_up(errors.NotRead().body())
                channel.on_cancel("stalled")
