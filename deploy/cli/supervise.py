"""The supervisor: starts the fleet, keeps it running, stops it in order. Asked by `hotpath up` only.

Order of the end: the ingress first (it waits for its clients' answers, which need everything else), then provider,
routing and guardian, the simulator, and the servers last. A second signal kills what is left.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from deploy.cli.logs import Screen
from deploy.cli.runfile import RunFile
from deploy.cli.slot import Events, Slot, Spec

#: When each role is stopped.
ORDER: Final = {"ingress": 0, "provider": 1, "routing": 2, "guardian": 3, "simulator": 5, "nats": 6, "redis": 6}
OTHER: Final = 4  # a role of the Procfile that is not known here
READY_TIMEOUT_S: Final = 60.0
READY_POLL_S: Final = 0.015
PATIENCE_S: Final = 5.0  # after that a fleet that runs and is not ready is said to be so


class NotStarted(Exception):
    """The fleet did not become ready; the message says which part and what to do. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Warden:
    """The supervisor's end of the pipe to deploy/cli/warden.py."""

    def __init__(self, lock: int) -> None:
        """`lock` is the descriptor of the locked data directory: it stays locked until the warden has ended too."""
        script = Path(__file__).with_name("warden.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={}, pass_fds=(lock,), start_new_session=True,
            bufsize=0,
        )  # fmt: skip

    def tell(self, line: str) -> None:
        """A process started or ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode("ascii") + b"\n")

    def close(self) -> None:
        """Everything has ended: so does the warden."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Supervisor:
    """The fleet. `start` the specs, `wait_ready`, sleep in `run`, and always `stop`."""

    def __init__(self, run_file: RunFile, screen: Screen, lock: int, listener: socket.socket | None = None) -> None:
        self.run_file = run_file
        self.screen = screen
        self.slots: list[Slot] = []
        self.hurry = asyncio.Event()  # a second signal: kill
        self.leaving = asyncio.Event()
        self._complete = False  # the fleet has been ready as a whole
        self._listener = listener
        self._warden = Warden(lock)
        self._events = Events(started=self._started, ready=self._ready, ended=self._ended)

    def _started(self, spec: Spec, pid: int) -> None:
        self._warden.tell(f"+{spec.order} {pid}")

    def _ready(self, spec: Spec, pid: int, found: dict[str, Any]) -> None:
        role = found.get("role") if isinstance(found.get("role"), str) else spec.role
        metrics = found.get("metrics") if isinstance(found.get("metrics"), str) else ""
        self.run_file.add(str(role), pid, str(metrics))

    def _ended(self, _: Spec, pid: int) -> None:
        self._warden.tell(f"-{pid}")
        self.run_file.remove(pid)

    def on_signals(self) -> None:
        """SIGINT, SIGTERM and a closed terminal: leave; the second one: at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.leaving.is_set():
            self.hurry.set()
        else:
            self.leaving.set()

    def start(self, spec: Spec) -> Slot:
        """Start one more process; returns at once."""
        slot = Slot(spec, self.screen, self._events, together=not self._complete)
        self.slots.append(slot)
        slot.start()
        return slot

    async def drop(self, slot: Slot, *, at_once: bool = False) -> None:
        """Stop one, `at_once` without a drain, and forget it. Cancelled, it is still stopped with the rest."""
        hurry = self.hurry
        if at_once:
            hurry = asyncio.Event()
            hurry.set()
        await slot.stop(hurry)
        self.slots.remove(slot)

    async def wait_ready(self, is_ready: Callable[[], Awaitable[bool]]) -> bool:
        """Until every process has said so and `is_ready` answers True; False when told to leave before.

        Raises NotStarted when a process refuses its settings, or has not said so after READY_TIMEOUT_S. A fleet that
        runs and is not ready (its Redis is away, S1-M6a) is waited for without end: it heals by itself.
        """
        work = asyncio.create_task(self._all_ready(is_ready))
        leaving = asyncio.create_task(self.leaving.wait())
        tasks = {slot.task for slot in self.slots if slot.task is not None}
        watched = {work, leaving, *tasks}
        try:
            done, _ = await asyncio.wait(watched, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not done and all(slot.ready.is_set() for slot in self.slots):
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if self.leaving.is_set():
                return False
            self._look_for_faults()
            if not work.done():
                late = ", ".join(slot.spec.name for slot in self.slots if not slot.ready.is_set())
                logs = self.slots[0].spec.log.parent
                raise NotStarted(f"not ready within {READY_TIMEOUT_S:g} s: {late or 'GET /ready'} (logs: {logs})")
            work.result()
            self._complete = True
            return True
        finally:
            work.cancel()
            leaving.cancel()

    def _look_for_faults(self) -> None:
        """Raise NotStarted when a process has refused its settings or cannot even be tried."""
        ended = [slot for slot in self.slots if slot.task is not None and slot.task.done()]
        refused = [slot.spec.name for slot in ended if slot.refused]
        if refused:
            raise NotStarted(f"{', '.join(refused)} refused the configuration (above); nothing was started", 78)
        for slot in ended:
            fault = slot.task.exception() if slot.task is not None else None
            if fault is not None:
                raise NotStarted(f"{slot.spec.name}: {fault}") from fault

    async def _all_ready(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        for slot in self.slots:
            await slot.ready.wait()
        say_at = time.monotonic() + PATIENCE_S
        while not await is_ready():
            if time.monotonic() >= say_at:
                self.screen.say("every process runs, but the gateway is not ready yet: GET /ready says what is missing")
                say_at = float("inf")
            await asyncio.sleep(READY_POLL_S)

    async def stop(self) -> None:
        """Everything, in order; returns when nothing is left."""
        for order in sorted({slot.spec.order for slot in self.slots}):
            await asyncio.gather(*(slot.stop(self.hurry) for slot in self.slots if slot.spec.order == order))
            if order == ORDER["ingress"] and self._listener is not None:
                self._listener.close()  # nobody accepts any more: refused is better than left waiting
        self.run_file.close()
        self._warden.close()


def open_lock(path: Path) -> int:
    """Lock the data directory for this process (and its warden). Raises BlockingIOError while another holds it."""
    import fcntl  # noqa: PLC0415 - not on every platform, and only needed here

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
