"""A cost is the sum of its parts rounded up once (D2), and a bound is a bound whatever the split (D1)."""

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import money, pricing
from shared.core.translators.base import Usage
from shared.wire.messages import Admission, Price, Step

rates = st.integers(0, 10_000 * money.NANO)
counts = st.integers(0, 2_000_000)
prices = st.builds(Price, rates, rates, rates, *[st.integers(-1, 10_000 * money.NANO)] * 4)
usages = st.builds(Usage, *[counts] * 8)
DEAR, CHEAP = Price(2000, 1000, 8000), Price(1000, 500, 4000)


def test_parts_that_are_not_given_cost_what_the_whole_does() -> None:
    """A Price of a build that knows three parts has them all here; nothing is resolved while a call is priced."""
    price = Price(100, 50, 400)
    assert price == Price(100, 50, 400, 100, 100, 100, 400)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([100, 50, 400]), type=Price) == price
    assert Price(100, 50, 400, 125, 200, 0, 800) == Price(100, 50, 400, 125, 200, 0, 800)
    assert price.audio_input == 100  # and 0 above was kept: free is a price


def test_cost_is_the_sum_rounded_up_once() -> None:
    """Three parts of 0.4 nano each are 2 nano, not 3 (rounding each) and not 1 (rounding down)."""
    assert pricing.cost(Price(400_000, 400_000, 400_000), Usage(1, 1, 1)) == 2


@given(prices, usages)
def test_cost_equals_decimal_arithmetic(price: Price, usage: Usage) -> None:
    """Each part once, reasoning not beside the output it is part of."""
    exact = (
        Decimal(usage.uncached) * price.input
        + Decimal(usage.cache_read) * price.cached_input
        + Decimal(usage.cache_write_5m) * price.cache_write_5m
        + Decimal(usage.cache_write_1h) * price.cache_write_1h
        + Decimal(usage.audio_input) * price.audio_input
        + Decimal(usage.text_output) * price.output
        + Decimal(usage.audio_output) * price.audio_output
    ) / 1_000_000
    assert 0 <= pricing.cost(price, usage) - exact < 1


@given(prices, usages, st.integers(0, 10**9))
def test_no_split_of_the_tokens_passes_the_upper_bound(price: Price, usage: Usage, floor: int) -> None:
    """D1, I2: whatever a provider bills within the bound fits the reservation."""
    bound = pricing.upper_bound(price, usage.input_tokens, usage.output_tokens, floor)
    assert pricing.cost(price, usage) <= bound


def test_the_floor_holds_for_priced_models_only() -> None:
    """S0-16: at least $0.001; a free model needs no money."""
    assert pricing.upper_bound(Price(1, 1, 1), 1, 1, 1_000_000) == 1_000_000
    assert pricing.upper_bound(Price(0, 0, 0), 10**6, 10**6, 1_000_000) == 0
    assert pricing.upper_bound(Price(0, 0, 0, 0, 0, 0, 5), 10**6, 10**6, 1) == 5  # audio alone costs


@given(st.builds(Usage, *[st.integers(-(10**6), 10**6)] * 8))
def test_no_usage_makes_a_cost_negative(usage: Usage) -> None:
    """Faults 77: negative counts from a provider."""
    assert pricing.cost(Price(150, 75, 600), usage) >= 0


@given(st.lists(prices, min_size=1, max_size=4), usages)
def test_the_dearest_is_no_cheaper_than_any(some: list[Price], usage: Usage) -> None:
    """D1: part by part."""
    dearest = pricing.dearest(some)
    assert all(pricing.cost(price, usage) <= pricing.cost(dearest, usage) for price in some)
    assert pricing.dearest([some[0]]) == some[0]


def test_a_call_is_billed_at_its_own_endpoints_price() -> None:
    """I1: also where an endpoint serves two models at two prices; old admissions have one price for all."""
    one, two = Step("a", "m"), Step("b", "m")
    admission = Admission(
        reserved=True, amount=1, estimate=0, input_tokens=1, output_cap=1, price=DEAR, prices={"b": CHEAP}
    )
    assert [pricing.price_of(admission, step) for step in (one, two)] == [DEAR, CHEAP]
    both = msgspec.structs.replace(admission, prices={pricing.key_of(Step("b", "small")): CHEAP})
    assert [pricing.price_of(both, Step("b", name)) for name in ("m", "small")] == [DEAR, CHEAP]
    assert pricing.price_of(msgspec.structs.replace(admission, prices={}), two) == DEAR


def test_cheapest_share() -> None:
    """D13: what the cheapest would have charged for this usage, of what was charged."""
    usage = Usage(1_000_000, 0, 0)
    assert pricing.cheapest_share([DEAR, CHEAP], usage, pricing.cost(DEAR, usage)) == 0.5
    assert pricing.cheapest_share([DEAR, CHEAP], usage, pricing.cost(CHEAP, usage)) == 1.0
    assert pricing.cheapest_share([DEAR], usage, 1) == 1.0  # never above
    assert pricing.cheapest_share([], usage, 5) == 1.0
    assert pricing.cheapest_share([Price(0, 0, 0)], usage, 0) == 1.0


@pytest.mark.parametrize(("model", "expected"), [("anthropic/claude-sonnet-4", (125, 200)), ("gpt-4o", (100, 100))])
def test_cache_writes_by_the_published_rule(model: str, expected: tuple[int, int]) -> None:
    """Rounded up: never below what the provider takes."""
    assert pricing.writes(model, 100) == expected
    assert pricing.writes("claude", 1) == (2, 2)


@given(
    prices, st.integers(0, 10**6), st.integers(1, 16), st.integers(1, 10**6), st.integers(0, 10**13),
    st.integers(0, 10**7),
)  # fmt: skip
def test_a_lowered_cap_is_the_most_that_is_paid_for(
    price: Price, tokens: int, choices: int, cap: int, held: int, floor: int
) -> None:
    """I2, clamping: never above what is held, and not one token below what it would pay for."""
    found = pricing.affordable_cap(price, tokens, choices, cap, held, floor)
    assert 0 <= found <= cap
    if found:
        assert pricing.upper_bound(price, tokens, choices * found, floor) <= held
    if found < cap:
        assert pricing.upper_bound(price, tokens, choices * (found + 1), floor) > held
