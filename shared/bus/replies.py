"""The short answer: one error frame straight to the asker, from a worker that cannot pass the request on."""

from typing import Final

import msgspec

from shared.bus.base import BadSubject, Bus
from shared.wire import subjects
from shared.wire.errors import HotpathError
from shared.wire.messages import VERSION, Ask, Batch, ErrorBody, Failed, Hop, ReplyTo, encode

#: Who may be answered (DESIGN 3): whatever else an envelope names is not a place frames go to.
ASKERS: Final = frozenset({"ingress", "loadgen"})


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
