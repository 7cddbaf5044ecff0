"""What crosses a process boundary: requests on their way in, frames on their way back, control, beats.

Everything is msgpack of the Structs below. Requests, control and beats are maps (a reader ignores fields it does not
know, so a rolling restart mixes versions); frames are arrays, the tag first (a reader ignores further elements), since
they are the bulk of the traffic. Times are absolute milliseconds of the shared clock (Redis TIME, DESIGN 3), never of
a wall clock. Money is integer nano-USD. `deploy/WIRE.md` says the same for writers in other languages.

Versions (faults 83). What a reader may ignore is added without a new number: fields at the end, kinds of frames and of
control messages. VERSION changes when an older reader must not try: an envelope of a higher one is refused (503). A
build reads its own version and the one before, and answers in the version it was asked in; `Beat.v` tells what an
instance reads. So neighbours serve side by side during a rolling restart; beats and batches from two versions ahead are
ignored and counted.
"""

from typing import Final, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import force_setattr

VERSION: Final = 1

#: What a decoder raises for bytes that are not ours: msgspec's own errors are ValueErrors, a tag that is no UTF-8 is a
#: UnicodeDecodeError, and a field that is skipped may be nested too deep.
UNREADABLE: Final = (ValueError, RecursionError)


class Price(Struct, frozen=True, array_like=True):
    """What a model costs, in nano-USD per **million** tokens (so that $0.0375 per million stays an integer).

    The last four, when not given (-1, or left out by a build that knows three parts), are what the other parts cost:
    a cache write and audio read are input, audio made is output. So every Price that exists has all its parts.
    """

    input: int
    cached_input: int
    output: int
    cache_write_5m: int = -1
    cache_write_1h: int = -1
    audio_input: int = -1
    audio_output: int = -1

    def __post_init__(self) -> None:
        for part, instead in (
            ("cache_write_5m", self.input),
            ("cache_write_1h", self.input),
            ("audio_input", self.input),
            ("audio_output", self.output),
        ):
            if getattr(self, part) < 0:
                force_setattr(self, part, instead)


class Hop(Struct, frozen=True, array_like=True):
    """One process a request went through (`hotpath trace`). `at` is shared-clock ms, `took_us` its own work."""

    role: str
    instance: str
    pid: int
    at: int
    took_us: int = 0


class ReplyTo(Struct, frozen=True, array_like=True):
    """Where frames go: the role (`ingress` or `loadgen`), its instance id and the number of the stream there."""

    role: str
    instance: str
    stream: int


class Ask(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The envelope: one client request as the ingress (or a direct publisher) hands it over.

    `rid` is 32 hex digits (128 random bits) made by whoever publishes it first. `body` is our own serialisation of the
    strictly parsed client body; from a direct publisher it is the raw JSON and the guardian parses it just as strictly,
    filling the fields marked *. `deadline` 0 means: the guardian sets now + `timeout_ms` (or the default).
    """

    v: int = VERSION
    rid: str
    delivery: int = 1
    lost: str = ""  # a re-delivery after a death names the dead provider instance
    tenant: str
    key: str  # key id, opaque
    reply: ReplyTo
    label: str = ""  # X-Request-ID: correlation only
    model: str = ""  # * what the client asked for, looked up exactly (D6)
    stream: bool = False  # *
    include_usage: bool = False  # * stream_options.include_usage
    max_output: int = 0  # * max_completion_tokens or max_tokens; 0 = not given
    n: int = 1  # *
    done: Literal["inline", "append", "comment"] = "inline"
    timeout_ms: int = 0
    deadline: int = 0
    answer_by: int = 0  # shared-clock ms: this delivery is not begun later, its sender has given it up; 0 = not told
    trace: str = ""  # W3C traceparent
    epoch: int = 0
    user: str = ""  # * opaque id the ingress makes of the body's `user` (16 hex digits): the level of a user's limit
    max_estimate: int = -1  # nano-USD of X-BR-Max-Estimated-Cost (S2-12); -1 = not given
    body: bytes


class Admission(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the guardian decided and reserved. Amounts in nano-USD; `amount` is an upper bound of **one** call (D1)."""

    reserved: bool  # False: the ledger was away and the tenant has no hard limit; never fenced, never re-delivered
    amount: int
    estimate: int  # the advice shown as X-BR-Estimated-Cost (S2-09, S2-10); -1: none is given (mode off)
    input_tokens: int  # upper bound of the prompt
    output_cap: int  # tokens per choice, written into the upstream request
    price: Price  # pinned: settled at the price it was reserved at
    status: str = "on"  # X-BR-Guardian-Status
    overhead_us: int = 0
    user: str = ""  # Ask.user, when that user has a limit: the third level that moves
    day: int = 0  # days since 1970-01-01: the period the ledger charges
    epoch: int = 0  # of the catalogue the prices are from
    hard: bool = False  # a level has a hard limit: money fails closed (D4)
    input_estimate: int = 0  # S2-09's, in tokens: what the output ratio is learned against
    extra: dict[str, str] = {}  # further headers of the answer: x-ratelimit-*, X-BR-Max-Tokens-Clamped
    prices: dict[str, Price] = {}  # endpoint id -> its price, where it is not `price` (pricing.price_of)


class Step(Struct, frozen=True, array_like=True):
    """One endpoint that may be called: the catalogue's endpoint id and the model name to send there."""

    endpoint: str
    model: str


class Plan(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What routing decided: the endpoints in order, and how many upstream calls the request may make in all (I7)."""

    steps: tuple[Step, ...]
    max_calls: int


class Admit(Struct, frozen=True, kw_only=True, tag_field="kind", tag="admit"):
    """ingress -> guardian."""

    ask: Ask
    hops: tuple[Hop, ...] = ()


class Route(Struct, frozen=True, kw_only=True, tag_field="kind", tag="route"):
    """guardian -> routing."""

    ask: Ask
    admission: Admission
    hops: tuple[Hop, ...] = ()


class Call(Struct, frozen=True, kw_only=True, tag_field="kind", tag="call"):
    """routing -> provider."""

    ask: Ask
    admission: Admission
    plan: Plan
    hops: tuple[Hop, ...] = ()


# ---- frames: to reply.<role>.<instance>, several in one Batch --------------------------------------------------------


class ErrorBody(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as the client will see it (OpenAI's shape), with its HTTP status and, when it helps, a wait."""

    status: int
    code: str
    type: str
    message: str
    param: str | None = None
    retry_after_ms: int = 0  # 0 = none


class Summary(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request ended well: the numbers of D5's payload. `cost` is nano-USD; tokens as the provider billed them."""

    call: int
    endpoint: str
    model: str
    cost: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    estimated: bool = False  # counted by us, the provider gave no usable usage
    settled: bool = True  # False: Redis did not answer, the call is left unconfirmed
    payload: bytes = b""  # the x_br JSON, for the `append` and `comment` forms of D5


class Accepted(Struct, frozen=True, array_like=True, tag="a"):
    """A provider won the dispatch and is about to call the upstream. seq counts frames of one delivery from 0."""

    stream: int
    delivery: int
    seq: int
    instance: str
    call: int


class Refused(Struct, frozen=True, array_like=True, tag="r"):
    """The delivery found a live holder: counts as that holder's Accepted."""

    stream: int
    delivery: int
    seq: int
    holder: str
    holder_delivery: int


class Delta(Struct, frozen=True, array_like=True, tag="d"):
    """Bytes ready to write to the client, at most 32 KiB; the first one of a delivery brings the X-BR headers."""

    stream: int
    delivery: int
    seq: int
    data: bytes
    head: dict[str, str] | None = None


class End(Struct, frozen=True, array_like=True, tag="e"):
    """The good terminal: everything was sent and settled."""

    stream: int
    delivery: int
    seq: int
    summary: Summary
    hops: tuple[Hop, ...] = ()


class Failed(Struct, frozen=True, array_like=True, tag="f"):
    """The bad terminal, before or after the first Delta."""

    stream: int
    delivery: int
    seq: int
    error: ErrorBody
    head: dict[str, str] | None = None
    hops: tuple[Hop, ...] = ()


class Unknown(Struct, frozen=True, array_like=True):
    """A frame of a kind this build does not know: it counts in its delivery's seq and does nothing else."""

    kind: str
    stream: int
    delivery: int
    seq: int


Frame = Accepted | Refused | Delta | End | Failed
_KINDS: Final = frozenset("ardef")


class Batch(Struct, frozen=True, array_like=True):
    """One NATS message of frames, in order. `offset` counts all Delta bytes this sender has sent to this receiver,
    these included; the receiver's credit quotes the highest it has read. Frames stay raw so that a reader can skip a
    kind it does not know."""

    v: int
    role: str
    instance: str
    offset: int
    frames: list[msgspec.Raw]


# ---- control: to control.<instance>; an empty message asks "are you there?" and is answered empty --------------------


class Cancel(Struct, frozen=True, kw_only=True, tag_field="kind", tag="cancel"):
    """The asker gave up this delivery: close its upstream, settle what was used."""

    role: str
    instance: str
    stream: int
    delivery: int
    reason: str = ""


class Credit(Struct, frozen=True, kw_only=True, tag_field="kind", tag="credit"):
    """What the asker's clients have taken: per stream (stream, delivery, Delta bytes taken so far, absolute), and the
    highest Batch.offset read from the instance this is sent to. Repeated every 500 ms, so that a lost one heals."""

    role: str
    instance: str
    read: int
    streams: tuple[tuple[int, int, int], ...] = ()


Control = Cancel | Credit


# ---- beside ----------------------------------------------------------------------------------------------------------


class Beat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Says "I live" every 500 ms, to beat.<role>.<instance>."""

    v: int = VERSION
    role: str
    instance: str
    pid: int = 0
    in_flight: int = 0
    capacity: int = 0
    draining: bool = False  # alive, and to be sent nothing
    loaded: bool = True  # it has reached Redis since its start, and so has its copies
    reaching: bool = True  # it reaches Redis now; others are preferred to one that does not
    metrics: str = ""  # URL of the process's /metrics
    booting: bool = False  # draining, and about to take work
    stored: bool = True  # JetStream takes its usage records, as far as it knows


class Outcome(Struct, frozen=True, array_like=True):
    """How one upstream call ended, for the breakers: `ok` False only for what is the endpoint's fault.

    `probe`: the id under which it was its circuit's probe (S1-C2a), "" for an ordinary call. `verdict` False: that
    probe ended without saying anything about the endpoint; `ok` is False then, so that a reader of the version before,
    which knows neither field, keeps the circuit open rather than close it.
    """

    endpoint: str
    ok: bool
    probe: str = ""
    verdict: bool = True


class Outcomes(Struct, frozen=True, kw_only=True):
    """A batch of outcomes in the order they happened."""

    v: int = VERSION
    calls: tuple[Outcome, ...]


# ---- codecs: made once, shared (msgspec's advice) --------------------------------------------------------------------

encode: Final = msgspec.msgpack.Encoder().encode
decode_admit: Final = msgspec.msgpack.Decoder(Admit).decode
decode_route: Final = msgspec.msgpack.Decoder(Route).decode
decode_call: Final = msgspec.msgpack.Decoder(Call).decode
decode_batch: Final = msgspec.msgpack.Decoder(Batch).decode
decode_frame: Final = msgspec.msgpack.Decoder(Accepted | Refused | Delta | End | Failed).decode
_decode_unknown: Final = msgspec.msgpack.Decoder(Unknown).decode
decode_control: Final = msgspec.msgpack.Decoder(Cancel | Credit).decode
decode_beat: Final = msgspec.msgpack.Decoder(Beat).decode
decode_outcomes: Final = msgspec.msgpack.Decoder(Outcomes).decode


def unknown_frame(raw: bytes | msgspec.Raw) -> Unknown | None:
    """What `decode_frame` could not read, when it is of a kind that a newer build knows; None when it is broken: then
    its seq stays missing, and a stream with a hole ends with an error."""
    try:
        frame = _decode_unknown(raw)
    except UNREADABLE:
        return None
    return None if frame.kind in _KINDS else frame
