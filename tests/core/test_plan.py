"""Which endpoints a request may call."""

from hypothesis import given
from hypothesis import strategies as st

from shared.core.circuit import Circuit, state
from shared.core.plan import make_plan, soonest
from shared.wire.messages import Step

A, B, C = STEPS = (Step("a", "m1"), Step("b", "m2"), Step("c", "m3"))
NOW = 1000
OPEN, HALF_OPEN = Circuit(5, 1, 9000), Circuit(5, 1, 900)
PROBING = Circuit(5, 1, 900, ("p",), 5900)


def planned(*, turn: bool = True, **circuits: Circuit) -> str:
    """The endpoints of the Plan in order, "" without one."""
    plan = make_plan(STEPS, circuits.get, NOW, 2, lambda _endpoint: turn)
    assert plan is None or plan.max_calls == 3
    return "".join(step.endpoint for step in plan.steps) if plan else ""


def test_catalogue_order_without_open_circuits():
    """S2-21: an open endpoint is removed from rotation, the others keep the operator's order."""
    assert planned() == "abc"
    assert planned(b=OPEN) == "ac"
    assert planned(a=OPEN, c=PROBING) == "b"


def test_a_half_open_endpoint_is_tried_first_by_one_and_last_by_all_others():
    """S1-C2e: it closes again even while the others serve, and not everybody goes there."""
    assert planned(b=HALF_OPEN) == "bac"
    assert planned(b=HALF_OPEN, turn=False) == "acb"
    assert planned(a=HALF_OPEN, c=HALF_OPEN) == "abc"
    assert planned(a=HALF_OPEN, c=HALF_OPEN, turn=False) == "bac"


def test_a_turn_is_taken_for_one_endpoint_only():
    """A request is one probe at most; the next one may try the other endpoint."""
    asked: list[str] = []

    def turn(endpoint: str) -> bool:
        asked.append(endpoint)
        return True

    assert make_plan(STEPS, {"a": HALF_OPEN, "b": HALF_OPEN}.get, NOW, 2, turn) is not None
    assert asked == ["a"]


def test_no_plan_when_nobody_may_call():
    """S1-C2a: nothing but half open circuits is for the one whose turn it is. D15: Retry-After is the soonest."""
    assert planned(a=OPEN, b=OPEN, c=PROBING) == ""
    assert planned(a=OPEN, b=OPEN, c=HALF_OPEN, turn=False) == ""
    assert planned(a=OPEN, b=OPEN, c=HALF_OPEN) == "c"
    assert soonest(STEPS, {"a": OPEN, "b": OPEN, "c": PROBING}.__getitem__, NOW) == 4900
    assert soonest(STEPS, {"a": OPEN, "b": OPEN, "c": HALF_OPEN}.__getitem__, NOW) == 1000


circuits = st.one_of(
    st.none(), st.builds(Circuit, st.just(5), st.just(1), st.integers(1, 2000), st.just(("p",)), st.integers(0, 2000))
)


@given(st.lists(circuits, min_size=3, max_size=3), st.integers(0, 2000), st.integers(0, 8), st.booleans())
def test_a_plan_is_what_may_be_called_or_nothing(found, now, retries, turn):
    """I7: never more calls than 1 + ROUTING_MAX_RETRIES, never an endpoint twice, never one that is open or probed."""
    look = dict(zip("abc", found, strict=True)).__getitem__
    plan = make_plan(STEPS, look, now, retries, lambda _endpoint: turn)
    steps = plan.steps if plan else ()
    assert len(set(steps)) == len(steps)
    for step in STEPS:
        circuit = look(step.endpoint)
        if circuit is None:
            assert step in steps
        elif state(circuit, now) != "half_open":
            assert step not in steps
    assert plan is None or plan.max_calls == 1 + retries
    assert soonest(STEPS, look, now) >= 1000
