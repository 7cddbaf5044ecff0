"""The processes of a running Hotpath as a fault test needs them: who is who, killed, frozen, whole again.

Every beat on the bus is read from before the first fault on, so that the instance id of a process that is long dead is
still known: only calls that such an instance held may be unconfirmed (I1).
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import nats
from msgspec import Struct

from deploy.cli.backoff import SERVED_S
from shared.wire import subjects
from shared.wire.messages import decode_beat
from tests.e2e.rig import Up

ROLES = ("ingress", "guardian", "routing", "provider")
WHOLE_S = 20.0


class Blow(Struct):
    """One fault: a process killed, or frozen until `until` (the same moment for a killed one). Monotonic seconds."""

    role: str
    pid: int
    instance: str
    at: float
    frozen: bool = False
    until: float = 0.0

    @property
    def kind(self) -> str:
        """As in "frozen provider"."""
        return f"{'frozen' if self.frozen else 'killed'} {self.role}"


class Fleet:
    """Who lives in an Up, and the blows dealt."""

    def __init__(self, up: Up, scale: int = 2) -> None:
        self.up = up
        self.scale = scale
        self.blows: list[Blow] = []
        self._instances: dict[int, str] = {}  # pid -> instance
        self._beats: dict[int, float] = {}  # pid -> when it was last heard
        self._first: dict[int, float] = {}  # pid -> when it was first heard

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Self]:
        """Read the beats while this runs; whole at its beginning."""
        bus = await nats.connect(self.up.run["nats_url"])
        await bus.subscribe(subjects.beat("*", "*"), cb=self._on_beat)
        try:
            await self.whole()
            yield self
        finally:
            for blow in self.blows:
                if blow.frozen and blow.until == 0.0:
                    os.kill(blow.pid, signal.SIGCONT)
            await bus.close()

    async def _on_beat(self, message: Any) -> None:
        beat = decode_beat(message.data)
        self._instances[beat.pid] = beat.instance
        self._beats[beat.pid] = time.monotonic()
        self._first.setdefault(beat.pid, self._beats[beat.pid])

    def pids(self, role: str) -> list[int]:
        """The ready processes of a role."""
        found: list[int] = self.up.run["pids"].get(role, [])
        return found

    @property
    def dead(self) -> set[str]:
        """The instances that are gone. Who stood still and lives settles late."""
        here = {pid for role in ROLES for pid in self.pids(role)}
        return {instance for pid, instance in self._instances.items() if pid not in here}

    async def whole(self, *roles: str, within: float = WHOLE_S) -> None:
        """Until every process (of these roles) is there and was heard after the last blow."""
        end = time.monotonic() + within
        after = max((blow.at for blow in self.blows), default=0.0)
        killed = {blow.pid for blow in self.blows if not blow.frozen}  # its last beat may come after the blow
        while True:
            pids = {role: [pid for pid in self.pids(role) if pid not in killed] for role in roles or ROLES}
            if all(len(found) == self.scale for found in pids.values()) and all(
                self._beats.get(pid, 0.0) > after for found in pids.values() for pid in found
            ):
                return
            assert time.monotonic() < end, (f"the fleet is not whole after {within} s", pids)
            await asyncio.sleep(0.02)

    async def served(self, role: str) -> None:
        """Until every process of the role has been ready for as long as its supervisor calls it one that had served:
        those that die before have to wait, each time longer (deploy/cli/backoff.py)."""
        while any(time.monotonic() - self._first.get(pid, 0.0) < SERVED_S + 0.1 for pid in self.pids(role)):
            await asyncio.sleep(0.02)

    def kill(self, role: str, number: int = 0) -> Blow:
        """SIGKILL to the process in that place."""
        blow = self._blow(role, number, signal.SIGKILL)
        blow.until = blow.at
        return blow

    def freeze(self, role: str, number: int = 0) -> Blow:
        """SIGSTOP; `thaw` it later."""
        blow = self._blow(role, number, signal.SIGSTOP)
        blow.frozen = True
        return blow

    def found(self, role: str, pid: int, at: float) -> Blow:
        """A process that stands still by itself (a kill point)."""
        blow = Blow(role, pid, self._instances[pid], at, frozen=True)
        self.blows.append(blow)
        return blow

    def thaw(self, blow: Blow) -> None:
        """SIGCONT."""
        os.kill(blow.pid, signal.SIGCONT)
        blow.until = time.monotonic()

    def _blow(self, role: str, number: int, what: signal.Signals) -> Blow:
        pid = self.pids(role)[number]
        blow = Blow(role, pid, self._instances[pid], time.monotonic())
        os.kill(pid, what)
        self.blows.append(blow)
        return blow
