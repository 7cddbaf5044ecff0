"""The simulator's control side, as a test sees it: its bill, its counters, its scripted faults, holding answers."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

READY_S = 15.0


class Sim:
    """A running simulator, by its URL (without /v1)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")

    def call(self, path: str, body: object = None, method: str | None = None) -> Any:
        """GET without a body, POST with one."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def bill(self) -> list[dict[str, Any]]:
        """Every call it accepted, with the tokens it wrote to its socket."""
        calls: list[dict[str, Any]] = self.call("/_sim/bill")["calls"]
        return calls

    def stats(self) -> dict[str, Any]:
        """in_flight, calls, peak ..."""
        stats: dict[str, Any] = self.call("/_sim/stats")
        return stats

    def in_flight(self) -> int:
        """Upstream requests open right now."""
        return int(self.stats()["in_flight"])

    def fault(self, *, match: dict[str, Any] | None = None, times: int = 1, **fault: Any) -> None:
        """Script a fault for the next `times` calls that match (0: without end), e.g. `status=500`, `cut_after=5`."""
        self.call("/_sim/faults", {"match": match or {}, "times": times, "fault": fault})

    def clear_faults(self) -> None:
        """Take every scripted fault back."""
        self.call("/_sim/faults", method="DELETE")

    def wait(self, within_ms: int = 5000, **counts: int) -> bool:
        """Whether so many were `held` (or `calls`, `ended`, `left`; `in_flight`: at most) within the time."""
        query = "&".join(f"{name}={count}" for name, count in counts.items())
        try:
            self.call(f"/_sim/wait?{query}&ms={within_ms}")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 408:
                return False
            raise
        return True

    def reset(self) -> None:
        """Empty the bill, the counters and the script."""
        self.call("/_sim/reset", {})

    def hold(self) -> None:
        """Keep every answer back until `release`."""
        self.call("/_sim/hold", {})

    def release(self) -> None:
        """Let the held answers go."""
        self.call("/_sim/release", {})

    def lines(self, rid: str) -> list[dict[str, Any]]:
        """The bill of one request, by call number."""
        calls: list[dict[str, Any]] = self.call(f"/_sim/bill?request_id={rid}.")["calls"]
        return sorted(calls, key=call_number)


def call_number(line: dict[str, Any]) -> int:
    """n of `<rid>.<n>`."""
    return int(line["request_id"].rpartition(".")[2])


T = TypeVar("T")


def until(probe: Callable[[], T], wanted: Callable[[T], bool], within: float, every: float = 0.01) -> T:
    """Ask until the answer is as wanted; the last answer either way, so that an assert shows it."""
    end = time.monotonic() + within
    while True:
        answer = probe()
        if wanted(answer) or time.monotonic() >= end:
            return answer
        time.sleep(every)


@contextlib.contextmanager
def running_simulator(*arguments: str) -> Iterator[Sim]:
    """A simulator of one's own, as a process, on a free port."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "deploy.simulator", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, "HOTPATH_READY_FD": str(write)}, pass_fds=(write,), stdin=subprocess.DEVNULL
    )
    os.close(write)
    try:
        yield Sim(json.loads(_line(read, process))["url"])
    finally:
        os.close(read)
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _line(read: int, process: "subprocess.Popen[bytes]") -> bytes:
    end = time.monotonic() + READY_S
    got = b""
    while not got.endswith(b"\n"):
        assert process.poll() is None, f"the simulator ended with {process.returncode}"
        assert time.monotonic() < end, f"the simulator was not ready within {READY_S} s"
        if select.select([read], [], [], 0.1)[0]:
            got += os.read(read, 4096)
    return got
