"""Which endpoints a request may call."""

from hypothesis import given
from hypothesis import strategies as st

from shared.core.plan import make_plan, soonest
from shared.wire.messages import Step

STEPS = (Step("a", "m1"), Step("b", "m2"), Step("c", "m3"))


def test_catalogue_order_without_open_circuits():
    """S2-21: an open endpoint is removed from rotation, the others keep the operator's order."""
    plan = make_plan(STEPS, {"a": 0, "b": 2000, "c": 1000}.__getitem__, now=1000, max_retries=2)
    assert plan is not None
    assert plan.steps == (STEPS[0], STEPS[2])
    assert plan.max_calls == 3


def test_no_plan_when_every_circuit_is_open():
    """D15: Retry-After is the soonest of them."""
    open_until = {"a": 1500, "b": 1200, "c": 9000}.__getitem__
    assert make_plan(STEPS, open_until, now=1000, max_retries=2) is None
    assert soonest(STEPS, open_until, 1000) == 200


@given(st.lists(st.integers(0, 100), min_size=3, max_size=3), st.integers(0, 100), st.integers(0, 8))
def test_a_plan_is_what_is_closed_or_nothing(times, now, retries):
    """I7: never more calls than 1 + ROUTING_MAX_RETRIES, never an endpoint that is open."""
    open_until = dict(zip("abc", times, strict=True)).__getitem__
    plan = make_plan(STEPS, open_until, now, retries)
    closed = tuple(step for step in STEPS if open_until(step.endpoint) <= now)
    assert (plan.steps if plan else ()) == closed
    assert plan is None or plan.max_calls == 1 + retries
    assert soonest(STEPS, open_until, now) >= 1
