"""What a stream is, what it holds, and that it may be away (jetstream.py, consumer.py)."""

from typing import Final

from msgspec import Struct

NS: Final = 1_000_000  # nanoseconds of a millisecond: JetStream's own unit


class StreamUnavailable(Exception):
    """JetStream did not answer in time, is not there, is full, or refused: what was published may be stored or not."""


class StreamPlan(Struct, frozen=True, kw_only=True):
    """What the stream is to be: limits retention, nothing dropped for new messages (`discard=new`), files, s2."""

    name: str
    subject: str
    max_age_ms: int
    max_bytes: int
    replicas: int = 1


class Stored(Struct, frozen=True):
    """One message of the stream. `at` is ms of the NATS server's clock; `deliveries` counts from 1; `reply` is where it
    is acknowledged."""

    sequence: int
    at: int
    deliveries: int
    payload: bytes
    reply: str


class StreamState(Struct, frozen=True):
    """What the stream holds; `last` is the sequence of its newest message, 0 when it never had one."""

    messages: int
    bytes: int
    first: int
    last: int
