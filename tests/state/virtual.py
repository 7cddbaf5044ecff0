"""The ledger's scripts under a clock of the test's own: midnights, months and years in a moment.

The scripts ask the server for the time in one line, and have no switch: here that one line reads a key of the tenant
instead. All else is the Lua that ships, on a real server.
"""

from typing import Any, Final

from shared.state import keys
from shared.state.ledger import RedisLedger
from shared.state.pipeline import Pipeline
from shared.state.redis import State
from shared.state.scripts import Script, Scripts, digest

_SERVER_TIME: Final = b"redis.call('TIME')"
_TEST_TIME: Final = b"redis.call('HMGET', KEYS[1] .. ':clock', 's', 'us')"


class VirtualScripts(Scripts):
    """Runs each script with that line changed."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self._changed: dict[str, Script] = {}

    async def run(self, script: Script, keys: tuple[bytes, ...], args: tuple[bytes | int, ...], within: float) -> Any:
        changed = self._changed.get(script.name)
        if changed is None:
            assert script.text.count(_SERVER_TIME) == 1
            text = script.text.replace(_SERVER_TIME, _TEST_TIME)
            changed = self._changed[script.name] = Script(script.name, text, digest(text))
        return await super().run(changed, keys, args, within)


class VirtualClock:
    """A tenant's time: what `now` says is what its scripts are told."""

    def __init__(self, state: State, tenant: str, now: int) -> None:
        self._state = state
        self.tenant = tenant
        self._key = keys.balances(tenant) + b":clock"
        self.ms = now
        self.us = 0

    def now(self) -> int:
        return self.ms

    async def set(self, ms: int, us: int = 0) -> None:
        self.ms, self.us = ms, us
        parts = (b"s", ms // 1000, b"us", ms % 1000 * 1000 + us)
        await self._state._side.execute(b"HSET", self._key, *parts, within=5.0)


def ledger(state: State, clock: VirtualClock, **spans: int) -> RedisLedger:
    """A ledger on the hot connection of `state`, in the clock's time."""
    chosen: dict[str, Any] = {
        "lease_grace_ms": 10_000,
        "tombstone_ms": 600_000,
        "unconfirmed_ms": 86_400_000,
        "journal_lines": 100_000,
        "snapshot_ms": 10**15,
        "renew_ms": 10**15,
    } | spans
    return RedisLedger(state._hot, VirtualScripts(state._hot), now=clock.now, **chosen)
