"""The circuit breaker's rule (S1-C2a..e, S2-20, S2-21), as a table.

Theory of operation. A circuit belongs to one endpoint and is shared by the whole fleet. Its state follows from what is
kept and from the clock:

    closed     open_until == 0        calls pass. It opens at `threshold` failures in a row, or when at least `rate` per
                                      cent of at least `least` calls in the last 60 s failed
    open       now < open_until       no call starts. What still ends began before: its failure must not prolong the
                                      cooldown, its success must not close the circuit
    half_open  now >= open_until > 0  one call may pass, whoever claims it first, under a random id: the probe
    probing    half_open, and a probe younger than `probe_ms`: nobody else passes

    closed --trips--> open --cooldown--> half_open --claim--> probing --the probe failed--> open (twice the cooldown)
                                             ^                  |  '--the probe went well--> closed
                                             '-- probe_ms, or --'
                                                 no verdict

Only the outcome of a probe whose id is kept moves a circuit that is not closed; ordinary outcomes, whenever they come,
change nothing. A probe that is silent for `probe_ms` (its worker was killed: faults 10) lets another one start, but its
id is kept beside the newer one's until one of them has a verdict: the answer of a model that thinks for ten seconds
would otherwise always come too late, and under traffic the circuit would never close (S1-C2e). A probe that ends
without a verdict (the client left, a 429) makes room for the next at once.

Each failed probe doubles the cooldown, up to 16 times (S2-21); a good one forgets everything.

Whatever changes a circuit is in `TRANSITIONS`. Times are milliseconds of the shared clock. This table is the rule; it
runs where the outcomes of all processes meet, as `state/lua/_circuit.lua`, and is held together with that script, event
by event, by tests/state/test_circuit_machine.py.
"""

from collections.abc import Callable, Iterable
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

State = Literal["closed", "open", "half_open", "probing"]
#: good, failed: an ordinary call ended. claim: somebody wants to be the probe. probe_*: a probe ended, void without
#: saying anything about the endpoint.
Event = Literal["good", "failed", "claim", "probe_good", "probe_failed", "probe_void"]

#: The window of S2-20's error rate: 12 slots of 5 s, the newest one not full yet.
SLOT_MS: Final = 5000
SLOTS: Final = 12
#: Probes without a verdict that are remembered: one starts every 5 s at most, so these reach back 40 s.
MAX_PROBES: Final = 8
#: The longest cooldown is 2**4 times the first (S2-21).
MAX_DOUBLINGS: Final = 4


class Slot(Struct, frozen=True, array_like=True):
    """The ordinary calls that ended within one slot of the window; `number` counts slots since 1970."""

    number: int
    calls: int
    failures: int


class Circuit(Struct, frozen=True):
    """One endpoint's circuit."""

    failures: int = 0  # in a row
    openings: int = 0  # in a row, without a good probe between
    open_until: int = 0  # shared-clock ms; 0 = closed
    probes: tuple[str, ...] = ()  # ids of those without a verdict, the newest last
    probe_until: int = 0  # shared-clock ms until which the newest probe keeps others out
    window: tuple[Slot, ...] = ()  # oldest first


class Policy(Struct, frozen=True, kw_only=True):
    """Settings: CIRCUIT_FAILURE_THRESHOLD, CIRCUIT_BREAKER_COOLDOWN_MS, CIRCUIT_PROBE_MS, CIRCUIT_ERROR_RATE_PERCENT,
    CIRCUIT_MIN_REQUESTS."""

    threshold: int = 5
    cooldown_ms: int = 30_000
    probe_ms: int = 5000
    rate: int = 50
    min_requests: int = 10

    @property
    def least(self) -> int:
        """Calls in the window from which on the error rate counts: whoever asks for more failures in a row than
        `min_requests` wants more evidence, or no breaker at all."""
        return max(self.threshold, self.min_requests)


CLOSED: Final = Circuit()


def state(circuit: Circuit, now: int) -> State:
    """Which of the four it is."""
    if circuit.open_until == 0:
        return "closed"
    if now < circuit.open_until:
        return "open"
    return "probing" if now < circuit.probe_until else "half_open"


def wait_ms(circuit: Circuit, now: int) -> int:
    """Until a call may pass again as far as is known now; 0 when one may already. A verdict may come sooner."""
    return max(0, circuit.open_until - now, circuit.probe_until - now)


def cooldown_ms(policy: Policy, openings: int) -> int:
    """How long it stays open after so many openings in a row."""
    return policy.cooldown_ms << min(max(0, openings - 1), MAX_DOUBLINGS)


Step = Callable[[Circuit, str, int, Policy], Circuit]  # (circuit, probe id or "", now, policy)


def _good(circuit: Circuit, _probe: str, now: int, policy: Policy) -> Circuit:
    return _trip(replace(circuit, failures=0, window=_count(circuit.window, now, failed=0)), now, policy)


def _failed(circuit: Circuit, _probe: str, now: int, policy: Policy) -> Circuit:
    window = _count(circuit.window, now, failed=1)
    return _trip(replace(circuit, failures=circuit.failures + 1, window=window), now, policy)


def _count(window: tuple[Slot, ...], now: int, *, failed: int) -> tuple[Slot, ...]:
    """One more call; slots that have left the window go (those of a future, too: the server's clock was set back)."""
    number = now // SLOT_MS
    kept = [slot for slot in window if number - SLOTS < slot.number <= number]
    last = kept.pop() if kept and kept[-1].number == number else Slot(number, 0, 0)
    return (*kept, Slot(number, last.calls + 1, last.failures + failed))


def _trip(circuit: Circuit, now: int, policy: Policy) -> Circuit:
    """Open it if either rule of S2-20 says so."""
    calls = sum(slot.calls for slot in circuit.window)
    failures = sum(slot.failures for slot in circuit.window)
    if circuit.failures >= policy.threshold or (calls >= policy.least and failures * 100 >= policy.rate * calls):
        return Circuit(circuit.failures, 1, now + cooldown_ms(policy, 1))
    return circuit


def _claim(circuit: Circuit, probe: str, now: int, policy: Policy) -> Circuit:
    kept = (*circuit.probes, probe)[-MAX_PROBES:]
    return replace(circuit, probes=kept, probe_until=now + policy.probe_ms)


def _close(circuit: Circuit, probe: str, _now: int, _policy: Policy) -> Circuit:
    return CLOSED if probe in circuit.probes else circuit


def _reopen(circuit: Circuit, probe: str, now: int, policy: Policy) -> Circuit:
    if probe not in circuit.probes:
        return circuit
    openings = circuit.openings + 1
    return Circuit(circuit.failures + 1, openings, now + cooldown_ms(policy, openings))


def _void(circuit: Circuit, probe: str, _now: int, _policy: Policy) -> Circuit:
    if probe not in circuit.probes:
        return circuit
    newest = circuit.probes[-1] == probe
    kept = tuple(each for each in circuit.probes if each != probe)
    return replace(circuit, probes=kept, probe_until=0 if newest else circuit.probe_until)


TRANSITIONS: Final[dict[tuple[State, Event], Step]] = {
    ("closed", "good"): _good,
    ("closed", "failed"): _failed,
    ("half_open", "claim"): _claim,
    ("half_open", "probe_good"): _close,
    ("half_open", "probe_failed"): _reopen,
    ("half_open", "probe_void"): _void,
    ("probing", "probe_good"): _close,
    ("probing", "probe_failed"): _reopen,
    ("probing", "probe_void"): _void,
    # everything else changes nothing: see the theory above
}


def after(circuit: Circuit, events: Iterable[tuple[Event, str]], now: int, policy: Policy) -> Circuit:
    """The circuit after these events (each with its probe's id, "" for ordinary calls), oldest first, all at `now`."""
    for event, probe in events:
        step = TRANSITIONS.get((state(circuit, now), event))
        if step is not None:
            circuit = step(circuit, probe, now, policy)
    return circuit
