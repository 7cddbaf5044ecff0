"""A bus inside one process: several clients on one broker, with NATS's behaviour as the tests in tests/bus state it.

For tests of whole requests in one process. Deliveries go through `loop.call_soon` in the order they were published, so
a publish never runs a handler. Tests can cut a client off, and lose or double the k-th message of a subject.
"""

import asyncio
import logging
import random
import re
from collections.abc import Callable
from typing import Final

from shared.bus import checks
from shared.bus.base import BusUnavailable, Handler

MAX_PAYLOAD: Final = 2 * 1024 * 1024

_log: Final = logging.getLogger("hotpath.bus")


class _Fault:
    """What happens to the k-th message published to a pattern."""

    def __init__(self, pattern: str, kth: int, copies: int) -> None:
        self.matches = _matcher(pattern)
        self.left = kth
        self.copies = copies


class Broker:
    """What the clients share. `dice` picks among the members of a queue group."""

    def __init__(self, *, max_payload: int = MAX_PAYLOAD, dice: random.Random | None = None) -> None:
        self.max_payload = max_payload
        self.dice = dice or random.Random(0)  # noqa: S311 - who of a group is no secret
        self.published: list[str] | None = None  # a list here records every subject published
        #: What the server itself does with a message: takes it (subject, payload, reply) or not. See memory_jetstream.
        self.service: Callable[[str, bytes, str], bool] = lambda _subject, _payload, _reply: False
        self._subscriptions: list[MemorySubscription] = []
        self._faults: list[_Fault] = []

    def client(self, name: str, on_change: Callable[[bool], None] | None = None) -> "MemoryBus":
        """A new, connected client."""
        return MemoryBus(self, name, on_change)

    def drop(self, pattern: str, kth: int = 1) -> None:
        """Lose the k-th message published to `pattern` from now on."""
        self._faults.append(_Fault(pattern, kth, 0))

    def duplicate(self, pattern: str, kth: int = 1) -> None:
        """Deliver the k-th message published to `pattern` from now on twice."""
        self._faults.append(_Fault(pattern, kth, 2))

    def add(self, subscription: "MemorySubscription") -> None:
        """A client's subscription begins."""
        self._subscriptions.append(subscription)

    def remove(self, subscription: "MemorySubscription") -> None:
        """It ends; twice does no harm."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def route(self, publisher: "MemoryBus", subject: str, payload: bytes, reply: str) -> None:
        """Deliver one message, or NATS's 503 to the publisher's own inbox when nobody is subscribed."""
        if self.published is not None:
            self.published.append(subject)
        copies = self._copies(subject)
        plain: list[MemorySubscription] = []
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        for subscription in self._subscriptions:
            if subscription.client.connected and subscription.matches(subject):
                if subscription.queue:
                    groups.setdefault((subscription.queue, subscription.pattern), []).append(subscription)
                else:
                    plain.append(subscription)
        receivers = plain + [self.dice.choice(group) for group in groups.values()]
        for receiver in receivers:
            for _ in range(copies):
                receiver.deliver(subject, reply, payload, no_responders=False)
        if not self.service(subject, payload, reply) and not receivers and reply:
            for subscription in self._subscriptions:
                if subscription.client is publisher and subscription.matches(reply):
                    subscription.deliver(reply, "", b"", no_responders=True)

    def answer(self, inbox: str, payload: bytes, subject: str = "", reply: str = "") -> None:
        """What the server itself sends to an inbox, under that or another subject."""
        for subscription in self._subscriptions:
            if subscription.client.connected and subscription.matches(inbox):
                subscription.deliver(subject or inbox, reply, payload, no_responders=False)

    def _copies(self, subject: str) -> int:
        copies = 1
        for fault in list(self._faults):
            if fault.matches(subject):
                fault.left -= 1
                if fault.left == 0:
                    self._faults.remove(fault)
                    copies = fault.copies
        return copies


class MemorySubscription:
    """One client's interest in a pattern."""

    def __init__(self, client: "MemoryBus", pattern: str, handler: Handler, queue: str) -> None:
        self.client = client
        self.pattern = pattern
        self.queue = queue
        self.matches = _matcher(pattern)
        self._handler = handler
        self._loop = asyncio.get_running_loop()

    def deliver(self, subject: str, reply: str, payload: bytes, *, no_responders: bool) -> None:
        """Queue one message for the handler."""
        self._loop.call_soon(self._handle, subject, reply, payload, no_responders)

    def _handle(self, subject: str, reply: str, payload: bytes, no_responders: bool) -> None:
        try:
            self._handler(subject, reply, payload, no_responders)
        except Exception:  # noqa: BLE001 - the door of the bus: a handler's fault must not cost others their messages
            self.client.errors["handler"] = self.client.errors.get("handler", 0) + 1
            _log.exception("bus handler failed", extra={"subject": subject})

    async def drain(self) -> None:
        """No new messages; returns when those received have been handled."""
        self.client.broker.remove(self)
        handled = self._loop.create_future()
        self._loop.call_soon(handled.set_result, None)
        await handled


class MemoryBus:
    """One client of a Broker: the Bus of base.py."""

    def __init__(self, broker: Broker, name: str, on_change: Callable[[bool], None] | None = None) -> None:
        self.broker = broker
        self.name = name
        self.errors: dict[str, int] = {}
        self._on_change = on_change
        self._connected = True
        self._checks = checks.Checks()
        self._subscriptions: list[MemorySubscription] = []

    @property
    def connected(self) -> bool:
        """Whether a publish would be sent now."""
        return self._connected

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes."""
        return self.broker.max_payload

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Deliver in the next turn of the loop. Raises BusUnavailable, PayloadTooLarge, BadSubject."""
        self._checks.subject(subject)
        if reply:
            self._checks.reply(reply)
        checks.size(payload, self.max_payload)
        if not self._connected:
            raise BusUnavailable("the bus is disconnected")
        self.broker.route(self, subject, payload, reply)

    async def subscribe(self, pattern: str, handler: Handler, queue: str = "") -> MemorySubscription:
        """Deliver matching messages to `handler`, also after a disconnect. Raises BadSubject."""
        checks.pattern(pattern, queue)
        subscription = MemorySubscription(self, pattern, handler, queue)
        self._subscriptions.append(subscription)
        self.broker.add(subscription)
        return subscription

    async def flush(self) -> None:
        """Everything published before has reached the broker. Raises BusUnavailable."""
        if not self._connected:
            raise BusUnavailable("the bus is disconnected")
        await asyncio.sleep(0)

    async def close(self) -> None:
        """Flush and close."""
        for subscription in self._subscriptions:
            self.broker.remove(subscription)
        self._connected = False

    def cut(self, connected: bool = False) -> None:
        """Lose the connection, or with True get it back, as a test says."""
        if connected != self._connected:
            self._connected = connected
            if self._on_change is not None:
                self._on_change(connected)


def _matcher(pattern: str) -> Callable[[str], bool]:
    """NATS's wildcards: `*` is one token, a last `>` one or more."""
    body = re.escape(pattern).replace(r"\*", r"[^.]+")
    body = re.sub(r">\Z", ".+", body.replace(r"\>", ">"))
    match = re.compile(body + r"\Z").match
    return lambda subject: match(subject) is not None
