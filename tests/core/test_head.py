"""Headers before the first token (S2-23, D12, D15)."""

import pytest

from shared.core.head import guardian_head, rate_limit_head, show_span
from shared.wire.messages import Admission, Price


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0s"), (1, "1ms"), (20, "20ms"), (999, "999ms"), (1000, "1s"), (1010, "1.01s"), (1500, "1.5s"),
     (59_999, "59.999s"), (60_000, "1m0s"), (360_000, "6m0s"), (61_200, "1m1.2s"), (3_605_250, "1h0m5.25s")],
)  # fmt: skip
def test_spans_as_openai_writes_them(ms: int, text: str) -> None:
    assert show_span(ms) == text


def test_the_head() -> None:
    """S2-23: real values; mode off gives no estimate; what else the guardian says comes with it."""
    price = Price(1, 1, 1)
    admission = Admission(
        reserved=True, amount=5, estimate=30_000_000, input_tokens=1, output_cap=1, price=price, overhead_us=1234,
        extra=rate_limit_head("tokens", 6000, 17, 20),
    )  # fmt: skip
    assert guardian_head(admission) == {
        "X-BR-Guardian-Status": "on",
        "X-BR-Estimated-Cost": "$0.03",
        "X-BR-Guardian-Overhead-Ms": "1.2",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "17",
        "x-ratelimit-reset-tokens": "20ms",
    }
    off = Admission(reserved=True, amount=5, estimate=-1, input_tokens=1, output_cap=1, price=price, status="off")
    assert guardian_head(off) == {"X-BR-Guardian-Status": "off", "X-BR-Guardian-Overhead-Ms": "0.0"}
