"""Pace: what comes alone goes at once, what has company shares a write."""

from hypothesis import given
from hypothesis import strategies as st

from shared.core.pace import COMPANY_S, SURE, Pace


def learnt(now: float = 10.0) -> Pace:
    """A connection whose turns had one message each."""
    pace = Pace()
    for _ in range(SURE):
        assert not pace.at_once(now)
        pace.flushed(1)
    return pace


def test_alone_is_learnt_and_unlearnt() -> None:
    pace = learnt()
    assert pace.at_once(20.0)
    assert pace.at_once(20.0 + 2 * COMPANY_S)
    assert not pace.at_once(20.0 + 2.5 * COMPANY_S), "the second of a turn"
    assert not pace.at_once(30.0), "until it is learnt again"


def test_company_is_remembered() -> None:
    pace = Pace()
    for _ in range(10 * SURE):
        for _ in range(SURE - 1):
            pace.flushed(1)
        assert not pace.at_once(50.0)
        pace.flushed(2)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 3))))
def test_two_of_one_turn_never_both_go_ahead(steps: list[tuple[float, int]]) -> None:
    pace, now = learnt(), 20.0
    for gap, count in steps:
        now += gap
        if pace.at_once(now):
            assert not pace.at_once(now + COMPANY_S / 2)
        pace.flushed(count)
