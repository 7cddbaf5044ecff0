"""Who gets the next message (DESIGN 1: beats, 1.5 s, power of two; DESIGN 3: dead, grace)."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.roster import ALIVE_S, FORGET_GAP_S, MAX_INSTANCES, OVERDUE_S, Roster
from shared.wire.messages import Beat


def beat(instance: str, in_flight: int = 0, *, draining: bool = False, role: str = "guardian") -> Beat:
    return Beat(role=role, instance=instance, in_flight=in_flight, draining=draining)


def roster_of(*beats: Beat, now: float = 0.0) -> Roster:
    roster = Roster("guardian")
    for one in beats:
        roster.on_beat(one, now)
    return roster


def picks(roster: Roster, now: float, times: int = 400, skip: frozenset[str] = frozenset()) -> dict[str | None, int]:
    dice = random.Random(1)
    chosen: dict[str | None, int] = {}
    for _ in range(times):
        one = roster.pick(now, skip, dice)
        chosen[one] = chosen.get(one, 0) + 1
    return chosen


def test_an_empty_roster_has_nobody() -> None:
    assert Roster("guardian").pick(0.0) is None


def test_a_beat_is_good_for_one_and_a_half_seconds() -> None:
    roster = roster_of(beat("a"))
    assert roster.pick(ALIVE_S - 0.001) == "a"
    assert roster.pick(ALIVE_S) is None
    assert [b.instance for b in roster.alive(ALIVE_S - 0.001)] == ["a"]
    assert roster.alive(ALIVE_S) == []
    roster.on_beat(beat("a"), 9.0)
    assert roster.pick(9.0) == "a"


def test_the_silent_leave_while_others_beat_on() -> None:
    roster = roster_of(beat("a"), beat("b"))
    assert set(picks(roster, 0.1)) == {"a", "b"}
    roster.on_beat(beat("b"), 1.0)
    assert set(picks(roster, 1.6)) == {"b"}


def test_who_does_not_reach_redis_is_the_last_resort() -> None:
    """S1-M6a: a worker that started while Redis is away can only refuse, one that alone is cut off refuses half;
    they get work while there is nobody better. In an outage of all, those who know the tenants have it."""
    new = msgspec.structs.replace(beat("new"), loaded=False, reaching=False)
    cut_off = msgspec.structs.replace(beat("cut"), reaching=False)
    roster = roster_of(new, cut_off, beat("old", 50))
    assert picks(roster, 0.1) == {"old": 400}
    roster.on_beat(msgspec.structs.replace(beat("old", 0), reaching=False), 0.1)
    assert set(picks(roster, 0.1)) == {"old", "cut"}
    roster.dead("old")
    roster.dead("cut")
    assert picks(roster, 0.1) == {"new": 400}
    roster.on_beat(beat("old", 50), 0.2)
    roster.on_beat(beat("new"), 0.2)
    assert set(picks(roster, 0.2)) == {"new"}


def test_who_is_overdue_is_asked_only_when_nobody_is_in_time() -> None:
    """faults 17: a frozen instance gets requests for half of the time in which it counts as alive."""
    roster = roster_of(beat("a"), beat("b", 90))
    roster.on_beat(beat("b", 90), 0.5)
    assert picks(roster, OVERDUE_S - 0.01) == {"a": 400}  # in time, and has less to do
    assert picks(roster, OVERDUE_S) == {"b": 400}
    assert {b.instance for b in roster.alive(OVERDUE_S)} == {"a", "b"}
    assert picks(roster, OVERDUE_S, skip=frozenset("b")) == {"a": 400}
    assert picks(roster, 0.5 + OVERDUE_S) == {"a": 400}  # both are overdue: as if both were in time
    roster.on_beat(beat("a"), 1.3)
    assert picks(roster, 1.3) == {"a": 400}
    roster.on_beat(beat("b"), 1.35)
    assert set(picks(roster, 1.4)) == {"a", "b"}


def test_the_less_loaded_of_two_is_taken() -> None:
    roster = roster_of(beat("idle", 0), beat("busy", 50))
    assert picks(roster, 0.1) == {"idle": 400}


def test_what_was_sent_since_the_last_beat_counts_as_load() -> None:
    roster = roster_of(beat("a", 3), beat("b", 0))
    order = []
    for _ in range(8):
        one = roster.pick(0.1, dice=random.Random(1))
        assert one is not None
        roster.sent(one)
        order.append(one)
    assert order[:3] == ["b", "b", "b"]
    assert order.count("a") >= 2  # evenly from then on
    roster.on_beat(beat("b", 0), 0.2)  # tells again: nothing in flight
    assert picks(roster, 0.2) == {"b": 400}


def test_who_declined_counts_as_full_until_its_next_beat() -> None:
    """Issue 3: one hot guardian of two; nobody else is not worse than it, so it is still taken when alone."""
    hot = Beat(role="guardian", instance="hot", in_flight=3, capacity=100)
    roster = roster_of(hot, beat("b", 50))
    assert picks(roster, 0.1) == {"hot": 400}
    roster.full("hot")
    assert picks(roster, 0.1) == {"b": 400}
    assert roster.pick(0.1, {"b"}) == "hot"
    roster.full("nobody")
    roster.on_beat(hot, 0.2)
    assert picks(roster, 0.2) == {"hot": 400}


def test_a_beat_replaces_what_was_counted_since_the_last_one() -> None:
    roster = roster_of(beat("a", 3), beat("b", 0))
    for _ in range(10):
        roster.sent("b")
    assert picks(roster, 0.1) == {"a": 400}
    roster.on_beat(beat("b", 2), 0.2)
    assert picks(roster, 0.2) == {"b": 400}


def test_one_that_was_silent_is_back_with_its_first_beat() -> None:
    roster = roster_of(beat("a"), beat("b"))
    roster.on_beat(beat("b"), 1.4)
    assert set(picks(roster, 1.6)) == {"b"}
    roster.on_beat(beat("a"), 1.7)
    assert set(picks(roster, 1.7)) == {"a", "b"}


def test_equal_loads_are_spread() -> None:
    roster = roster_of(*(beat(name) for name in "abcd"))
    chosen = picks(roster, 0.1)
    assert set(chosen) == set("abcd")
    assert min(chosen.values()) > 50


def test_draining_ones_are_alive_and_get_nothing() -> None:
    roster = roster_of(beat("a"), beat("b"))
    picks(roster, 0.1)
    roster.on_beat(beat("a", draining=True), 0.2)
    assert picks(roster, 0.2) == {"b": 400}
    assert {b.instance for b in roster.alive(0.2)} == {"a", "b"}


def test_skipped_ones_get_nothing() -> None:
    roster = roster_of(beat("a"), beat("b"), beat("c"))
    assert set(picks(roster, 0.1, skip=frozenset({"a", "x"}))) == {"b", "c"}
    assert picks(roster, 0.1, skip=frozenset({"a", "b", "c"})) == {None: 400}


def test_the_dead_are_out_until_their_next_beat() -> None:
    roster = roster_of(beat("a"))
    roster.dead("a")
    roster.dead("never heard of")
    assert roster.pick(0.1) is None
    assert roster.heard("a") is None
    assert roster.alive(0.1) == []
    roster.on_beat(beat("a"), 0.5)
    assert roster.pick(0.5) == "a"
    assert roster.heard("a") == 0.5


def test_an_own_stall_gives_everybody_one_beat_of_grace() -> None:
    """DESIGN 3: who was alive when our loop stopped may have been beating all the time."""
    roster = roster_of(beat("alive"), now=10.0)
    roster.on_beat(beat("long gone"), 5.0)
    roster.on_beat(beat("dead"), 10.0)
    roster.dead("dead")
    assert roster.pick(14.0) is None
    roster.grace(14.0, 3.5)
    assert picks(roster, 14.0) == {"alive": 400}
    assert roster.pick(14.49) == "alive"
    assert roster.pick(14.5) is None


@pytest.mark.parametrize(
    "wrong", [beat("a", role="routing"), beat(""), beat("a.b"), beat("a b"), beat("x" * 65), beat("a\r\nPUB b 0")]
)
def test_beats_that_are_not_believed(wrong: Beat) -> None:
    roster = roster_of(wrong)
    assert len(roster) == 0
    assert roster.ignored == 1


def test_bounded_the_silent_leave_first() -> None:
    roster = Roster("guardian")
    for number in range(MAX_INSTANCES + 10):
        roster.on_beat(beat(f"old{number}"), 0.0)
    assert len(roster) == MAX_INSTANCES
    assert roster.ignored == 10
    roster.on_beat(beat("new"), 2.0)
    assert len(roster) == 1
    assert roster.pick(2.0) == "new"


def test_a_flood_of_instances_walks_the_members_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """I10: who may send beats of a role must not stop those that read them."""
    walks: list[float] = []
    forget = Roster._forget

    def counted(self: Roster, now: float) -> None:
        walks.append(now)
        forget(self, now)

    monkeypatch.setattr(Roster, "_forget", counted)
    roster = Roster("guardian")
    for number in range(2 * MAX_INSTANCES):
        roster.on_beat(beat(f"i{number}"), number / (2 * MAX_INSTANCES))  # all within a second
    assert 1 <= len(walks) <= 10
    roster.on_beat(beat("new"), 2.0)
    assert roster.heard("new") == 2.0
    roster.on_beat(beat("another"), 2.0 + FORGET_GAP_S)
    assert roster.heard("another") is not None


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["beat", "drain", "dead", "sent", "pick", "grace"]),
        st.sampled_from("abcd"),
        st.floats(0, 0.9),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(0, 2**32))
def test_a_pick_is_always_somebody_who_may_be_picked(events: list[tuple[str, str, float]], seed: int) -> None:
    """Against a model without the roster's remembered pool: never a silent, dead, draining one; never nobody while
    there is somebody."""
    roster, dice = Roster("guardian"), random.Random(seed)
    heard: dict[str, float] = {}
    draining: dict[str, bool] = {}
    now = 0.0
    for what, who, wait in events:
        now += wait
        if what in {"beat", "drain"}:
            roster.on_beat(beat(who, draining=what == "drain"), now)
            heard[who], draining[who] = now, what == "drain"
        elif what == "dead":
            roster.dead(who)
            heard.pop(who, None)
        elif what == "sent":
            roster.sent(who)
        elif what == "grace":
            roster.grace(now, wait)
            heard |= {k: max(v, now - 1.0) for k, v in heard.items() if now - wait - v < ALIVE_S}
        alive = {k: now - v for k, v in heard.items() if now - v < ALIVE_S and not draining[k]}
        expected = {k for k, age in alive.items() if age < OVERDUE_S} or set(alive)
        chosen = roster.pick(now, dice=dice)
        assert chosen in expected if expected else chosen is None
