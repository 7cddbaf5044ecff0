"""The receiver's state machine, case by case (DESIGN 3: ownership, hand-off, deaths, timers, terminals)."""

import pytest

from shared.core.stream import (
    BACKSTOP_S,
    DONE,
    HELD,
    STARTED,
    WAITING,
    Deliver,
    Discard,
    Event,
    Fail,
    Finish,
    Limits,
    Stop,
    Stream,
    Write,
)
from shared.wire import errors
from shared.wire.messages import Accepted, Delta, End, Failed, Frame, Refused, Summary, Unknown

SUMMARY = Summary(call=1, endpoint="e", model="m", cost=1, input_tokens=1, output_tokens=1)
HANDOFF = 0.5


def stream(**limits: object) -> Stream:
    base = {"streamed": True, "first_token": 10.0, "idle": 10.0, "total": 60.0, "max_bytes": 1000}
    machine = Stream(Limits(**{**base, **limits}), 0.0)  # type: ignore[arg-type]
    assert machine.begin(0.0, HANDOFF) == (Deliver(1, "", 3 * HANDOFF),)
    machine.sent("g1")
    return machine


def feed(machine: Stream, *frames: Frame | Unknown, now: float = 0.1) -> list[Event]:
    return [event for frame in frames for event in machine.frame(frame, f"p{frame.delivery}", now)]


def accepted(delivery: int = 1, call: int = 1, seq: int = 0) -> Accepted:
    return Accepted(7, delivery, seq, f"p{delivery}", call)


def failed(delivery: int, seq: int = 0) -> Failed:
    return Failed(7, delivery, seq, errors.NoWorker().body())


def code(events: object) -> str:
    fails = [event for event in events if isinstance(event, Fail)]  # type: ignore[attr-defined]
    assert len(fails) == 1
    return fails[0].error.code


def test_a_frame_of_an_unknown_kind_takes_its_seq_and_does_nothing_else() -> None:
    """Faults 83: a newer worker may say more than this build knows; a hole is still a hole."""
    machine = stream()
    assert feed(machine, Unknown("new", 7, 1, 0), accepted(seq=1), Unknown("new", 7, 1, 2)) == []
    assert (machine.state, machine.holder) == (HELD, "p1")
    assert feed(machine, Delta(7, 1, 3, b"a"), Unknown("new", 7, 1, 4), Unknown("new", 7, 1, 4)) == [Write(b"a")]
    assert feed(machine, Delta(7, 1, 5, b"b")) == [Write(b"b")]
    assert feed(machine, Unknown("new", 7, 2, 0), Unknown("new", 7, 9, 0)) == []
    assert code(feed(machine, Unknown("new", 7, 1, 7))) == "stream_gap"
    assert feed(machine, Unknown("new", 7, 1, 8)) == []


def test_a_stream_that_goes_well() -> None:
    machine = stream()
    assert feed(machine, accepted()) == []
    assert machine.waits_on() == "p1"
    assert feed(machine, Delta(7, 1, 1, b"a", {"X-BR-Calls": "1"})) == [Write(b"a", {"X-BR-Calls": "1"})]
    assert feed(machine, Delta(7, 1, 2, b"b")) == [Write(b"b")]
    assert machine.received == 2
    assert feed(machine, End(7, 1, 3, SUMMARY)) == [Finish(SUMMARY)]
    assert machine.state == DONE
    assert machine.waits_on() == ""
    assert machine.due == float("inf")


def test_a_repeated_seq_is_dropped_and_a_gap_is_an_error() -> None:
    machine = stream()
    feed(machine, accepted(), Delta(7, 1, 1, b"a"))
    assert feed(machine, accepted(), Delta(7, 1, 1, b"a")) == []
    events = feed(machine, Delta(7, 1, 3, b"c"))
    assert code(events) == "stream_gap"
    assert Stop("p1", 1, "gap") in events
    assert next(e for e in events if isinstance(e, Fail)).started


def test_a_gap_before_anybody_owns_the_stream_is_an_error_too() -> None:
    machine = stream()
    events = feed(machine, Delta(7, 1, 1, b"a"))
    assert code(events) == "stream_gap"
    assert Stop("p1", 1, "gap") in events


def test_nobody_accepts_so_it_is_delivered_again_at_most_four_times_in_all() -> None:
    machine = stream()
    now = 0.0
    for delivery in (2, 3, 4):
        assert machine.due == pytest.approx(now + HANDOFF)
        assert machine.tick(machine.due - 0.001) == ()
        now = machine.due
        assert machine.tick(now) == (Deliver(delivery, "", max(3 * HANDOFF - now, HANDOFF / 2)),)  # the last has less
        machine.sent(f"g{delivery}")
    assert code(machine.tick(now + HANDOFF)) == "no_worker"
    assert machine.state == DONE


def test_a_refused_counts_as_the_holders_accepted() -> None:
    """Its own may be lost: then the holder's next frame is number 1."""
    machine = stream()
    machine.tick(HANDOFF)
    assert feed(machine, Refused(7, 2, 0, "p1", 1)) == []
    assert (machine.holder, machine.delivery) == ("p1", 1)
    assert feed(machine, Delta(7, 1, 1, b"a")) == [Write(b"a")]
    assert feed(machine, accepted()) == []  # late, and no news


def test_frames_of_another_delivery_are_dropped_and_answered_with_cancel_once_in_a_while() -> None:
    machine = stream()
    machine.tick(HANDOFF)
    feed(machine, accepted(1))
    assert feed(machine, Delta(7, 2, 0, b"x"), now=1.0) == [Stop("p2", 2, "not the owner")]
    assert feed(machine, Delta(7, 2, 1, b"x"), now=1.1) == []
    assert feed(machine, Delta(7, 2, 2, b"x"), now=1.3) == [Stop("p2", 2, "not the owner")]
    assert machine.received == 0


def test_the_newest_call_owns() -> None:
    machine = stream()
    machine.tick(HANDOFF)
    feed(machine, accepted(2, call=1))
    assert feed(machine, accepted(1, call=2)) == [Stop("p2", 2, "superseded")]
    assert machine.holder == "p1"
    assert feed(machine, accepted(2, call=3, seq=1)) == [Stop("p1", 1, "superseded")]


def test_nobody_takes_over_once_text_is_out() -> None:
    machine = stream()
    machine.tick(HANDOFF)
    feed(machine, accepted(1), Delta(7, 1, 1, b"a"))
    assert feed(machine, accepted(2, call=2)) == [Stop("p2", 2, "not the owner")]
    assert feed(machine, Delta(7, 1, 2, b"b")) == [Write(b"b")]


def test_failed_counts_only_from_the_owner_or_with_none_from_the_newest() -> None:
    machine = stream()
    machine.tick(HANDOFF)
    assert feed(machine, failed(1)) == []
    assert code(feed(machine, failed(2))) == "no_worker"
    machine = stream()
    machine.tick(HANDOFF)
    feed(machine, accepted(1))
    assert feed(machine, failed(2)) == []
    assert code(feed(machine, failed(1, seq=1))) == "no_worker"


def test_frames_of_a_delivery_never_made_are_nothing() -> None:
    machine = stream()
    assert feed(machine, accepted(2), accepted(0), failed(9)) == []
    assert machine.state == WAITING


def test_the_holder_dies_before_the_first_delta_and_the_lost_one_is_named() -> None:
    machine = stream()
    feed(machine, accepted())
    assert machine.state == HELD
    assert machine.died("p1", 1.0) == (Stop("p1", 1, "presumed dead"), Deliver(2, "p1", 3 * HANDOFF))
    machine.sent("g2")
    # it was only frozen: what it says now is dropped, and it is told again
    assert feed(machine, Delta(7, 1, 1, b"late"), now=2.0) == [Stop("p1", 1, "not the owner")]
    assert feed(machine, Refused(7, 2, 0, "p1", 1)) == []  # a stale refusal does not revive it
    assert machine.delivery == 0
    assert machine.tick(machine.due) == (
        Deliver(3, "p1", 2 * HANDOFF),
    )  # the delivery that named it may be the lost one
    feed(machine, accepted(3, call=2))
    assert feed(machine, Delta(7, 3, 1, b"new")) == [Write(b"new")]


def test_the_holder_dies_after_the_first_delta() -> None:
    machine = stream()
    feed(machine, accepted(), Delta(7, 1, 1, b"a"))
    assert machine.state == STARTED
    events = machine.died("p1", 1.0)
    assert code(events) == "upstream_worker_lost"
    assert machine.died("p1", 1.1) == ()


def test_the_holder_of_a_whole_answer_dies_after_its_first_part() -> None:
    """Nothing of it is with the client yet: the parts are void, and another delivery begins anew."""
    machine = stream(streamed=False)
    feed(machine, accepted(), Delta(7, 1, 1, b"half of", {"X-BR-Calls": "1"}))
    machine.took(7, 0.1)
    assert machine.died("p1", 1.0) == (Stop("p1", 1, "presumed dead"), Discard(), Deliver(2, "p1", 3 * HANDOFF))
    assert (machine.state, machine.received, machine.taken) == (WAITING, 0, 0)
    assert feed(machine, Delta(7, 1, 2, b" the old"), now=2.0) == [Stop("p1", 1, "not the owner")]
    feed(machine, accepted(2, call=2))
    assert feed(machine, Delta(7, 2, 1, b"all of it", {"X-BR-Calls": "2"})) == [
        Write(b"all of it", {"X-BR-Calls": "2"})
    ]


def test_after_a_death_the_first_token_has_its_whole_time_again() -> None:
    """The next provider's own timer begins with its call; ours is only the backstop behind it."""
    machine = stream()
    feed(machine, accepted())
    machine.died("p1", 8.0)
    feed(machine, accepted(2, call=2), now=8.1)
    assert machine.due == 18.0 + BACKSTOP_S


def test_who_had_the_earlier_deliveries_is_remembered() -> None:
    machine = stream()
    machine.tick(machine.due)
    machine.sent("g2")
    machine.tick(machine.due)
    assert machine.tried == ("g1", "g2")


def test_an_unreserved_request_is_delivered_once_and_never_again() -> None:
    """DESIGN 5: without a dispatch (call 0) nothing would stop a second upstream call."""
    machine = stream()
    feed(machine, accepted(call=0))
    assert code(machine.died("p1", 1.0)) == "upstream_worker_lost"


def test_the_guardian_dies_before_anybody_accepts() -> None:
    machine = stream()
    assert machine.waits_on() == "g1"
    assert machine.died("someone else", 0.1) == ()
    assert machine.died("g1", 0.5) == (Deliver(2, "", 2 * HANDOFF),)


def test_the_fourth_holder_dies() -> None:
    machine = stream(max_deliveries=1)
    feed(machine, accepted())
    assert code(machine.died("p1", 1.0)) == "upstream_worker_lost"


def test_no_guardian_is_left() -> None:
    machine = stream()
    assert machine.undeliverable(2, errors.NoWorker().body()) == ()
    assert code(machine.undeliverable(1, errors.NoWorker().body())) == "no_worker"


def test_nobody_is_said_to_be_left_while_somebody_may_still_begin() -> None:
    """Nothing stale runs (DESIGN 3): NATS or the guardian is frozen, no other is left; what is published may come out
    when it thaws, until 1.5 s after it began. Only then the client is told; one that begins in time serves it."""
    for thaws in (False, True):
        machine = stream()
        assert machine.died("g1", 1.0)[0] == Deliver(2, "", 0.5)
        assert machine.undeliverable(2, errors.NoWorker().body()) == ()
        assert machine.due == 1.625
        assert machine.waits_on() == ""
        assert machine.tick(1.4) == ()
        if thaws:
            assert feed(machine, accepted(1), now=1.45) == []
            assert machine.tick(1.7) == ()
            assert feed(machine, Delta(7, 1, 1, b"a"), now=1.7) == [Write(b"a")]
        else:
            assert code(machine.tick(1.625)) == "no_worker"


def test_what_is_proven_dead_is_not_waited_for() -> None:
    """Killed parts are told within 300 ms: NATS's 503 says that nobody can begin the delivery any more."""
    machine = stream()
    assert machine.died("g1", 0.2, proven=True)[0] == Deliver(2, "", 1.3)
    assert code(machine.undeliverable(2, errors.NoWorker().body())) == "no_worker"
    machine = stream()
    feed(machine, accepted())
    assert machine.died("p1", 0.2, proven=True)[1] == Deliver(2, "p1", 3 * HANDOFF)
    assert code(machine.undeliverable(2, errors.NoWorker().body())) == "no_worker"


def test_the_three_timers_are_separate() -> None:
    machine = stream()
    feed(machine, accepted())
    assert machine.due == 10.0 + BACKSTOP_S
    assert code(machine.tick(machine.due)) == "upstream_timeout"

    machine = stream()
    feed(machine, accepted(), Delta(7, 1, 1, b"a"), now=5.0)
    assert machine.tick(12.0) == ()
    assert machine.due == 15.0 + BACKSTOP_S
    events = machine.tick(machine.due)
    assert code(events) == "upstream_timeout"
    assert Stop("p1", 1, "idle") in events

    machine = stream(total=3.0)
    feed(machine, accepted(), Delta(7, 1, 1, b"a"))
    assert machine.due == 3.0
    assert code(machine.tick(3.0)) == "deadline_exceeded"


def test_a_whole_answer_has_only_the_total_timer() -> None:
    """Its first Delta is its last: there is no first token to wait for."""
    machine = stream(streamed=False)
    feed(machine, accepted(), Delta(7, 1, 1, b"a"))
    assert machine.due == 60.0
    assert machine.tick(59.0) == ()


def test_idle_does_not_count_while_the_client_has_not_taken_a_window() -> None:
    machine = stream(window=10, idle=1.0)
    feed(machine, accepted(), Delta(7, 1, 1, b"0123456789"))
    assert machine.tick(5.0) == ()
    machine.took(4, 5.0)
    assert machine.tick(9.0) == (), "half a window is not taken: the owner may be one that must stay silent"
    machine.took(6, 10.0)
    assert machine.tick(11.0) == ()
    assert code(machine.tick(10.0 + 1.0 + BACKSTOP_S)) == "upstream_timeout"


def test_taken_never_passes_what_came_nor_goes_back() -> None:
    machine = stream()
    feed(machine, accepted(), Delta(7, 1, 1, b"abc"))
    machine.took(99, 1.0)
    machine.took(1, 1.0)
    assert machine.taken == 3


def test_an_answer_past_the_bound_is_cut() -> None:
    """S1-R5."""
    machine = stream(max_bytes=3)
    feed(machine, accepted(), Delta(7, 1, 1, b"abc"))
    events = feed(machine, Delta(7, 1, 2, b"d"))
    assert code(events) == "response_too_large"
    assert Stop("p1", 1, "response too large") in events


def test_the_client_leaves() -> None:
    machine = stream()
    feed(machine, accepted())
    assert machine.leave("client gone") == (Stop("p1", 1, "client gone"),)
    assert feed(machine, Delta(7, 1, 1, b"a"), now=5.0) == [Stop("p1", 1, "not the owner")]
    assert machine.leave("again") == ()


def test_ending_it_from_our_side() -> None:
    machine = stream()
    feed(machine, accepted())
    events = machine.fail(errors.BusDown().body(), "bus down")
    assert code(events) == "bus_unavailable"
    assert Stop("p1", 1, "bus down") in events
    assert machine.fail(errors.BusDown().body(), "bus down") == ()


def test_a_delivery_whose_text_was_dropped_can_own_nothing() -> None:
    """Its text would have a hole that no seq shows (I5)."""
    machine = stream()
    machine.tick(HANDOFF)
    feed(machine, accepted(1), Delta(7, 2, 0, b"hole"))
    assert machine.delivery == 1
    assert feed(machine, Refused(7, 2, 1, "p2", 2)) == []
    assert machine.delivery == 1
    assert machine.died("p1", 1.0) == (Stop("p1", 1, "presumed dead"), Deliver(3, "p1", 3 * HANDOFF))
    assert feed(machine, Delta(7, 2, 2, b"more"), now=1.0) == [Stop("p2", 2, "not the owner")]
    assert machine.received == 0


@pytest.mark.parametrize("stretched", [HANDOFF, 2 * HANDOFF, 3 * HANDOFF])
def test_a_stretched_handoff_does_not_stretch_what_is_promised(stretched: float) -> None:
    """DESIGN 5: every worker frozen is told within 2 s, whatever the load had been, and nothing is begun after that."""
    machine = Stream(Limits(streamed=True, first_token=10.0, idle=10.0, total=60.0, max_bytes=1000), 0.0)
    events, now, begun_by = machine.begin(0.0, stretched, HANDOFF), 0.0, 0.0
    while machine.state != DONE:
        for event in events:
            assert isinstance(event, Deliver)
            machine.sent(f"g{event.delivery}")
            begun_by = max(begun_by, now + event.within)
        now = machine.due
        events = machine.tick(now)
    assert code(events) == "no_worker"
    assert begun_by <= now < 2.0
    assert machine.newest == {HANDOFF: 4, 2 * HANDOFF: 2, 3 * HANDOFF: 2}[stretched]


def test_an_owner_that_gave_us_up_is_as_good_as_dead() -> None:
    """An ingress that stood still for over 5 s is told so, instead of waiting 31 s for what does not come (I4)."""
    gone = Failed(7, 1, 1, errors.WorkerLost().body())
    machine = stream()
    feed(machine, accepted())
    stop, again = feed(machine, gone)
    assert isinstance(stop, Stop)
    assert isinstance(again, Deliver)
    assert (again.delivery, again.lost) == (2, "p1")
    machine = stream()
    feed(machine, accepted(), Delta(7, 1, 1, b"a"))
    assert code(feed(machine, Failed(7, 1, 2, errors.WorkerLost().body()))) == "upstream_worker_lost"
    machine = stream()  # a delivery that found the worker lost and no call left to make: that is the answer
    assert code(feed(machine, Failed(7, 1, 0, errors.WorkerLost().body()))) == "upstream_worker_lost"
