"""The breaker's rule, as a table and as properties."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import circuit
from shared.core.circuit import CLOSED, MAX_PROBES, SLOT_MS, Circuit, Event, Policy

POLICY = Policy()
COOLDOWN = 30_000


def calls(*marks: str) -> list[tuple[Event, str]]:
    """Ordinary calls: "+-" is a good one and then a failed one."""
    return [("good" if mark == "+" else "failed", "") for mark in "".join(marks)]


def claimed(at: int, probe: str = "p", held: Circuit | None = None) -> Circuit:
    """A circuit opened at 0, with a probe claimed."""
    opened = circuit.after(CLOSED, calls("-----"), 0, POLICY)
    return circuit.after(held or opened, [("claim", probe)], at, POLICY)


def test_five_failures_in_a_row_open_it_for_the_cooldown():
    """S2-20, S1-C2b."""
    four = circuit.after(CLOSED, calls("----"), 1000, POLICY)
    assert circuit.state(four, 1000) == "closed"
    five = circuit.after(four, calls("-"), 1000, POLICY)
    assert five.open_until == 31_000
    assert circuit.state(five, 30_999) == "open"
    assert circuit.wait_ms(five, 30_999) == 1
    assert circuit.state(five, 31_000) == "half_open"
    assert circuit.wait_ms(five, 31_000) == 0


def test_a_success_clears_the_count():
    assert circuit.after(CLOSED, calls("----+----"), 0, POLICY).open_until == 0


@pytest.mark.parametrize(
    ("marks", "opens"),
    [("+-+-+-+-+-", True), ("+-+-+-+-+", False), ("++-+-+-+-+", False), ("++-+-+-+-+--", True), ("--+--+--++", True)],
)
def test_half_of_ten_calls_open_it(marks, opens):
    """S2-20, S1-M2a: errors over requests of the same window, from ten requests on; the tenth may be a good one."""
    assert (circuit.after(CLOSED, calls(marks), 0, POLICY).open_until > 0) == opens


def test_calls_leave_the_window_after_sixty_seconds():
    """S2-20: nine failures of a minute ago do not count any more."""
    held = CLOSED
    for _ in range(3):
        held = circuit.after(held, calls("--+"), 0, POLICY)
    later = circuit.after(held, calls("+"), 60_000, POLICY)
    assert later.open_until == 0
    assert [slot.calls for slot in later.window] == [1]
    assert circuit.after(held, calls("+"), 60_000 - 1, POLICY).open_until > 0


def test_a_threshold_above_ten_asks_the_error_rate_for_as_much():
    """Whoever sets CIRCUIT_FAILURE_THRESHOLD out of reach has no breaker."""
    policy = Policy(threshold=1_000_000)
    assert circuit.after(CLOSED, calls("-" * 500), 0, policy).open_until == 0


def test_what_ends_while_it_is_not_closed_changes_nothing():
    """S1-C2d: a late success must not close it, a late failure must not prolong the cooldown, in any state."""
    opened = circuit.after(CLOSED, calls("-----"), 0, POLICY)
    for at in (10_000, COOLDOWN):
        assert circuit.after(opened, calls("+-+"), at, POLICY) == opened
    probing = claimed(COOLDOWN)
    assert circuit.after(probing, calls("+-+"), COOLDOWN + 1, POLICY) == probing


def test_one_probe():
    """S1-C2a, S1-C2c: while a probe is younger than 5 s nobody else passes; then one more may."""
    first = claimed(COOLDOWN, "a")
    assert circuit.state(first, COOLDOWN) == "probing"
    assert circuit.after(first, [("claim", "b")], COOLDOWN + 4999, POLICY) == first
    assert circuit.wait_ms(first, COOLDOWN + 4000) == 1000
    second = circuit.after(first, [("claim", "b")], COOLDOWN + 5000, POLICY)
    assert (second.probes, second.probe_until) == (("a", "b"), COOLDOWN + 10_000)


def test_only_a_probe_that_was_claimed_decides():
    """S1-C2d."""
    probing = claimed(COOLDOWN, "a")
    for event in ("probe_good", "probe_failed", "probe_void"):
        assert circuit.after(probing, [(event, "b")], COOLDOWN, POLICY) == probing
    assert circuit.after(probing, [("probe_good", "a")], COOLDOWN, POLICY) == CLOSED


def test_a_failed_probe_restarts_the_cooldown_twice_as_long():
    """S1-C2d, S2-21: no immediate second probe; 30 s, 60 s ... 480 s, never more."""
    held, now, cooldowns = claimed(COOLDOWN, "0"), COOLDOWN, []
    for number in range(7):
        held = circuit.after(held, [("probe_failed", str(number))], now, POLICY)
        cooldowns.append(held.open_until - now)
        assert circuit.after(held, [("claim", "x")], now, POLICY) == held
        now = held.open_until
        held = circuit.after(held, [("claim", str(number + 1))], now, POLICY)
    assert cooldowns == [COOLDOWN * 2**n for n in (1, 2, 3, 4, 4, 4, 4)]
    closed = circuit.after(held, [("probe_good", "7")], now, POLICY)
    assert circuit.after(closed, calls("-----"), now, POLICY).open_until == now + COOLDOWN


def test_a_silent_probe_still_decides_when_it_ends():
    """S1-C2e: an endpoint that takes 8 s to answer, with traffic: every probe is overtaken, the first answer closes."""
    two = circuit.after(claimed(COOLDOWN, "a"), [("claim", "b")], COOLDOWN + 5000, POLICY)
    assert circuit.after(two, [("probe_good", "a")], COOLDOWN + 8000, POLICY) == CLOSED
    reopened = circuit.after(two, [("probe_failed", "a")], COOLDOWN + 8000, POLICY)
    assert circuit.state(reopened, COOLDOWN + 8000) == "open"
    assert circuit.after(reopened, [("probe_good", "b")], COOLDOWN + 9000, POLICY) == reopened


def test_a_probe_without_a_verdict_makes_room_at_once():
    """Its client left, or the endpoint said 429: another one may try, and the first is forgotten."""
    free = circuit.after(claimed(COOLDOWN, "a"), [("probe_void", "a")], COOLDOWN + 10, POLICY)
    assert circuit.state(free, COOLDOWN + 10) == "half_open"
    assert free.probes == ()
    two = circuit.after(claimed(COOLDOWN, "a"), [("claim", "b"), ("probe_void", "a")], COOLDOWN + 5000, POLICY)
    assert (two.probes, circuit.state(two, COOLDOWN + 5001)) == (("b",), "probing")


def test_probes_without_a_verdict_are_bounded():
    held = None
    for number in range(30):
        held = claimed(COOLDOWN + 5000 * number, str(number), held)
    assert held is not None
    assert held.probes == tuple(str(number) for number in range(30 - MAX_PROBES, 30))


def test_the_table_knows_every_state_and_event():
    states, events = {s for s, _ in circuit.TRANSITIONS}, {e for _, e in circuit.TRANSITIONS}
    assert states == set(get_args(circuit.State)) - {"open"}
    assert events == set(get_args(Event))


EVENTS = st.tuples(st.sampled_from(get_args(Event)), st.sampled_from("abc"))


@given(st.lists(EVENTS, max_size=30), st.lists(EVENTS, max_size=30), st.integers(1, 8))
def test_batches_may_be_cut_anywhere(first, second, threshold):
    """Events of one moment give the same circuit in one batch or in two."""
    policy = Policy(threshold=threshold, cooldown_ms=100)
    at_once = circuit.after(CLOSED, first + second, 7, policy)
    assert circuit.after(circuit.after(CLOSED, first, 7, policy), second, 7, policy) == at_once


@given(st.lists(st.tuples(EVENTS, st.integers(0, 3 * SLOT_MS)), max_size=80))
def test_it_can_always_close_again_and_stays_small(events):
    """S1-C2e: whatever happened, after the longest cooldown a probe may be claimed, and its success closes."""
    policy, now, held = Policy(threshold=2, cooldown_ms=100, min_requests=4), 0, CLOSED
    for event, wait in events:
        now += wait
        held = circuit.after(held, [event], now, policy)
        assert held.open_until <= now + 1600
        assert len(held.window) <= circuit.SLOTS
        assert len(held.probes) <= MAX_PROBES
    now += 7000
    held = circuit.after(held, [("claim", "z")], now, policy)
    assert circuit.after(held, [("probe_good", "z")], now, policy).open_until == 0
