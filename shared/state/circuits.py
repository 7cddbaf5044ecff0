"""The circuits: moved in Redis by one script, where all outcomes meet; read from a map of this process.

While all is well that map is empty, and whether an endpoint may be called is one look-up (S2-05). Only for an endpoint
that is half_open the caller asks Redis for the one probe of the fleet (S1-C2a), just before the call.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from shared.core import circuit
from shared.core.circuit import Circuit, Event, Policy, Slot
from shared.settings import Settings
from shared.state import keys
from shared.state.base import StateUnavailable
from shared.state.pipeline import Pipeline
from shared.state.scripts import Scripts, load

_CIRCUIT: Final = load("circuit", "_circuit")
_TIMEOUT: Final = 0.150
#: Claims wait for the upstream call: no longer than a dispatch (DESIGN 4).
_CLAIM_TIMEOUT: Final = 0.100
#: What is known of an endpoint nobody calls any more is forgotten after a day.
_KEEP_MS: Final = 86_400_000

_MARKS: Final[dict[Event, bytes]] = {
    "good": b"+", "failed": b"-", "claim": b"C", "probe_good": b"P", "probe_failed": b"F", "probe_void": b"V",
}  # fmt: skip


def policy(settings: Settings) -> Policy:
    """The rule's numbers, from the settings."""
    return Policy(
        threshold=settings.circuit_failure_threshold,
        cooldown_ms=settings.circuit_breaker_cooldown_ms,
        probe_ms=settings.circuit_probe_ms,
        rate=settings.circuit_error_rate_percent,
        min_requests=settings.circuit_min_requests,
    )


class RedisCircuits:
    """`base.Circuits`."""

    def __init__(
        self, pipeline: Pipeline, scripts: Scripts, *, now: Callable[[], int], policy: Policy, wake: Callable[[], None]
    ) -> None:
        """`pipeline` reads; `now` is the shared clock; `wake` makes the poll run now."""
        self._pipeline = pipeline
        self._scripts = scripts
        self._now = now
        self._policy: Final = (
            policy.threshold, policy.cooldown_ms, policy.probe_ms, policy.rate, policy.least, _KEEP_MS,
        )  # fmt: skip
        self._known: dict[str, Circuit] = {}  # those that are not closed
        self._version = -1
        self.refresh_soon: Final = wake

    def look(self, endpoint: str) -> Circuit | None:
        """Its circuit as this process last heard of it; None when it is closed."""
        return self._known.get(endpoint)

    async def record(self, endpoint: str, events: Iterable[tuple[Event, str]]) -> circuit.State | None:
        """What happened there, oldest first, each with its probe's id ("" for ordinary calls). The state that follows
        when others should know of it, else None. Raises StateUnavailable, ValueError (ids)."""
        happened = tuple(events)
        if not happened:
            return None
        moved, _, now, found = await self._run(endpoint, happened, 0, _TIMEOUT)
        return circuit.state(found, now) if moved else None

    async def claim(self, endpoint: str, probe: str) -> bool:
        """Ask to be the one probe of a half_open endpoint; False: the circuit is as `look` now says. One Lua call.

        Raises StateUnavailable: the claim may stand; a probe_void gives it back, else it ends after CIRCUIT_PROBE_MS.
        """
        not_after = self._now() + int(_CLAIM_TIMEOUT * 1000)
        _, claimed, _, _ = await self._run(endpoint, (("claim", probe),), not_after, _CLAIM_TIMEOUT)
        return bool(claimed)

    async def _run(
        self, endpoint: str, events: Sequence[tuple[Event, str]], not_after: int, within: float
    ) -> tuple[int, int, int, Circuit]:
        probes = [probe for event, probe in events if event not in ("good", "failed")]
        for each in (endpoint, *probes):
            if not keys.OPAQUE.fullmatch(each):
                raise ValueError(f"not an id: {each[:80]!r}")
        marks = b"".join([_MARKS[event] for event, _ in events])
        args: tuple[bytes | int, ...] = (endpoint.encode(), marks, *self._policy, not_after, *map(str.encode, probes))
        moved, claimed, now, *fields = await self._scripts.run(_CIRCUIT, (keys.CIRCUITS,), args, within)
        found = _circuit(fields)
        if found.open_until:
            self._known[endpoint] = found
        else:
            self._known.pop(endpoint, None)
        return moved, claimed, now, found

    async def poll(self) -> None:
        """Read the circuits when their version moved. Raises StateUnavailable."""
        version = int(await self._pipeline.execute(b"HGET", keys.CIRCUITS, keys.CIRCUITS_VERSION, within=_TIMEOUT) or 0)
        if version == self._version:
            return
        self._known = {endpoint: found for endpoint, found in (await self.all()).items() if found.open_until}
        self._version = version

    async def all(self) -> dict[str, Circuit]:
        """What Redis knows of every endpoint called within the last day. Raises StateUnavailable."""
        flat = await self._pipeline.execute(b"HGETALL", keys.CIRCUITS, within=_TIMEOUT)
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        endpoints = {name.rpartition(b":")[0] for name in fields if b":" in name}
        return {
            endpoint.decode(): _circuit([fields.get(b"%b:%b" % (endpoint, name), b"") for name in keys.CIRCUIT_FIELDS])
            for endpoint in endpoints
        }


def _circuit(fields: Sequence[bytes]) -> Circuit:
    """From the values of keys.CIRCUIT_FIELDS, in order; b"" is a field that is not there (an older version wrote none).
    Raises StateUnavailable."""
    failures, open_until, openings, probes, probing, window = fields
    try:
        return Circuit(
            int(failures or 0),
            int(openings or 0),
            int(open_until or 0),
            tuple(probes.decode().split()),
            int(probing or 0),
            tuple(Slot(*map(int, slot.split(b":"))) for slot in window.split()),
        )
    except (ValueError, TypeError) as error:
        raise StateUnavailable(f"the circuits in Redis are damaged: {error}") from error
