"""The short answer: one error frame straight to the asker, from a worker that cannot pass the request on."""

import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from shared.bus.base import BadSubject, Bus, BusUnavailable, PayloadTooLarge
from shared.wire import subjects
from shared.wire.errors import HotpathError
from shared.wire.messages import VERSION, Ask, Batch, ErrorBody, Failed, Hop, ReplyTo, encode

#: Who may be answered (DESIGN 3): whatever else an envelope names is not a place frames go to.
ASKERS: Final = frozenset({"ingress", "loadgen"})

COMPLAIN_S: Final = 5.0  # at most one log line about unreadable messages in this time


def address(reply: ReplyTo) -> str:
    """The subject frames for `reply` go to. Raises BadSubject: an envelope's fields come from outside."""
    if reply.role not in ASKERS or subjects.TOKEN.match(reply.instance) is None:
        raise BadSubject("not an asker's address")
    return subjects.reply(reply.role, reply.instance)


def fail(
    bus: Bus,
    role: str,
    instance: str,
    ask: Ask,
    error: HotpathError | ErrorBody,
    *,
    head: dict[str, str] | None = None,
    hops: tuple[Hop, ...] = (),
    seq: int = 0,
) -> None:
    """Publish one Batch with one Failed frame, from `role`/`instance`. Raises what `Bus.publish` raises.

    The batch carries offset 0: it brings no Delta bytes, and readers keep the highest offset they saw.
    """
    body = error.body() if isinstance(error, HotpathError) else error
    frame = Failed(ask.reply.stream, ask.delivery, seq, body, head, hops)
    batch = Batch(VERSION, role, instance, 0, [msgspec.Raw(encode(frame))])
    bus.publish(address(ask.reply), encode(batch))


class Refusals:
    """What one role refuses or cannot read, answered where an answer is possible, and counted by code."""

    def __init__(self, bus: Bus, role: str, instance: str, log: logging.Logger, count: Callable[[str], None]) -> None:
        self.unreadable = 0
        self._bus = bus
        self._role = role
        self._instance = instance
        self._log = log
        self._count = count
        self._complained = 0.0

    def fail(self, ask: Ask, error: HotpathError, hops: tuple[Hop, ...], head: dict[str, str] | None = None) -> None:
        """Answer with this error. Never raises: when the bus is away the asker's own timers tell it."""
        self._count(error.code)
        try:
            fail(self._bus, self._role, self._instance, ask, error, head=head, hops=hops)
        except BadSubject:
            self.drop()
        except (BusUnavailable, PayloadTooLarge):
            pass  # see above

    def drop(self) -> None:
        """Count a message that is not ours; say so now and then."""
        self.unreadable += 1
        self._count("unreadable")
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_S:
            self._complained = now
            self._log.warning("messages that could not be read were dropped", extra={"so_far": self.unreadable})
