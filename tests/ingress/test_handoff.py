"""How long an ingress waits for `Accepted` before it delivers again (DESIGN 3, liveness)."""

from ingress.deliver import Handoff


def test_lasting_load_stretches_it_to_twice_the_p99() -> None:
    handoff = Handoff(0.5)
    for number in range(10_000):
        handoff.observe(0.4 if number % 20 == 0 else 0.01, number * 0.01)
    assert 0.7 < handoff.seconds < 0.9


def test_the_thaw_of_a_thousand_requests_is_one_event() -> None:
    """DESIGN 5: else the next freeze was told after 3.1 s instead of 1.9 (measured at 220 requests/s)."""
    handoff = Handoff(0.5)
    for thaw in range(4):
        for number in range(1000):
            handoff.observe(0.45, thaw + number * 0.00001)
    assert handoff.seconds == 0.5


def test_it_never_outlasts_the_time_in_which_a_delivery_may_be_begun() -> None:
    handoff = Handoff(0.5)
    for number in range(10_000):
        handoff.observe(30.0, number * 0.01)
    assert handoff.seconds == 1.5
