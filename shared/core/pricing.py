"""What tokens cost: integer nano-USD, rounded up once per call, from prices in nano-USD per million tokens."""

from typing import Final

from shared.wire.messages import Price

PER: Final = 1_000_000  # tokens a price is quoted for


def cost(price: Price, *, input_tokens: int, cached_tokens: int, output_tokens: int) -> int:
    """Nano-USD of one call; `cached_tokens` are part of `input_tokens`. Rounded up, once.

    Counts come from a provider: negative ones count as 0, and cached ones never exceed the input (faults 77).
    """
    whole = max(input_tokens, 0)
    cached = min(max(cached_tokens, 0), whole)
    total = (whole - cached) * price.input + cached * price.cached_input + max(output_tokens, 0) * price.output
    return -(-total // PER)


def upper_bound(price: Price, input_tokens: int, output_tokens: int, floor: int) -> int:
    """Nano-USD that no call with at most these tokens can pass (D1), at least `floor`; 0 when the model is free."""
    if price.input == price.cached_input == price.output == 0:
        return 0
    total = input_tokens * max(price.input, price.cached_input) + output_tokens * price.output
    return max(-(-total // PER), floor)
