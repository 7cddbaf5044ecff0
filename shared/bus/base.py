"""What the rest of the code may ask of a message bus. `NatsBus` and `MemoryBus` pass the same tests (tests/bus)."""

from collections.abc import Callable
from typing import Protocol

#: handler(subject, reply, payload): called on the event loop for each message, in order; must not block or raise.
#: `no_responders` tells NATS's 503 (an empty message to our own inbox) from an empty payload.
Handler = Callable[[str, str, bytes, bool], None]


class BusUnavailable(Exception):
    """The connection is down: nothing was sent (a publish while disconnected fails at once, it is never buffered)."""


class NotAllowed(BusUnavailable):
    """The server's allow-lists, or its list of users, refuse this: trying again changes nothing."""


class PayloadTooLarge(Exception):
    """Larger than the server's max_payload: nothing was sent."""


class BadSubject(Exception):
    """Not a subject this code may use (see `wire.subjects.SUBJECT`)."""


class Subscription(Protocol):
    """A live subscription."""

    async def drain(self) -> None:
        """No new messages; returns when those received have been handled."""


class Bus(Protocol):
    """Publish and subscribe, checked."""

    errors: dict[str, int]
    """What went wrong since the start, by kind: each was logged too."""

    @property
    def connected(self) -> bool:
        """Whether a publish would be sent now."""

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes."""

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send in this turn of the loop. Raises BusUnavailable, PayloadTooLarge, BadSubject: nothing was sent then."""

    async def subscribe(self, pattern: str, handler: Handler, queue: str = "") -> Subscription:
        """Deliver matching messages to `handler`; returns once the server has the subscription."""

    async def flush(self) -> None:
        """Everything published before has reached the server."""

    async def close(self) -> None:
        """Flush and close."""
