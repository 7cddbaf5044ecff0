"""Which endpoints a request may call, in order, and how many calls it may make in all (I7)."""

from collections.abc import Callable
from typing import Final

from shared.core.circuit import Circuit, state, wait_ms
from shared.wire.messages import Plan, Step

#: endpoint id -> its circuit, None when that is closed. One map look-up (S2-05).
Look = Callable[[str], Circuit | None]
#: Whether this request is the one that tries a half_open endpoint.
Turn = Callable[[str], bool]

#: Retry-After is at least a second (D15); a verdict on a probe rarely takes longer.
MIN_RETRY_MS: Final = 1000


def make_plan(steps: tuple[Step, ...], look: Look, now: int, max_retries: int, turn: Turn) -> Plan | None:
    """The operator's order without the endpoints that may not be called now (S2-21); None when none is left.

    A half_open endpoint needs a call to close again, even while others serve (S1-C2e); but each call to it is a risk.
    So it comes first for the request whose `turn` it is, which may be its one probe and has the others behind it, and
    last for everybody else. Nothing but half_open ones and nobody's turn: no plan, or all would queue for one probe.

    `max_retries` is ROUTING_MAX_RETRIES (S1-L4): calls after the first, over all endpoints and deliveries.
    """
    closed = [step for step in steps if look(step.endpoint) is None]
    if len(closed) == len(steps):
        return Plan(steps=steps, max_calls=1 + max_retries)
    ready = [step for step in steps if (found := look(step.endpoint)) is not None and state(found, now) == "half_open"]
    probe = next((step for step in ready if turn(step.endpoint)), None)
    if probe is not None:
        ready.remove(probe)
        return Plan(steps=(probe, *closed, *ready), max_calls=1 + max_retries)
    return Plan(steps=(*closed, *ready), max_calls=1 + max_retries) if closed else None


def soonest(steps: tuple[Step, ...], look: Look, now: int) -> int:
    """Milliseconds until the first of these endpoints may be called again, as far as is known: for Retry-After."""
    waits = [wait_ms(found, now) if (found := look(step.endpoint)) is not None else 0 for step in steps]
    return max(MIN_RETRY_MS, min(waits, default=0))
