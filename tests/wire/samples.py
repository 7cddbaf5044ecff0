"""One of each message with every field filled in, the same as a newer build writes it, and bytes nobody can read."""

from typing import Any, Final

import msgspec
from msgspec import Struct

from shared.wire import messages as m
from shared.wire import records as r

PRICE: Final = m.Price(150_000_000, 75_000_000, 600_000_000)
HOPS: Final = (m.Hop("ingress", "in1", 1, 2, 3), m.Hop("guardian", "g1", 4, 5, 6))
ASK: Final = m.Ask(
    rid="ab" * 16, delivery=2, lost="p0", tenant="t", key="k", reply=m.ReplyTo("ingress", "in1", 7), label="l",
    model="sim-fast", stream=True, include_usage=True, max_output=9, n=2, done="append", timeout_ms=5000, deadline=99,
    trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01", epoch=3, body=b"{}",
)  # fmt: skip
ADMISSION: Final = m.Admission(
    reserved=True, amount=5, estimate=4, input_tokens=3, output_cap=2, price=PRICE, status="degraded", overhead_us=1
)
PLAN: Final = m.Plan(steps=(m.Step("one", "m-1"), m.Step("two", "m-2")), max_calls=3)
SUMMARY: Final = m.Summary(
    call=1, endpoint="one", model="m-1", cost=5, input_tokens=4, output_tokens=3, cached_tokens=2, estimated=True,
    settled=False, payload=b"{}",
)  # fmt: skip
ERROR: Final = m.ErrorBody(status=503, code="c", type="t", message="m", param="p", retry_after_ms=5)

FRAMES: Final[tuple[m.Frame, ...]] = (
    m.Accepted(7, 1, 0, "p1", 1),
    m.Refused(7, 1, 0, "p1", 2),
    m.Delta(7, 1, 1, b"text", {"X-BR-Calls": "1"}),
    m.End(7, 1, 2, SUMMARY, HOPS),
    m.Failed(7, 1, 2, ERROR, {"X-BR-Calls": "1"}, HOPS),
)

#: Decoder of shared/wire/messages.py -> what it reads.
SAMPLES: Final[dict[str, tuple[Struct, ...]]] = {
    "decode_admit": (m.Admit(ask=ASK, hops=HOPS),),
    "decode_route": (m.Route(ask=ASK, admission=ADMISSION, hops=HOPS),),
    "decode_call": (m.Call(ask=ASK, admission=ADMISSION, plan=PLAN, hops=HOPS),),
    "decode_batch": (m.Batch(1, "provider", "p1", 5, [msgspec.Raw(m.encode(frame)) for frame in FRAMES]),),
    "decode_frame": FRAMES,
    "decode_control": (
        m.Cancel(role="ingress", instance="in1", stream=7, delivery=1, reason="r"),
        m.Credit(role="ingress", instance="in1", read=5, streams=((7, 1, 4), (8, 1, 3))),
    ),
    "decode_beat": (
        m.Beat(role="guardian", instance="g1", pid=1, in_flight=2, capacity=3, draining=True, metrics="http://x/metrics"),
    ),
    "decode_outcomes": (
        m.Outcomes(calls=(m.Outcome("one", ok=True), m.Outcome("two", ok=False, probe="x", verdict=False))),
    ),
}  # fmt: skip
RECORD: Final = r.UsageRecord(
    tenant="t", rid="ab" * 16, call=2, key="k", user="u", day=20_000, model="m", endpoint="one", cost=12_345,
    estimated=True, line="1700000000000-1", at=1_700_000_000_001, input_tokens=9, cached_tokens=1, output_tokens=8,
    cache_write_5m=2, cache_write_1h=3, audio_input=1, audio_output=1, reasoning=4, input_estimate=7, epoch=5,
    raw=b"{}",
)  # fmt: skip
#: The same of shared/wire/records.py.
STORED: Final[dict[str, tuple[Struct, ...]]] = {
    "decode_stored": (
        r.UsageBatch(instance="p1", number=7, at=1_700_000_000_002, records=(RECORD,), late=True),
        r.BalanceSnapshot(tenant="t", line="1-1", at=5, part=0, parts=2, fields={"t:lifetime": "1 0 0"}),
    ),
}

_DEEP: Final = b"\x91" * 5000 + b"\xc0"  # arrays within arrays
#: What only a broken or hostile writer sends; msgspec answers with three kinds of error.
NOISE: Final = (
    b"", b"\xc1", b"\xff", b"\x80", b"\x90", b"\xc0", b"\x00", _DEEP, b"\xd9\xff", b"\xde\xff\xff",
    b"\x81\xa1z" + _DEEP,  # RecursionError in a field that is skipped
    b"\x81\xa4kind\xa2\xff\xfe",  # UnicodeDecodeError
    b"\x97\xa2\xff\xfe", b"\x96\xa1d\x01\x01\x01" + _DEEP, b"\x95\x01\xa1p\xa1p\x00\xc7\xff\xff",
)  # fmt: skip


def newer(value: Any) -> Any:
    """The plain objects a newer build writes for this: a new key in every map, new elements behind every array."""
    if isinstance(value, Struct):
        config = value.__struct_config__
        fields = [newer(getattr(value, name)) for name in value.__struct_fields__]
        if config.array_like:
            return [*([] if config.tag is None else [config.tag]), *fields, {"new": [1, {"deeper": b"x"}]}, None, -1]
        tag = {} if config.tag is None else {config.tag_field: config.tag}
        return {"another": [[[]]], **tag, **dict(zip(value.__struct_fields__, fields, strict=True)), "new": {"a": 1.5}}
    return [newer(item) for item in value] if isinstance(value, list | tuple) else value
