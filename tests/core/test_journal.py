"""The journal's replay names every line that should not be, and only those (I2, DESIGN 4). The real Lua's histories are
replayed in tests/state/test_journal.py."""

from typing import Any

import msgspec
import pytest

from shared.core.journal import Replay, buckets_of
from shared.core.transitions import Line

RID, OTHER = "a" * 32, "b" * 32
DAY = 20_000  # 2024-10-04
#: A snapshot: fields and values, one behind the other.
SNAP = [
    "t:lifetime",
    "60 0 100",
    "t:2024-10",
    "60 0 100",
    "t:2024-10-04",
    "60 0 100",
    "t:limit",
    "- - 500",
    "about",
    "x",
]


def line(
    op: str, call: int = 0, moved: tuple[int, int, int] = (0, 0, 0), *more: Any, rid: str = RID, **other: Any
) -> Line:
    """`moved`: settled, pending, unconfirmed."""
    return Line(
        id="1-1", op=op, rid=rid, call=call, day=other.get("day", DAY), key=other.get("key", "k1"),
        user=other.get("user", ""), settled=moved[0], pending=moved[1], unconfirmed=moved[2], more=more,
    )  # fmt: skip


RESERVE = line("reserve", 0, (0, 100, 0), 100)
DISPATCH = line("dispatch", 1, (0, 0, 0), "A", 1)
SETTLE = line("settle", 1, (60, -100, 0), 60, 0, 100)
UNCONFIRM = line("unconfirm", 1, (0, -100, 100))
POST = line("post", 1, (100, 0, -100), 100, 1)
VOID = line("void", 0, (0, -100, 0))
LIMIT = line("limit", 0, (0, 0, 0), "t", "month", 150, rid="")


def rules(*lines: Line) -> list[str]:
    """The rules broken by the last line; nothing may be wrong before it."""
    replay = Replay()
    for each in lines[:-1]:
        assert replay.feed(each) == []
    return [wrong.rule for wrong in replay.feed(lines[-1])]


def test_the_buckets_of_a_day():
    assert buckets_of(DAY) == ("2024-10-04", "2024-10", "lifetime")
    assert buckets_of(0) == ("1970-01-01", "1970-01", "lifetime")


@pytest.mark.parametrize(
    "lines",
    [
        (RESERVE, DISPATCH, SETTLE),
        (RESERVE, SETTLE),  # the dispatch's answer was lost with Redis' last second
        (RESERVE, DISPATCH, line("overrun", 1, (130, -100, 0), 130, 0, 100)),
        (RESERVE, DISPATCH, line("extend", 1, (0, 20, 0), 120), line("settle", 1, (110, -120, 0), 110, 1, 120)),
        (RESERVE, line("extend", 0, (0, 50, 0), 150), DISPATCH, line("settle", 1, (1, -150, 0), 1, 0, 150)),
        (RESERVE, DISPATCH, SETTLE, line("topup", 2, (0, 70, 0), 70), line("settle", 2, (70, -70, 0), 70, 0, 70)),
        (RESERVE, DISPATCH, SETTLE, line("correct", 1, (-20, 0, 0), 40, 0, 100)),
        (RESERVE, DISPATCH, UNCONFIRM, line("late", 1, (60, 0, -100), 60, 0, 100)),
        (RESERVE, DISPATCH, UNCONFIRM, POST, line("late", 1, (-40, 0, 0), 60, 0, 100)),
        (RESERVE, VOID, RESERVE, VOID, line("late", 1, (60, 0, 0), 60, 0, 0)),
        (RESERVE, line("expire", 0, (0, -100, 0)), line("late", 1, (60, 0, 0), 60, 0, 0)),
        (RESERVE, DISPATCH, line("void", 1, (0, -100, 0)), RESERVE),
        (line("opened", 3, (60, 0, 0), 60, 0, 0),),
        (RESERVE, VOID, line("opened", 1, (60, 0, 0), 60, 0, 0)),  # its tombstone was gone
        (line("late", 1, (60, 0, 0), 60, 0, 0),),  # voided before it was reserved: that is no transition
    ],
)
def test_what_may_be(lines: tuple[Line, ...]):
    assert rules(*lines) == []


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("order", (SETTLE,)),
        ("order", (DISPATCH,)),
        ("order", (RESERVE, RESERVE)),
        ("order", (RESERVE, DISPATCH, RESERVE)),
        ("order", (RESERVE, DISPATCH, DISPATCH)),
        ("order", (RESERVE, VOID, DISPATCH)),
        ("order", (RESERVE, DISPATCH, line("topup", 3, (0, 70, 0), 70))),
        ("order", (RESERVE, DISPATCH, line("opened", 1, (60, 0, 0), 60, 0, 0))),
        ("order", (RESERVE, line("correct", 1, (60, -100, 0), 60, 0, 100))),
        ("order", (RESERVE, DISPATCH, UNCONFIRM, line("extend", 1, (0, 20, 0), 120))),
        ("twice", (RESERVE, DISPATCH, SETTLE, line("opened", 1, (60, 0, 0), 60, 0, 0))),
        ("twice", (RESERVE, DISPATCH, SETTLE, line("late", 1, (60, 0, 0), 60, 0, 0))),
        ("twice", (RESERVE, DISPATCH, UNCONFIRM, POST, line("late", 1, (60, 0, 0), 60, 0, 0))),
        ("amount", (line("reserve", 0, (0, 100, 0), 90),)),
        ("amount", (RESERVE, line("void", 0, (0, -90, 0)))),
        ("amount", (RESERVE, DISPATCH, line("settle", 1, (60, -90, 0), 60, 0, 100))),
        ("amount", (RESERVE, DISPATCH, line("settle", 1, (61, -100, 0), 60, 0, 100))),
        ("amount", (RESERVE, DISPATCH, line("settle", 1, (130, -100, 0), 130, 0, 100))),
        ("amount", (RESERVE, DISPATCH, line("overrun", 1, (60, -100, 0), 60, 0, 100))),
        ("amount", (RESERVE, DISPATCH, line("extend", 1, (0, 9, 0), 120))),
        ("amount", (RESERVE, DISPATCH, line("unconfirm", 1, (0, -100, 90)))),
        ("amount", (RESERVE, DISPATCH, UNCONFIRM, line("post", 1, (90, 0, -100), 90, 1))),
        ("amount", (RESERVE, DISPATCH, SETTLE, line("correct", 1, (20, 0, 0), 40, 0, 100))),
        ("line", (line("gift", 1, (-100, 0, 0)),)),
        ("line", (line("reserve", 0, (0, 100, 0)),)),
        ("line", (line("snap", 0, (0, 0, 0), ["t:lifetime", "1 2"], rid=""),)),
        ("line", (line("snap", 0, (0, 0, 0), ["t:lifetime"], rid=""),)),
        ("line", (line("limit", 0, (0, 0, 0), "t", "week", 5, rid=""),)),
        ("line", (line("prune", 0, (0, 0, 0), "2024-01-01", rid=""),)),
        ("line", (line("settle", 1, (60, 0, 0), 60, 0, 0, day=10**9),)),
    ],
)  # fmt: skip
def test_what_may_not_be(rule: str, lines: tuple[Line, ...]):
    assert [each for each in rules(*lines) if each != "clamp"] == [rule]


def test_a_limit_that_stood_is_passed_by_nothing_that_takes_room():
    """I2: reserve, topup and extend are named, in every bucket; what was used is posted whatever the limit is."""
    more = line("reserve", 0, (0, 60, 0), 60, rid=OTHER)
    assert rules(RESERVE, LIMIT, more) == ["limit"]
    assert rules(RESERVE, LIMIT, line("reserve", 0, (0, 50, 0), 50, rid=OTHER)) == []
    assert rules(RESERVE, LIMIT, DISPATCH, line("overrun", 1, (999, -100, 0), 999, 0, 100)) == []
    assert rules(RESERVE, LIMIT, DISPATCH, line("extend", 1, (0, 60, 0), 160)) == ["limit"]
    assert rules(RESERVE, LIMIT, DISPATCH, SETTLE, line("topup", 2, (0, 100, 0), 100)) == ["limit"]
    lifted = line("limit", 0, (0, 0, 0), "t", "month", -1, rid="")
    assert rules(RESERVE, LIMIT, lifted, more) == []
    for level, user, broken in (("u:u1", "u1", ["limit"]), ("u:u1", "", []), ("k:k1", "", ["limit"]), ("k:k2", "", [])):
        limit = line("limit", 0, (0, 0, 0), level, "day", 59, rid="")
        assert rules(limit, line("reserve", 0, (0, 60, 0), 60, user=user)) == broken


def test_more_given_back_than_held_is_named():
    """Held sums stop at 0, in Lua and here: each balance where that happens is named."""
    assert rules(line("snap", 0, (0, 0, 0), [], rid=""), line("void", 1, (0, -100, 0))) == ["clamp"] * 6


def test_a_journal_that_was_trimmed_begins_with_a_snapshot():
    """Calls from before it end in whatever way, and then no further."""
    ends = (SETTLE, line("late", 1, (60, 0, -100), 60, 0, 100), line("post", 1, (100, 0, -100), 100, 1), UNCONFIRM,
            line("correct", 1, (-20, 0, 0), 40, 0, 100), DISPATCH, line("extend", 1, (0, 9, 0), 120), VOID)  # fmt: skip
    held = ["t:lifetime", "60 100 100", "t:2024-10", "60 100 100", "t:2024-10-04", "60 100 100"]
    for level in ("k:k1",):
        held += [f"{level}:{name}" if i % 2 == 0 else name for i, name in enumerate(
            ["lifetime", "60 100 100", "2024-10", "60 100 100", "2024-10-04", "60 100 100"])]  # fmt: skip
    snap = line("snap", 0, (0, 0, 0), held, rid="")
    for end in ends:
        assert rules(snap, end) == []
        assert end.op == "extend" or rules(snap, end, end) != []
    assert rules(snap, DISPATCH, line("settle", 1, (60, -77, 0), 60, 0, 77)) == []  # what it held is not known


def test_a_snapshot_is_what_was_replayed():
    replay = Replay()
    replay.feed(line("snap", 0, (0, 0, 0), SNAP, rid=""))
    assert (replay.whole, replay.balances["t:lifetime"], replay.limits) == (
        False,
        [60, 0, 100],
        {"t": ["-", "-", "500"]},
    )
    assert replay.feed(line("snap", 0, (0, 0, 0), SNAP, rid="")) == []
    wrong = replay.feed(line("snap", 0, (0, 0, 0), ["t:lifetime", "61 0 100", *SNAP[2:]], rid=""))
    assert [(each.rule, "61" in each.text) for each in wrong] == [("snap", True)]
    assert replay.balances["t:lifetime"] == [61, 0, 100]  # gone on with: the next one is compared with this


def test_prune_drops_what_lua_drops():
    """Days, months and users each have their own bound; a lifetime stays."""
    fields = ["t:2024-10-04", "t:2024-10-03", "t:2024-10", "t:2024-09", "t:lifetime", "k:1:2024-10-03",
              "u:a:2024-10-05", "u:a:2024-10-04", "u:a:2024-09"]  # fmt: skip
    snap = [part for name in fields for part in (name, "1 0 0")]
    replay = Replay()
    replay.feed(line("snap", 0, (0, 0, 0), snap, rid=""))
    replay.feed(line("prune", 0, (0, 0, 0), "2024-10-04", "2024-09", "2024-10-05", "2024-10", rid=""))
    assert sorted(replay.balances) == ["t:2024-09", "t:2024-10", "t:2024-10-04", "t:lifetime", "u:a:2024-10-05"]


def test_what_it_tells():
    replay = Replay()
    for each in (RESERVE, DISPATCH, SETTLE, line("reserve", 0, (0, 5, 0), 5, rid=OTHER)):
        replay.feed(each)
    assert [(rid, n, call.state, call.held, call.cost) for rid, n, call in replay.calls()] == [
        (RID, 1, "settled", 100, 60), (OTHER, 0, "reserved", 5, 0),
    ]  # fmt: skip
    call = replay.call(RID, 1)
    assert call is not None
    assert (call.key, call.day, call.line) == ("k1", DAY, "1-1")
    assert replay.call(RID, 2) is replay.call("c" * 32, 1) is None
    whole = {f"{level}:{name}": "60 5 0" for level in ("t", "k:k1") for name in buckets_of(DAY)}
    assert replay.differences(whole | {"about": "balances", "pruned": "20000"}) == []
    assert len(replay.differences({})) == 6
    assert len(replay.differences(whole | {"t:2024-09": "1 0 0", "t:limit": "5 - -"})) == 2


def test_what_was_posted_twice_is_known():
    """So that reconcile can take it back: by what the entry says, or all of it when that is forgotten."""
    replay = Replay()
    lines = (RESERVE, DISPATCH, SETTLE, line("opened", 1, (50, 0, 0), 50, 0, 0))
    assert [len(replay.feed(each)) for each in lines] == [0, 0, 0, 1]
    call = replay.call(RID, 1)
    assert call is not None
    assert (call.cost, call.posted) == (50, 110)
    assert replay.feed(line("correct", 1, (-10, 0, 0), 40, 0, 100)) == []
    assert replay.feed(line("correct", 1, (-60, 0, 0), 40, 0, 100)) == []
    call = replay.call(RID, 1)
    assert call is not None
    assert (call.cost, call.posted) == (40, 40)
    assert replay.balances["t:lifetime"] == [40, 0, 0]


def test_balances_that_were_given_back_are_added():
    """A Redis that came back empty and went on: what the lost journal had settled is added in one line."""
    replay = Replay()
    replay.feed(RESERVE)
    limit = line("limit", 0, (0, 0, 0), "k:k1", "day", 700, rid="")
    assert replay.feed(limit) == []
    back = ["t:lifetime", "60 0 0", "k:k2:2024-10", "5 0 0", "t:limit", "- - 500", "k:k1:limit", "1 - 9000"]
    assert replay.feed(line("restore", 0, (0, 0, 0), "7-1", back, rid="")) == []
    assert (replay.balances["t:lifetime"], replay.balances["k:k2:2024-10"]) == ([60, 100, 0], [5, 0, 0])
    assert replay.limits == {"t": ["-", "-", "500"], "k:k1": ["700", "-", "9000"]}
    assert (replay.restored, replay.whole, replay.since) == ("7-1", False, (7, 1))
    assert replay.feed(line("late", 1, (60, 0, -100), 60, 0, 100, rid=OTHER)) != []  # its hold was not given back
    assert [wrong.rule for wrong in replay.feed(line("extend", 0, (0, 341, 0), 441))] == ["limit"]


def test_a_journal_knows_of_nothing_before_it_was_trimmed():
    """Also when balances were given back later: a rebuild would post again what stood in the lines that are gone."""
    replay = Replay()
    replay.feed(msgspec.structs.replace(line("snap", 0, (0, 0, 0), SNAP, rid=""), id="20-0"))
    assert replay.since == (20, 0)
    replay.feed(msgspec.structs.replace(line("restore", 0, (0, 0, 0), "7-1", [], rid=""), id="30-0"))
    assert (replay.restored, replay.since) == ("7-1", (20, 0))
