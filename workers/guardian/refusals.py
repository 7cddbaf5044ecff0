"""What a client is told when money or a rate limit stops its request: whose limit, how much, and when to come back."""

from typing import Final

from shared.core.head import show_span
from shared.core.money import show_usd
from shared.state.base import Bucket, Reserved
from shared.wire import headers
from shared.wire.errors import EstimateExceeded, InsufficientBudget, RateLimited

_WHOSE: Final = {"t": "this tenant", "k": "this key", "u": "this user"}
_PERIODS: Final = {"day": "daily budget", "month": "monthly budget", "lifetime": "budget"}
_KINDS: Final = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}

#: An empty bucket of a minute is full after.
FULL_MS: Final = 60_000


def _whose(level: str) -> str:
    return _WHOSE.get(level[:1], "this tenant")


def over_budget(answer: Reserved, amount: int, least: int) -> InsufficientBudget:
    """402: a reservation was denied. `amount` was asked for; `least` > 0 would have done, with a lower output cap."""
    budget = f"The {_PERIODS.get(answer.period, 'budget')} of {_whose(answer.level)}"
    needs = f"up to {show_usd(amount)}"
    if 0 < least < amount:
        needs += f", and {show_usd(least)} at the least"
    return InsufficientBudget(
        f"{budget} does not cover this request: it needs {needs}, {show_usd(max(answer.left, 0))} is left."
    )


def over_estimate(estimate: int, most: int) -> EstimateExceeded:
    """402: S2-12's seatbelt."""
    return EstimateExceeded(
        f"This request is estimated at {show_usd(estimate)}, above the {show_usd(most)} of {headers.MAX_ESTIMATE}."
    )


def over_rate(answer: Reserved, tokens: int) -> RateLimited:
    """429 in OpenAI's words, which clients read.

    A prompt larger than the limit gets the time in which a bucket fills, for clients that want a Retry-After with every
    429 (S1-M5a); `x-should-retry: false` says that it never fits.
    """
    counted = answer.counted
    bucket = counted and (counted.requests if answer.period == "requests" else counted.tokens)
    limit, left = (bucket.limit, bucket.left) if isinstance(bucket, Bucket) else (0, 0)
    need = 1 if answer.period == "requests" else tokens
    on = f"{_whose(answer.level)} on {_KINDS.get(answer.period, answer.period)}: Limit {limit}, "
    if answer.wait_ms < 0:
        return RateLimited(
            f"Request too large for {on}Requested {need}. It can never fit: its prompt must be reduced.",
            retry_after_ms=FULL_MS,
        )
    wait = max(answer.wait_ms, 1)
    return RateLimited(
        f"Rate limit reached for {on}Left {left}, Requested {need}. Please try again in {show_span(wait)}.",
        retry_after_ms=wait,
    )
