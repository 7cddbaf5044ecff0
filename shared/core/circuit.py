"""The circuit breaker's policy (first version: S2-20's consecutive failures, S1-C2b's cooldown).

Theory of operation. A circuit is two numbers, so that a store can keep it: the failures in a row, and the time until
which it is open. Its state follows from them and from the clock:

    closed     open_until == 0        calls pass; failures are counted, a success clears the count
    open       now < open_until       no call starts; what still ends was started before, and changes nothing: its
                                      failure must not prolong the cooldown, its success must not close the circuit
    half_open  now >= open_until > 0  calls pass until the next failure, which opens it at once; a success closes it

Whatever changes a circuit is in `TRANSITIONS`. One probe per fleet (S1-C2a) and sliding windows (S2-20) come later.
Times are milliseconds of the shared clock.

This table is the rule; it runs where the counts of all processes meet, as `state/lua/circuit.lua`, and
tests/workers/test_routing.py holds that script to it, outcome by outcome.
"""

from collections.abc import Callable, Iterable
from typing import Final, Literal

from msgspec import Struct

State = Literal["closed", "open", "half_open"]


class Circuit(Struct, frozen=True):
    """One endpoint's circuit."""

    failures: int = 0  # in a row
    open_until: int = 0  # shared-clock ms; 0 = closed


class Policy(Struct, frozen=True, kw_only=True):
    """Settings: CIRCUIT_FAILURE_THRESHOLD and CIRCUIT_BREAKER_COOLDOWN_MS."""

    threshold: int = 5
    cooldown_ms: int = 30_000


CLOSED: Final = Circuit()


def state(circuit: Circuit, now: int) -> State:
    """Which of the three it is."""
    if circuit.open_until == 0:
        return "closed"
    return "open" if now < circuit.open_until else "half_open"


def _same(circuit: Circuit, _now: int, _policy: Policy) -> Circuit:
    return circuit


def _close(_circuit: Circuit, _now: int, _policy: Policy) -> Circuit:
    return CLOSED


def _count(circuit: Circuit, now: int, policy: Policy) -> Circuit:
    counted = Circuit(circuit.failures + 1)
    return _open(counted, now, policy) if counted.failures >= policy.threshold else counted


def _open(circuit: Circuit, now: int, policy: Policy) -> Circuit:
    return Circuit(max(circuit.failures, policy.threshold), now + policy.cooldown_ms)


TRANSITIONS: Final[dict[tuple[State, bool], Callable[[Circuit, int, Policy], Circuit]]] = {
    # (state, the call ended well)
    ("closed", True): _close,
    ("closed", False): _count,
    ("open", True): _same,
    ("open", False): _same,
    ("half_open", True): _close,
    ("half_open", False): _open,
}


def after(circuit: Circuit, outcomes: Iterable[bool], now: int, policy: Policy) -> Circuit:
    """The circuit after these calls ended (True = well), oldest first, all seen at `now`."""
    for ok in outcomes:
        circuit = TRANSITIONS[state(circuit, now), ok](circuit, now, policy)
    return circuit
