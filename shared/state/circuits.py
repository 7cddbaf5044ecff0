"""Which endpoints are out of rotation: counted in Redis by one script, read from a map of this process (S2-05)."""

from collections.abc import Callable, Iterable
from typing import Final

from shared.state import keys
from shared.state.base import StateUnavailable
from shared.state.pipeline import Pipeline
from shared.state.scripts import Scripts, load

_CIRCUIT: Final = load("circuit", prelude=False)
_TIMEOUT: Final = 0.150
#: Counts of an endpoint nobody calls any more are forgotten after a day.
_KEEP_MS: Final = 86_400_000


class RedisCircuits:
    """`base.Circuits`: after the cool-down calls pass again until the next failure (one probe comes later)."""

    def __init__(
        self, pipeline: Pipeline, scripts: Scripts, *, threshold: int, cooldown_ms: int, wake: Callable[[], None]
    ) -> None:
        """`pipeline` reads; `wake` makes the poll run now."""
        self._pipeline = pipeline
        self._scripts = scripts
        self._policy = (threshold, cooldown_ms)
        self._until: dict[str, int] = {}
        self._version = -1
        self.refresh_soon: Final = wake

    def open_until(self, endpoint: str) -> int:
        """Shared-clock ms until which the endpoint is out of rotation; 0 or a time gone by when it may be called."""
        return self._until.get(endpoint, 0)

    async def record(self, endpoint: str, outcomes: Iterable[bool]) -> bool:
        """Count ended calls, oldest first; True when it opened or closed. Raises StateUnavailable, ValueError."""
        if not keys.OPAQUE.fullmatch(endpoint):
            raise ValueError(f"not an endpoint id: {endpoint[:80]!r}")
        marks = bytes(49 if ok else 48 for ok in outcomes)
        if not marks:
            return False
        changed, until = await self._scripts.run(
            _CIRCUIT, (keys.CIRCUITS,), (endpoint.encode(), marks, *self._policy, _KEEP_MS), _TIMEOUT
        )
        if changed:
            self._until[endpoint] = until
        return bool(changed)

    async def poll(self) -> None:
        """Read the circuits when their version moved. Raises StateUnavailable."""
        version = int(await self._pipeline.execute(b"HGET", keys.CIRCUITS, keys.CIRCUITS_VERSION, within=_TIMEOUT) or 0)
        if version == self._version:
            return
        flat = await self._pipeline.execute(b"HGETALL", keys.CIRCUITS, within=_TIMEOUT)
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        try:
            self._until = {
                name[: -len(b":until")].decode(): int(value)
                for name, value in fields.items()
                if name.endswith(b":until")
            }
        except ValueError as error:
            raise StateUnavailable(f"the circuits in Redis are damaged: {error}") from error
        self._version = version
