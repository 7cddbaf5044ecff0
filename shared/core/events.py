"""What the stream machine (shared/core/stream.py) tells its driver to do, in order."""

from msgspec import Struct

from shared.wire.messages import ErrorBody, Hop, Summary


class Deliver(Struct, frozen=True):
    """Hand the request over as this delivery; `lost` names the provider instance found dead. It may be begun within so
    many seconds from now."""

    delivery: int
    lost: str = ""
    within: float = 0.0


class Write(Struct, frozen=True):
    """Bytes for the client. `head` only with the first ones."""

    data: bytes
    head: dict[str, str] | None = None


class Discard(Struct, frozen=True):
    """What was written is void: the client has seen nothing of a whole answer until its end, and it begins anew."""


class Finish(Struct, frozen=True):
    """The good terminal."""

    summary: Summary
    hops: tuple[Hop, ...] = ()


class Fail(Struct, frozen=True):
    """The bad terminal; `started`: text was given out before."""

    error: ErrorBody
    started: bool
    head: dict[str, str] | None = None
    hops: tuple[Hop, ...] = ()


class Stop(Struct, frozen=True):
    """Tell this instance to give up that delivery."""

    instance: str
    delivery: int
    reason: str


Event = Deliver | Write | Discard | Finish | Fail | Stop
Events = tuple[Event, ...]
