"""Integer money: what goes in as decimal text comes out as such (D2, D12), and a bound is a bound (D1)."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import money, pricing
from shared.wire.messages import Price

rates = st.integers(0, 10_000 * money.NANO)
counts = st.integers(0, 2_000_000)
prices = st.builds(Price, rates, rates, rates)


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


def test_cost_is_the_sum_rounded_up_once():
    """Three parts of 0.4 nano each are 2 nano, not 3 (rounding each) and not 1 (rounding down)."""
    price = Price(400_000, 400_000, 400_000)
    assert pricing.cost(price, input_tokens=2, cached_tokens=1, output_tokens=1) == 2


@given(prices, counts, counts, counts)
def test_cost_equals_decimal_arithmetic(price, fresh, cached, output):
    exact = (
        Decimal(fresh) * price.input + Decimal(cached) * price.cached_input + Decimal(output) * price.output
    ) / 1_000_000
    got = pricing.cost(price, input_tokens=fresh + cached, cached_tokens=cached, output_tokens=output)
    assert 0 <= got - exact < 1


@given(prices, counts, counts, st.data(), st.integers(0, 10**9))
def test_no_split_of_the_tokens_passes_the_upper_bound(price, most_in, most_out, data, floor):
    """D1, I2: whatever a provider bills within the bound fits the reservation."""
    used_in = data.draw(st.integers(0, most_in))
    cached = data.draw(st.integers(0, used_in))
    used_out = data.draw(st.integers(0, most_out))
    bound = pricing.upper_bound(price, most_in, most_out, floor)
    assert pricing.cost(price, input_tokens=used_in, cached_tokens=cached, output_tokens=used_out) <= bound


def test_the_floor_holds_for_priced_models_only():
    """S0-16: at least $0.001; a free model needs no money."""
    assert pricing.upper_bound(Price(1, 1, 1), 1, 1, 1_000_000) == 1_000_000
    assert pricing.upper_bound(Price(0, 0, 0), 10**6, 10**6, 1_000_000) == 0


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_no_usage_makes_a_cost_negative(given_in, given_cached, given_out):
    """Faults 77: negative counts, and more cached than input, from a provider."""
    price = Price(150, 75, 600)
    got = pricing.cost(price, input_tokens=given_in, cached_tokens=given_cached, output_tokens=given_out)
    assert 0 <= got <= pricing.upper_bound(price, max(given_in, 0), max(given_out, 0), 0)
