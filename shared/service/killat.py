"""Named points at which a test kills a process, to show what a crash right there costs (I1..I10; faults, section 1).

    HOTPATH_TEST=1 KILLAT=guardian.after_reserve ...   the process dies when it first comes to that point; `hotpath up`
                                                       hands this to the first process of each role, for its first life
    HOTPATH_TEST=1 KILLAT_DIR=DIR ...                  the process that comes to point P while DIR/P exists takes that
                                                       file away and dies: once, whichever process it is, even though
                                                       the supervisor starts the next one with the same environment.
                                                       With "STOP" in the file it stands still there, until SIGCONT.

Bound at import: without HOTPATH_TEST=1 both functions do nothing (50 ns a point). The death is SIGKILL: no handler,
no flush, no goodbye. `POINTS` lists every point, in the order a request comes to them.
"""

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn, Protocol

POINTS: Final = (
    "ingress.before_publish",  # the request is read and checked, nobody knows of it
    "ingress.after_publish",  # handed over, in the loop turn after its bytes went to the socket
    "ingress.first_delta",  # text has come, none of it was written
    "ingress.mid_stream",  # text was written, more was to come
    "ingress.before_terminal",  # the terminal has come, the client does not know
    "guardian.on_message",
    "guardian.before_reserve",
    "guardian.after_reserve",
    "guardian.after_forward",
    "routing.on_message",
    "routing.after_forward",
    "routing.before_record",  # outcomes have come, the breaker does not know
    "provider.on_message",
    "provider.before_dispatch",
    "provider.after_dispatch",  # won, nobody told
    "provider.after_accepted",  # told, before the upstream is dialled
    "provider.after_send",  # the request is in the socket
    "provider.after_head",  # the answer's head is read, nothing was given out
    "provider.after_delta",  # text is on its way to the client
    "provider.mid_stream",
    "provider.before_extend",  # more was generated than is reserved, the ledger was not asked
    "provider.after_extend",  # more is reserved, or denied, and the upstream held
    "provider.before_settle",  # the call has ended, the ledger does not know
    "provider.after_settle",  # settled, the client does not know
    "provider.before_topup",  # a call failed and is settled, the next is not opened
    "provider.after_topup",  # the next call is open, not made
    "provider.after_end",  # the terminal is on its way
)


#: What a file of KILLAT_DIR holds when the process shall be frozen instead.
STOP: Final = "STOP"


class Reach(Protocol):
    """What `reach` and `reach_soon` are."""

    def __call__(self, point: str) -> None:
        """The process has come to this point."""


def _pass(point: str) -> None:
    """Nothing is armed."""


def _die(_point: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _armed(env: Mapping[str, str]) -> Reach:
    """What `reach` does in this environment."""
    if env.get("HOTPATH_TEST") != "1":
        return _pass
    wanted, folder = env.get("KILLAT", ""), env.get("KILLAT_DIR", "")
    if not wanted and not folder:
        return _pass

    def reach(point: str) -> None:
        if point == wanted:
            _die(point)
        if folder:
            file = Path(folder, point)
            try:
                what = file.read_text()
                file.unlink()
            except FileNotFoundError:  # not armed, or somebody else's
                return
            if what == STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                _die(point)

    return reach


def _later(reach: Reach) -> Reach:
    """The same one loop turn on, when what this turn published is with the kernel."""
    if reach is _pass:
        return _pass

    def reach_soon(point: str) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, reach, point)

    return reach_soon


reach: Final[Reach] = _armed(os.environ)
reach_soon: Final[Reach] = _later(reach)
