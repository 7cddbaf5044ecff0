"""Which step of its Plan a request calls next. Pure."""

from collections.abc import Callable

from msgspec import Struct

from shared.wire.messages import Step


class Tried(Struct):
    """A step that failed, or whose circuit let nobody pass."""

    step: Step
    ended_at: float  # loop time
    again: bool  # the same endpoint may be called again


def remaining(steps: tuple[Step, ...], tried: list[Tried], shut: Callable[[str], bool]) -> list[Step]:
    """First those not tried yet, in the Plan's order; then those that failed in a way that may pass, longest ago first.

    `shut`: whether an endpoint's circuit lets nobody pass now.
    """
    last = {entry.step: entry for entry in tried}
    barred = {entry.step.endpoint for entry in tried if not entry.again}
    barred |= {step.endpoint for step in steps if shut(step.endpoint)}
    fresh = [step for step in steps if step not in last and step.endpoint not in barred]
    again = sorted((e for e in last.values() if e.step.endpoint not in barred), key=lambda e: e.ended_at)
    return fresh + [entry.step for entry in again]
