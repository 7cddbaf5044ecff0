"""The breaker's policy, as a table and as a property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import circuit
from shared.core.circuit import CLOSED, Circuit, Policy

POLICY = Policy(threshold=5, cooldown_ms=30_000)
outcomes = st.lists(st.booleans(), max_size=40)


def test_five_failures_in_a_row_open_it_for_the_cooldown():
    """S2-20, S1-C2b."""
    four = circuit.after(CLOSED, [False] * 4, 1000, POLICY)
    assert circuit.state(four, 1000) == "closed"
    five = circuit.after(four, [False], 1000, POLICY)
    assert five.open_until == 31_000
    assert circuit.state(five, 30_999) == "open"
    assert circuit.state(five, 31_000) == "half_open"


def test_a_success_clears_the_count():
    assert circuit.after(CLOSED, [False] * 4 + [True] + [False] * 4, 0, POLICY).open_until == 0


def test_what_ends_while_it_is_open_changes_nothing():
    """S1-C2d: a late success must not close it, a late failure must not prolong the cooldown."""
    opened = circuit.after(CLOSED, [False] * 5, 0, POLICY)
    assert circuit.after(opened, [True, False, True], 10_000, POLICY) == opened


@pytest.mark.parametrize(("ok", "state"), [(True, "closed"), (False, "open")])
def test_the_next_call_after_the_cooldown_decides(ok, state):
    opened = circuit.after(CLOSED, [False] * 5, 0, POLICY)
    assert circuit.state(circuit.after(opened, [ok], 30_000, POLICY), 30_001) == state


def test_the_table_is_complete():
    assert set(circuit.TRANSITIONS) == {(s, ok) for s in ("closed", "open", "half_open") for ok in (True, False)}


@given(outcomes, outcomes, st.integers(1, 8))
def test_batches_may_be_cut_anywhere(first, second, threshold):
    """Outcomes of one moment give the same circuit in one batch or in two."""
    policy = Policy(threshold=threshold, cooldown_ms=100)
    at_once = circuit.after(CLOSED, first + second, 7, policy)
    assert circuit.after(circuit.after(CLOSED, first, 7, policy), second, 7, policy) == at_once


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=60))
def test_it_never_stays_open_longer_than_the_cooldown_after_the_last_failure(events):
    policy, now, last_failure, held = Policy(threshold=3, cooldown_ms=100), 0, 0, Circuit()
    for ok, wait in events:
        now += wait
        held = circuit.after(held, [ok], now, policy)
        last_failure = last_failure if ok else now
        assert held.open_until <= last_failure + 100
