"""What a provider's bill means for a call, and how its lines are read (I1; hostile files)."""

import json
from typing import Any

import pytest

from shared.core.reconcile import Decision, Known, decide
from shared.wire.bill import Billed, read_line

RID = "0123456789abcdef" * 2
LINE: dict[str, Any] = {
    "request_id": f"{RID}.1", "model": "m", "endpoint": "e", "input_tokens": 5, "output_tokens": 7, "cost_nano_usd": 60,
}  # fmt: skip


@pytest.mark.parametrize(
    ("known", "cost", "expected"),
    [
        (None, 60, Decision("unknown", 60)),
        (Known(state="settled", posted=60), 60, Decision("right")),
        (Known(state="settled", posted=60), 61, Decision("wrong", 1, "correct")),
        (Known(state="settled", posted=60, entry=False), 50, Decision("wrong", -10, "correct")),
        (Known(state="settled", posted=60, estimated=True), 60, Decision("estimated", 0, "correct")),
        (Known(state="settled", posted=60, estimated=True), 50, Decision("estimated", -10, "correct")),
        (Known(state="settled", posted=60, estimated=True, entry=False), 60, Decision("right")),
        (Known(state="unconfirmed"), 60, Decision("unconfirmed", 60, "correct")),
        (Known(state="posted", posted=100, estimated=True), 60, Decision("bound", -40, "correct")),
        (Known(state="dispatched", running=True), 60, Decision("running")),
        (Known(state="dispatched"), 60, Decision("unconfirmed", 60, "correct")),
        (Known(state="reserved", running=True), 60, Decision("running")),
        (Known(state="reserved"), 60, Decision("unconfirmed", 60, "correct")),
        (Known(state="voided"), 60, Decision("unbooked", 60, "correct")),
        (Known(state="voided", entry=False), 60, Decision("unbooked", 60, "settle")),
        (Known(state="none"), 60, Decision("unbooked", 60, "correct")),
        (Known(state="none"), 0, Decision("right")),
    ],
)
def test_decisions(known: Known | None, cost: int, expected: Decision):
    assert decide(known, cost) == expected


def test_a_line():
    """As the issue writes it; what else an export tells is left alone."""
    assert read_line(json.dumps(LINE).encode() + b"\n") == Billed(RID, 1, 60)
    assert read_line(json.dumps(LINE | {"request_id": f"{RID}.64", "note": [1]}).encode()) == Billed(RID, 64, 60)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("cost_nano_usd", value) for value in (-1, 1.5, 60.0, "60", None, True, 2**53, [60])),
        *(("input_tokens", value) for value in (-1, "5", None)),
        *(("request_id", value) for value in
          ("", RID, f"{RID}.", f"{RID}.0", f"{RID}.01", f"{RID}.65", f"{RID}.-1", f"{RID.upper()}.1", f"{RID}.1\n", 5,
           f"{RID}.1.1", f"x{RID}.1", f"{RID}.¹")),
        ("model", ""), ("model", "m" * 257), ("endpoint", 3),
    ],
)  # fmt: skip
def test_a_line_that_is_none(field: str, value: Any):
    """Nothing is guessed: a number in quotes, a fraction, a sign, or a request id that is none is refused."""
    with pytest.raises(ValueError, match=r"."):
        read_line(json.dumps(LINE | {field: value}).encode())


@pytest.mark.parametrize(
    "line",
    [
        b"", b"[]", b"{", b"null", b"\xff\xfe", json.dumps(LINE).encode()[:-1] + b', "cost_nano_usd": 1}',
        json.dumps(LINE).encode() * 2, json.dumps(LINE).encode().replace(b"60", b"NaN"),
        json.dumps(LINE | {"model": "m" * 70_000}).encode(),
        *(json.dumps({k: v for k, v in LINE.items() if k != name}).encode() for name in LINE),
    ],
)  # fmt: skip
def test_what_is_no_line(line: bytes):
    """Broken, doubled, too long, a field twice or missing."""
    with pytest.raises(ValueError, match=r"."):
        read_line(line)
