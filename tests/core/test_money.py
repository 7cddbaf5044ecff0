"""Integer money: what goes in as decimal text comes out as such (D2, D12)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import money


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("5", 5_000_000_000),
        ("$0.001", 1_000_000),
        ("0.0375", 37_500_000),
        ("0", 0),
        ("0.000000001", 1),
        ("00.5", 500_000_000),
    ],
)
def test_usd_is_read_exactly(text, nano):
    assert money.usd_to_nano(text) == nano


@pytest.mark.parametrize(
    "text",
    ["", ".", "1.", ".5", "-1", "+1", "1e3", "NaN", "inf", "1,000", " 1", "1 ", "1\n", "0.0000000001",
     "9007199.254740992", "9999999999", "٣", "1.٣", "$", "$$1", "0x1", "1_0"],
)  # fmt: skip
def test_anything_but_plain_decimals_is_refused(text):
    """D2: no floats, no NaN (which admits everything in Lua), nothing above 2^53 - 1."""
    with pytest.raises(ValueError, match="amount"):
        money.usd_to_nano(text)


@pytest.mark.parametrize(
    ("nano", "text"),
    [(30_000_000, "$0.03"), (28_000_000, "$0.028"), (42_500, "$0.0000425"), (0, "$0.00"), (5 * money.NANO, "$5.00"),
     (1, "$0.000000001"), (-1_500_000_000, "-$1.50"), (money.MAX_NANO, "$9007199.254740991")],
)  # fmt: skip
def test_usd_is_shown_with_the_digits_it_has(nano, text):
    """D12: at least two digits, at most nine."""
    assert money.show_usd(nano) == text


@given(st.integers(0, money.MAX_NANO))
def test_shown_money_reads_back(nano):
    assert money.usd_to_nano(money.show_usd(nano)) == nano
