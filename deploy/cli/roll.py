"""Replaces the processes of a role one at a time, without a request lost (issue 3; deploy/decisions/0016-rolling.md).

For each: start another one, wait until it is ready and every ingress has heard it, then SIGTERM the old one and wait
until it has drained. A replacement that does not become ready is stopped again, and the old one goes on as before.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from deploy.cli.slot import Slot
from deploy.cli.supervise import Supervisor

READY_S: Final = 60.0  # as at a start
HEARD_S: Final = 10.0  # beats come every 0.1 s from a process that is new
HEARD_POLL_S: Final = 0.05
REPORT_S: Final = 5.0  # while a new one boots or an old one drains

#: With `all`: who receives before who sends, so that a message with something new finds a reader that knows it.
ROLE_ORDER: Final = ("provider", "routing", "guardian")
ALL: Final = "all"

T = TypeVar("T")
#: Takes a line of progress.
Report = Callable[[str], None]
#: Whether everybody who should has heard of the process with this metrics URL.
Heard = Callable[[str], Awaitable[bool]]


class NotReplaced(Exception):
    """A roll ended early; the message says where, why, and what runs now."""


class Roll:
    """The rolls of one supervisor; one at a time."""

    def __init__(self, supervisor: Supervisor, heard: Heard) -> None:
        self._supervisor = supervisor
        self._heard = heard
        self._busy = False

    async def run(self, role: str, report: Report) -> list[dict[str, Any]]:
        """Replace every process of the role, or of all: [{"name", "old", "new", "seconds"}]. Raises NotReplaced."""
        slots = self._slots(role)
        if self._busy:
            raise NotReplaced("another restart is under way; wait for it")
        self._busy = True
        try:
            return [await self._replace(slot, report) for slot in slots]
        finally:
            self._busy = False

    def _slots(self, role: str) -> list[Slot]:
        """Whom it means, in order. Raises NotReplaced for what is no role."""
        slots = [slot for slot in self._supervisor.slots if slot.spec.rolls]
        roles = list(dict.fromkeys(slot.spec.role for slot in slots))
        if role == ALL:
            first = [name for name in ROLE_ORDER if name in roles]
            last = [name for name in roles if name == "ingress"]
            order = [*first, *(name for name in roles if name not in {*first, *last}), *last]
            return sorted(slots, key=lambda slot: (order.index(slot.spec.role), slot.spec.number))
        found = [slot for slot in slots if slot.spec.role == role]
        if found:
            return found
        choice = ", ".join([*roles, ALL])
        if any(slot.spec.role == role for slot in self._supervisor.slots):
            raise NotReplaced(f"{role} is one process and keeps its port: it cannot be rolled (choose of: {choice})")
        raise NotReplaced(f"no process of that role runs here (choose of: {choice})")

    async def _replace(self, old: Slot, report: Report) -> dict[str, Any]:
        began = time.monotonic()
        name, old_pid = old.spec.name, old.pid
        report(f"{name}: starting a replacement of pid {old_pid}")
        fresh = self._supervisor.start(old.spec)
        fault = await _told(self._boot(fresh), report, f"{name}: its replacement is not ready yet")
        if fault:
            await self._supervisor.drop(fresh, at_once=not fresh.ready.is_set())
            raise NotReplaced(f"{name}: its replacement {fault} (log: {old.spec.log}); pid {old_pid} goes on")
        report(f"{name}: pid {fresh.pid} is ready, pid {old_pid} drains")
        await _told(self._supervisor.drop(old), report, f"{name}: pid {old_pid} still drains")
        if old.killed:
            raise NotReplaced(f"{name}: pid {old_pid} did not end in time and was killed; pid {fresh.pid} serves")
        seconds = round(time.monotonic() - began, 1)
        report(f"{name}: pid {old_pid} has ended ({seconds} s)")
        return {"name": name, "old": old_pid, "new": fresh.pid, "seconds": seconds}

    async def _boot(self, fresh: Slot) -> str:
        """Until it is ready and heard; why not, or nothing."""
        ready, died = asyncio.create_task(fresh.ready.wait()), asyncio.create_task(fresh.died.wait())
        try:
            await asyncio.wait({ready, died}, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            died.cancel()
        if fresh.died.is_set():
            return "ended before it was ready"
        if not fresh.ready.is_set():
            return f"was not ready within {READY_S:g} s"
        end = time.monotonic() + HEARD_S
        while not await self._heard(fresh.metrics):
            if time.monotonic() > end:
                return f"was not heard by every ingress within {HEARD_S:g} s"
            await asyncio.sleep(HEARD_POLL_S)
        return "ended as soon as it was ready" if fresh.died.is_set() else ""


async def _told(work: Coroutine[Any, Any, T], report: Report, text: str) -> T:
    """Its result; what is being waited for is said every REPORT_S."""
    began = time.monotonic()
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=REPORT_S))[0]:
            report(f"{text} after {time.monotonic() - began:.0f} s")
    finally:
        task.cancel()
    return task.result()
