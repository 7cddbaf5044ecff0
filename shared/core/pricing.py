"""What tokens cost: integer nano-USD, rounded up once per call, from prices in nano-USD per million tokens."""

from collections.abc import Iterable
from typing import Final

from shared.core.translators.base import Usage
from shared.wire.messages import Admission, Price, Step

PER: Final = 1_000_000  # tokens a price is quoted for

#: Cache writes as a percentage of the input price, where a price list says nothing: Anthropic's published rule
#: (platform.claude.com/docs, "Prompt caching"): 1.25 times for 5 minutes, 2 times for an hour. Others charge input.
_CLAUDE_WRITES: Final = (125, 200)


def cost(price: Price, usage: Usage) -> int:
    """Nano-USD of one call, each part priced once; rounded up, once.

    Counts come from a provider: negative ones count as 0 (faults 77). Reasoning is in the text output already.
    """
    total = (
        max(usage.uncached, 0) * price.input
        + max(usage.cache_read, 0) * price.cached_input
        + max(usage.text_output, 0) * price.output
    )
    if usage.cache_write_5m or usage.cache_write_1h or usage.audio_input or usage.audio_output:
        total += (
            max(usage.cache_write_5m, 0) * price.cache_write_5m
            + max(usage.cache_write_1h, 0) * price.cache_write_1h
            + max(usage.audio_input, 0) * price.audio_input
            + max(usage.audio_output, 0) * price.audio_output
        )
    return -(-total // PER)


def upper_bound(price: Price, input_tokens: int, output_tokens: int, floor: int) -> int:
    """Nano-USD that no call with at most these tokens can pass, however a provider splits them into parts (D1); at
    least `floor`; 0 when the model is free."""
    per_input = dearest_input(price)
    per_output = max(price.output, price.audio_output)
    if per_input == per_output == 0:
        return 0
    return max(-(-(input_tokens * per_input + output_tokens * per_output) // PER), floor)


def dearest_input(price: Price) -> int:
    """What an input token costs at most, whatever part it is counted in."""
    return max(price.input, price.cached_input, price.cache_write_5m, price.cache_write_1h, price.audio_input)


def affordable_cap(price: Price, input_tokens: int, choices: int, cap: int, held: int, floor: int) -> int:
    """The most output tokens a choice, at most `cap`, whose `upper_bound` is at most `held` nano-USD; 0: none."""
    if upper_bound(price, input_tokens, choices * cap, floor) <= held:
        return cap
    fits, too_many = 0, cap
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if upper_bound(price, input_tokens, choices * middle, floor) <= held:
            fits = middle
        else:
            too_many = middle
    return fits


def dearest(prices: Iterable[Price]) -> Price:
    """Part by part, the dearest of at least one: what a request that may reach any of them is reserved at (D1)."""
    return Price(*map(max, zip(*(_parts(price) for price in prices), strict=True)))


def key_of(step: Step) -> str:
    """Under what a step's own price stands in `Admission.prices` when its endpoint serves the model under several
    names at several prices; the endpoint's id (which has no blank) where it has one price."""
    return f"{step.endpoint} {step.model}"


def price_of(admission: Admission, step: Step) -> Price:
    """What a call to this step is billed at: its own price, pinned when the request was admitted (I1)."""
    prices = admission.prices
    if not prices:
        return admission.price
    return prices.get(key_of(step)) or prices.get(step.endpoint) or admission.price


def cheapest_share(prices: Iterable[Price], usage: Usage, actual: int) -> float:
    """D13's second factor: min(1, the cheapest of these prices for this usage / what it cost); 1 for a free call."""
    if actual <= 0:
        return 1.0
    return min(1.0, min((cost(price, usage) for price in prices), default=actual) / actual)


def writes(model: str, price_in: int) -> tuple[int, int]:
    """Prices of a cache write for 5 minutes and for an hour where nobody gives one, by the upstream model's name."""
    short, long = _CLAUDE_WRITES if "claude" in model else (100, 100)
    return -(-price_in * short // 100), -(-price_in * long // 100)


def _parts(price: Price) -> tuple[int, ...]:
    return tuple(getattr(price, part) for part in price.__struct_fields__)
