"""The real Lua against the table of core/circuit.py, event by event, from several processes (S1-C2a..e, S2-20, S2-21).

The script tells the time at which it ran, so both sides judge at the same millisecond; time passes by shifting what
is stored, on both sides.
"""

import asyncio
import secrets
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from shared.core import circuit
from shared.core.circuit import CLOSED, SLOT_MS, Circuit, Event, Policy, Slot
from shared.state import circuits
from shared.state.redis import State
from tests.state.rig import age_circuit, settings_for

#: As CIRCUIT_* below. Real time passes too, so the cooldown and the probe's window are seconds.
ENV = {"CIRCUIT_FAILURE_THRESHOLD": "3", "CIRCUIT_MIN_REQUESTS": "6", "CIRCUIT_BREAKER_COOLDOWN_MS": "20000"}
PROBE_MS = 5000

processes = st.integers(0, 2)
ordinary = st.lists(st.sampled_from(["good", "failed", "failed"]), min_size=1, max_size=7)
verdicts = st.sampled_from(["probe_good", "probe_failed", "probe_failed", "probe_void"])


def older(held: Circuit, ms: int) -> Circuit:
    """The same circuit `ms` later."""
    return replace(
        held,
        open_until=held.open_until and held.open_until - ms,
        probe_until=held.probe_until and held.probe_until - ms,
        window=tuple(Slot(slot.number - ms // SLOT_MS, slot.calls, slot.failures) for slot in held.window),
    )


class CircuitMachine(RuleBasedStateMachine):
    """One endpoint, three processes."""

    runner: ClassVar[asyncio.Runner]
    fleet: ClassVar[list[State]]
    policy: ClassVar[Policy]

    @initialize()
    def begin(self) -> None:
        self.endpoint = f"e{secrets.token_hex(8)}"
        self.model = CLOSED
        self.claims: dict[str, int] = {}  # probe -> when it was granted, while it is nobody else's turn

    def ask(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def happens(self, process: int, events: list[tuple[Event, str]], not_after: int = 0) -> tuple[int, int]:
        """On both sides; (claimed, now)."""
        before = self.model
        run = self.fleet[process].circuits._run(self.endpoint, events, not_after, 10.0)
        moved, claimed, now, found = self.ask(run)
        if not (not_after and now > not_after):
            self.model = circuit.after(before, events, now, self.policy)
        assert found == self.model
        visible = [(each.open_until, each.probes, each.probe_until) for each in (before, self.model)]
        assert moved or visible[0] == visible[1], "the others would not hear of it"
        return claimed, now

    @rule(process=processes, outcomes=ordinary)
    def calls_end(self, process: int, outcomes: list[Event]) -> None:
        """Also late ones, whatever the state."""
        before = self.model.open_until
        self.happens(process, [(each, "") for each in outcomes])
        assert not before or self.model.open_until == before  # S1-C2d

    @rule(process=processes)
    def claim(self, process: int) -> None:
        probe = secrets.token_hex(8)
        claimed, now = self.happens(process, [("claim", probe)])
        if claimed:
            assert all(now - at >= PROBE_MS for at in self.claims.values()), "two probes at once"  # S1-C2a, S1-C2c
            self.claims[probe] = now
        assert (probe in self.model.probes) == bool(claimed)

    @rule(process=processes)
    def claim_late(self, process: int) -> None:
        claimed, _ = self.happens(process, [("claim", "late")], not_after=1)
        assert not claimed

    @precondition(lambda self: bool(getattr(self, "claims", None)))
    @rule(process=processes, data=st.data(), verdict=verdicts)
    def probe_ends(self, process: int, data: st.DataObject, verdict: Event) -> None:
        """Whichever of them, in time or long after."""
        probe = data.draw(st.sampled_from(sorted(self.claims)))
        del self.claims[probe]
        self.happens(process, [(verdict, probe)])
        if not self.model.probes:
            self.claims.clear()  # decided: who else was probing is of no interest

    @rule(process=processes, verdict=verdicts, outcomes=ordinary)
    def a_stranger_s_verdict(self, process: int, verdict: Event, outcomes: list[Event]) -> None:
        """With ordinary outcomes around it, in one batch; then it changes no more than they do."""
        events: list[tuple[Event, str]] = [(each, "") for each in outcomes]
        self.happens(process, [*events, (verdict, "stranger"), *events])

    @rule(ms=st.sampled_from([5000, 5000, 10_000, 20_000, 60_000, 320_000]))
    def age(self, ms: int) -> None:
        self.ask(age_circuit(self.fleet[0], self.endpoint, ms))
        self.model = older(self.model, ms)
        self.claims = {probe: at - ms for probe, at in self.claims.items()}

    @precondition(lambda self: getattr(self, "model", CLOSED).open_until > 0)
    @rule()
    def cool_down(self) -> None:
        """So that histories get to the half open state often."""
        left = self.model.open_until - self.fleet[0].clock.now()
        if left > 0:
            self.age((left // SLOT_MS + 1) * SLOT_MS)

    # ---- what a random walk seldom finds -----------------------------------------------------------------------------

    @precondition(lambda self: getattr(self, "model", CLOSED).open_until > 0)
    @rule(times=st.integers(1, 7))
    def it_stays_broken(self, times: int) -> None:
        """Probe after probe fails: the cooldown doubles, up to its cap (S2-21)."""
        for number in range(times):
            self.cool_down()
            probe = f"again{number}"
            self.happens(0, [("claim", probe)])
            self.happens(1, [("probe_failed", probe)])
        self.claims.clear()

    @precondition(lambda self: getattr(self, "model", CLOSED).open_until > 0)
    @rule(older_one=st.booleans(), verdict=verdicts)
    def a_probe_is_overtaken(self, older_one: bool, verdict: Event) -> None:
        """Two without a verdict (S1-C2c); either may have the first."""
        self.cool_down()
        self.age(PROBE_MS)
        self.claim(0)
        self.age(PROBE_MS)
        self.claim(1)
        probe = self.model.probes[-2 if older_one else -1]
        self.claims.pop(probe)
        self.happens(2, [(verdict, probe)])
        if not self.model.probes:
            self.claims.clear()

    @precondition(lambda self: bool(getattr(self, "model", CLOSED).window))
    @rule(outcomes=st.lists(st.sampled_from(["good", "failed"]), min_size=1, max_size=2), slots=st.integers(10, 12))
    def about_a_minute_later(self, outcomes: list[Event], slots: int) -> None:
        """S2-20: what leaves the window."""
        self.age(slots * SLOT_MS)
        self.calls_end(0, outcomes)

    @invariant()
    def every_process_sees_it(self) -> None:
        if not hasattr(self, "model"):
            return
        for each in self.fleet:
            self.ask(each.circuits.poll())
            found = each.circuits.look(self.endpoint)
            assert found == (self.model if self.model.open_until else None)


def test_the_script_is_the_table(own_valkey: str) -> None:
    """S1-C2a..e over random histories of three processes."""
    config = settings_for(own_valkey, **ENV)
    with asyncio.Runner() as runner:
        CircuitMachine.runner = runner
        CircuitMachine.fleet = [runner.run(State.connect(config)) for _ in range(3)]
        CircuitMachine.policy = circuits.policy(config)
        try:
            run_state_machine_as_test(
                CircuitMachine,
                settings=settings(
                    max_examples=100, stateful_step_count=30, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                ),
            )  # fmt: skip
        finally:
            for each in CircuitMachine.fleet:
                runner.run(each.close())
