"""`hotpath up` as a test sees it: started in a directory of its own, asked by its command line, stopped for good."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy import servers

START_S = 60.0
STOP_S = 30.0
CLI_S = 30.0

#: Names that would make the tests depend on the machine they run on.
_OURS = (
    "HOTPATH_",
    "GATEWAY_",
    "NATS_",
    "REDIS_",
    "METRICS_",
    "WORKER_ROLES",
    "KEY_PEPPER",
    "ADMIN_",
    "OPENAI_",
)


class CliError(AssertionError):
    """A command failed; the message is what it wrote to stderr."""


def clean_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without any setting of Hotpath's, and with these. A drain of streams is kept short."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    return {**kept, "SHUTDOWN_STREAM_DRAIN_MS": "5000", **(env or {})}


class Up:
    """A `hotpath up`. As a context manager it is started on entry and stopped on exit."""

    def __init__(
        self, data: Path, *options: str, env: Mapping[str, str] | None = None, descriptors: int | None = None
    ) -> None:
        self.data = data
        self.descriptors = descriptors  # `ulimit -n` of everything
        self.env = clean_env(env)
        self.options = options
        self.output = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._log = data.with_name(data.name + ".out")

    # ---- life

    def start(self) -> Self:
        """Start it and wait until it has said that it is ready. Raises AssertionError with its output."""
        self.launch()
        self.wait_ready()
        return self

    def launch(self) -> None:
        """Start it and return at once."""
        options = list(self.options)
        if "--port" not in options:
            options += ["--port", str(servers.free_port())]
        command = [sys.executable, "-m", "deploy.cli", "up", "--data", str(self.data), *options]
        if self.descriptors is not None:
            command = ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(self.descriptors), *command]
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def wait_ready(self, within: float = START_S) -> None:
        """Until its banner is printed."""
        assert self.process is not None
        end = time.monotonic() + within
        while "Hotpath is ready on" not in self.said():
            assert self.process.poll() is None, f"hotpath up ended with {self.process.returncode}:\n{self.said()}"
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"hotpath up was not ready within {within} s:\n{self.said()}")
            time.sleep(0.01)

    def said(self) -> str:
        """What it wrote to the terminal so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def signal(self, number: int = signal.SIGINT) -> None:
        """Ctrl-C, as the terminal sends it."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, within: float = STOP_S) -> int:
        """Until it has ended; its exit code."""
        assert self.process is not None
        return self.process.wait(within)

    def stop(self) -> int:
        """Ctrl-C and wait; its exit code. When it does not end in time it is killed and AssertionError raised."""
        if self.process is None or self.process.poll() is not None:
            return 0 if self.process is None else self.process.returncode
        self.signal()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"hotpath up did not end within {STOP_S} s:\n{self.said()}") from None

    def kill(self) -> None:
        """SIGKILL to the supervisor alone: its warden ends the rest."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- what it says of itself

    @property
    def run(self) -> dict[str, Any]:
        """run.json as it stands now."""
        found: dict[str, Any] = json.loads((self.data / "run.json").read_text())
        return found

    @property
    def url(self) -> str:
        """The gateway, without /v1."""
        url: str = self.run["url"]
        return url

    def pids(self) -> list[int]:
        """Every process of the fleet."""
        return [pid for pids in self.run["pids"].values() for pid in pids]

    # ---- its command line

    def cli_run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """`hotpath WORDS... --data DIR`, as it ends."""
        command = [sys.executable, "-m", "deploy.cli", *words, "--data", str(self.data)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=CLI_S, check=False)

    def cli(self, *words: str) -> Any:
        """`hotpath WORDS... --json --data DIR`: its JSON. Raises CliError when it fails."""
        done = self.cli_run(*words, *([] if "--json" in words else ["--json"]))
        if done.returncode != 0:
            raise CliError(f"hotpath {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
