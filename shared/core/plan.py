"""Which endpoints a request may call, in order, and how many calls it may make in all (I7)."""

from collections.abc import Callable

from shared.wire.messages import Plan, Step

#: endpoint id -> shared-clock ms until which it is out of rotation; 0 = closed. One map look-up (S2-05).
OpenUntil = Callable[[str], int]


def make_plan(steps: tuple[Step, ...], open_until: OpenUntil, now: int, max_retries: int) -> Plan | None:
    """The operator's order without the endpoints whose circuit is open (S2-21); None when none is left.

    `max_retries` is ROUTING_MAX_RETRIES (S1-L4): calls after the first, over all endpoints and deliveries.
    """
    left = tuple(step for step in steps if open_until(step.endpoint) <= now)
    return Plan(steps=left, max_calls=1 + max_retries) if left else None


def soonest(steps: tuple[Step, ...], open_until: OpenUntil, now: int) -> int:
    """Milliseconds until the first of these circuits lets calls pass again, at least 1: for Retry-After (D15)."""
    return max(1, min((open_until(step.endpoint) - now for step in steps), default=1))
