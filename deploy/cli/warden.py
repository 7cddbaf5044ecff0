"""The warden: a small process that ends everything when its supervisor was killed without a chance to.

`hotpath up` tells it over a pipe which processes it started (`+<order> <pid>`) and which have ended (`-<pid>`). The
pipe's end is the supervisor's: when it dies, even by SIGKILL, the kernel closes it, and the warden ends what is left,
lowest order first. So neither roles nor servers need to know about it, and it works wherever pipes do. It runs as a
plain script with `-I -S` and imports next to nothing: about 10 ms of CPU and 8 MB.
"""

import os
import select
import signal
import sys
import time
from typing import Final

GRACE_S: Final = 3.0  # for each order; then SIGKILL
MAX_LINE: Final = 64


class Process:
    """One process to end. By its pidfd where there is one, so that a reused pid is never hit."""

    def __init__(self, order: int, pid: int) -> None:
        self.order = order
        self.pid = pid
        self.fd = -1
        if hasattr(os, "pidfd_open"):
            try:
                self.fd = os.pidfd_open(pid)
            except OSError:
                self.fd = -2  # gone already

    def signal(self, number: int) -> bool:
        """Send it; False when the process is gone."""
        try:
            if self.fd >= 0:
                signal.pidfd_send_signal(self.fd, number)
            elif self.fd == -1:
                os.kill(self.pid, number)
        except OSError:
            return False
        return self.fd != -2

    def gone(self) -> bool:
        """Whether it has ended, even if nobody has taken note of that yet (a zombie still takes signals)."""
        if self.fd >= 0:
            return bool(select.select([self.fd], [], [], 0)[0])
        return not self.signal(0)

    def close(self) -> None:
        """Forget it."""
        if self.fd >= 0:
            os.close(self.fd)


def note(processes: dict[int, Process], line: str) -> None:
    """One line of the supervisor's."""
    if line.startswith("+"):
        order, _, pid = line[1:].partition(" ")
        processes[int(pid)] = Process(int(order), int(pid))
    elif line.startswith("-"):
        gone = processes.pop(int(line[1:]), None)
        if gone is not None:
            gone.close()


def end(processes: dict[int, Process]) -> None:
    """SIGTERM in order, each order given its grace, then SIGKILL."""
    for order in sorted({process.order for process in processes.values()}):
        group = [process for process in processes.values() if process.order == order and process.signal(signal.SIGTERM)]
        limit = time.monotonic() + GRACE_S
        while group and time.monotonic() < limit:
            time.sleep(0.02)
            group = [process for process in group if not process.gone()]
        for process in group:
            process.signal(signal.SIGKILL)


def main() -> None:
    """Read lines from descriptor 0 until it ends, then end what was not taken back."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes: dict[int, Process] = {}
    rest = ""
    while chunk := os.read(0, 4096):
        *lines, rest = (rest + chunk.decode("ascii")).split("\n")
        for line in lines:
            note(processes, line)
        if len(rest) > MAX_LINE:
            break
    end(processes)
    sys.exit(0)


if __name__ == "__main__":
    main()
