"""What a blow may cost whom (acceptance 1; DESIGN 3, liveness; faults 5 to 17): judged request by request.

    no Delta had reached the client when its worker died   200; killed + 1 s, frozen + 3 s
    a started stream of the dead provider                  one in-stream error, killed 2 s, frozen 3 s after the blow
    whose ingress was killed                               the connection is lost
    everybody else                                         200, and no slower than the first line

"+": beyond what the request takes by itself. What a dead provider had done of it by then is lost and done again, so the
time up to the blow does not count either.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping

from msgspec import Struct

from tests.e2e.barrage import Shot
from tests.e2e.books import Entry
from tests.e2e.fleet import Blow

KILLED_S, FROZEN_S = 1.0, 3.0
CUT_KILLED_S, CUT_FROZEN_S = 2.0, 3.0
#: What was on its way when the process died still reaches the client.
UNDER_WAY_S = 0.25
#: Whom a blow may slow: those asked in this time after it (a killed one is replaced in less, a frozen one thaws).
WAKE_S = 2.0
#: Added times below this are the load's own.
NOTICED_S = 0.1


class Cost(Struct):
    """What one kind of blow cost, in seconds: `added` of every answered request near it, `cuts` from blow to error."""

    added: list[float] = []
    cuts: list[float] = []

    def __str__(self) -> str:
        noticed = sorted(one for one in self.added if one > NOTICED_S)
        said = f"{len(self.added)} answered near it, {len(noticed)} of them later"
        if noticed:
            said += f" (+p50 {statistics.median(noticed):.2f} s, max {noticed[-1]:.2f} s)"
        if self.cuts:
            said += f"; {len(self.cuts)} streams cut (p50 {statistics.median(self.cuts):.2f}, max {max(self.cuts):.2f})"
        return said


def calls(booked: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """The calls of each request, in order."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in booked.values():
        found[entry.rid].append(entry)
    return {rid: sorted(entries, key=lambda entry: entry.call) for rid, entries in found.items()}


def judge(
    shots: list[Shot], blows: list[Blow], booked: Mapping[str, Entry], usual: Mapping[str, float]
) -> dict[str, Cost]:
    """Raises AssertionError for a promise that was broken; what each kind of blow cost otherwise."""
    costs: dict[str, Cost] = defaultdict(Cost)
    of = calls(booked)
    for shot in shots:
        near = [blow for blow in blows if blow.at < shot.end and shot.at < max(blow.until, blow.at + WAKE_S)]
        entries = of.get(shot.seen.rid, [])
        if shot.seen.broken:
            assert any(blow.role == "ingress" and not blow.frozen for blow in near), ("lost its connection", shot)
        elif shot.seen.ended_well:
            _in_time(shot, near, entries, usual, costs)
        else:
            _rightly_cut(shot, near, entries, costs)
    return dict(costs)


def _in_time(
    shot: Shot, near: list[Blow], entries: list[Entry], usual: Mapping[str, float], costs: dict[str, Cost]
) -> None:
    holders = {entry.instance for entry in entries}
    lost = max((blow.at - shot.at for blow in near if blow.instance in holders and blow.at > shot.at), default=0.0)
    added = shot.beyond - usual.get(shot.order.kind, max(usual.values()))
    if len(entries) > 1:
        added -= lost
    allowed = max((FROZEN_S if blow.frozen else KILLED_S for blow in near), default=KILLED_S)
    assert added <= allowed, ("answered too late", added, allowed, near, shot.order, shot.seen.rid, entries, shot.at)
    for blow in near:
        costs[blow.kind].added.append(added)


def _rightly_cut(shot: Shot, near: list[Blow], entries: list[Entry], costs: dict[str, Cost]) -> None:
    seen = shot.seen
    told = (shot.order, seen.status, seen.error, seen.rid, seen.broken, near, entries, shot.at, shot.first, shot.end)
    assert entries, ("failed without a call", *told)
    mine = [blow for blow in near if blow.instance == entries[-1].instance]
    assert mine, ("failed, but its worker lives", *told)
    blow = mine[0]
    assert seen.streamed, ("not a stream", *told)
    assert seen.error.get("code") == "upstream_worker_lost", told
    assert shot.first < blow.at + UNDER_WAY_S, ("no text had reached the client when its worker died", *told)
    late = shot.end - blow.at
    assert late <= (CUT_FROZEN_S if blow.frozen else CUT_KILLED_S), ("cut too late", late, *told)
    costs[blow.kind].cuts.append(late)


def only_the_dead(booked: Mapping[str, Entry], dead: set[str]) -> int:
    """How many calls are unconfirmed: of dead instances only (I1)."""
    open_calls = [entry for entry in booked.values() if entry.state == "unconfirmed"]
    strangers = [entry for entry in open_calls if entry.instance not in dead]
    assert not strangers, ("unconfirmed, but their worker lives", strangers[:5], len(strangers))
    return len(open_calls)


def show(costs: Mapping[str, Cost], say: Callable[[str], None] = print) -> None:
    """One line a kind of blow."""
    for kind, cost in sorted(costs.items()):
        say(f"{kind:16} {cost}")
