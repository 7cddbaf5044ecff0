"""One place in the fleet: a command kept running, restarted with backoff, its ready line read, its output logged."""

import asyncio
import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deploy.cli.backoff import Backoff
from deploy.cli.logs import LogFile, Output, Screen
from deploy.cli.procfile import ROOT

BAD_CONFIG: Final = 78  # what a process exits with when settings or catalogue are refused (sysexits EX_CONFIG)
MAX_READY: Final = 16_384  # bytes of ready lines one process may write


class ReadyLines(asyncio.Protocol):
    """The read end of HOTPATH_READY_FD: one JSON object a line."""

    def __init__(self, on_line: Callable[[dict[str, Any]], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self._left = MAX_READY

    def data_received(self, data: bytes) -> None:
        """Parse whole lines; what is no object, or too much, is ignored."""
        self._left -= len(data)
        if self._left < 0:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    self._on_line(found)


@dataclass(kw_only=True)
class Spec:
    """What to run. `order`: when it is stopped, lowest first. `probe`: for servers, which write no ready line."""

    role: str
    number: int
    command: list[str]
    env: Mapping[str, str]
    log: Path
    order: int
    grace: float  # seconds from SIGTERM to SIGKILL
    fds: tuple[int, ...] = ()
    probe: Callable[[], Awaitable[None]] | None = None
    quiet: bool = False  # a server: its output goes to the file only
    rolls: bool = False  # a second one may run beside it, so that `hotpath restart` can replace it

    @property
    def name(self) -> str:
        """As in guardian.2."""
        return f"{self.role}.{self.number}"


@dataclass(kw_only=True)
class Events:
    """What a slot tells its supervisor."""

    started: Callable[[Spec, int], None]
    ready: Callable[[Spec, int, dict[str, Any]], None]
    ended: Callable[[Spec, int], None]


@dataclass
class Slot:
    """Keeps one Spec running until `stop`."""

    spec: Spec
    screen: Screen
    events: Events
    together: bool = False  # its first life begins with the whole fleet's
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    died: asyncio.Event = field(default_factory=asyncio.Event)  # at least once
    refused: bool = False  # it exited with BAD_CONFIG before it was ever ready
    killed: bool = False  # it did not end within its grace
    pid: int = 0  # of its last life
    metrics: str = ""  # the URL its last life has told
    process: asyncio.subprocess.Process | None = None
    task: "asyncio.Task[None] | None" = None  # ends only by `stop`, a refusal, or a fault (its log cannot be opened)
    _stopping: bool = False
    _ever_ready: bool = False
    _ready_at: float = math.inf  # in this life

    def start(self) -> None:
        """Begin; returns at once."""
        self.task = asyncio.create_task(self._keep(), name=self.spec.name)

    async def _keep(self) -> None:
        backoff = Backoff()
        log = LogFile(self.spec.log)
        try:
            while not self._stopping:
                started = time.monotonic()
                self._ready_at = math.inf
                code, tail = await self._run(log)
                self.died.set()
                if self._stopping:
                    return
                if code == BAD_CONFIG and not self._ever_ready:
                    self.refused = True
                    return
                now = time.monotonic()
                wait = backoff.pause(now, alive=now - started, served=now - self._ready_at)
                self._tell(code, tail, wait)
                await asyncio.sleep(wait)
        finally:
            log.close()

    def _tell(self, code: int, tail: list[bytes], wait: float) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.screen.say(f"{self.spec.name} {how}; started again in {wait:g} s (log: {self.spec.log})")
        if self.spec.quiet:
            for line in tail:
                self.screen.say(f"{self.spec.name} | {line.decode('utf-8', 'replace')}")

    async def _run(self, log: LogFile) -> tuple[int, list[bytes]]:
        """One life of the process: its exit code (negative: the signal) and its last lines."""
        loop = asyncio.get_running_loop()
        ready_read, ready_write = os.pipe()
        out_read, out_write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=asyncio.subprocess.DEVNULL, stdout=out_write, stderr=out_write,
                env={**self._env(), "HOTPATH_READY_FD": str(ready_write)},
                cwd=ROOT, pass_fds=(ready_write, *self.spec.fds),
                start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor only, which stops them in order
            )  # fmt: skip
        except OSError as exc:
            os.close(ready_read)
            os.close(out_read)
            return 127, [f"{self.spec.command[0]}: {exc.strerror}".encode()]
        finally:
            os.close(ready_write)
            os.close(out_write)
        pid = process.pid
        self.process, self.pid = process, pid
        self.events.started(self.spec, pid)
        show = None if self.spec.quiet else lambda line: self.screen.line(self.spec.name, line)
        out, output = await loop.connect_read_pipe(lambda: Output(log, show), os.fdopen(out_read, "rb", 0))
        lines, _ = await loop.connect_read_pipe(
            lambda: ReadyLines(lambda found: self._on_ready(pid, found)), os.fdopen(ready_read, "rb", 0)
        )
        probing = asyncio.create_task(self._probe(pid)) if self.spec.probe is not None else None
        try:
            code = await process.wait()
            with contextlib.suppress(TimeoutError):  # a child of its own may hold the pipe open
                await asyncio.wait_for(asyncio.shield(output.ended), 0.2)
        finally:
            if probing is not None:
                probing.cancel()
            out.close()
            lines.close()
            self.process = None
            self.ready.clear()
            self.events.ended(self.spec, pid)
        return code, list(output.tail)

    def _env(self) -> dict[str, str]:
        """The environment of the next life. A test's KILLAT is for one process of a role, once: see killat.py."""
        env = dict(self.spec.env)
        if self.spec.number > 1 or self.died.is_set():
            env.pop("KILLAT", None)
        if self.together and not self.died.is_set():
            env["HOTPATH_TOGETHER"] = "true"
        return env

    async def _probe(self, pid: int) -> None:
        assert self.spec.probe is not None
        await self.spec.probe()
        self._on_ready(pid, {"role": self.spec.role, "pid": pid})

    def _on_ready(self, pid: int, found: dict[str, Any]) -> None:
        if self.process is None or self.process.pid != pid:
            return
        self._ever_ready, self._ready_at = True, time.monotonic()
        metrics = found.get("metrics")
        self.metrics = metrics if isinstance(metrics, str) else ""
        self.events.ready(self.spec, pid, found)
        self.ready.set()

    async def stop(self, hurry: asyncio.Event) -> None:
        """SIGTERM, wait for the spec's grace (or until `hurry`), then SIGKILL to it and whatever it started.

        Asked again it waits too and sends no second SIGTERM, which would end a drain.
        """
        told, self._stopping = self._stopping, True
        task, process = self.task, self.process
        if task is None:
            return
        if process is None:  # between two lives, or before the first
            task.cancel()
        else:
            if not told:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            await self._wait(task, hurry)
            if not task.done():
                if not hurry.is_set():
                    self.killed = True
                    self.screen.say(f"{self.spec.name} did not end within {self.spec.grace:g} s: killed")
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait({task})

    async def _wait(self, task: "asyncio.Task[None]", hurry: asyncio.Event) -> None:
        hurried = asyncio.create_task(hurry.wait())
        try:
            await asyncio.wait({task, hurried}, timeout=self.spec.grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()
