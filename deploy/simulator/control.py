"""What a test sees of the simulator and scripts in it: /_sim/bill, faults, hold, release, wait, stats, reset.

    GET  /_sim/bill[?request_id=PREFIX]   {"calls": [...], "dropped": n}
    POST /_sim/faults                     see faults.py; GET lists the rules and how often each struck; DELETE clears
    POST /_sim/hold {"max_ms": 60000}     every answer waits before its first byte, each at most so long
    POST /_sim/release                    they go on
    GET  /_sim/stats                      {"in_flight", "peak", "held", "calls", "ended", "left", "refused", ...,
                                           "blocked": answers whose socket takes no more, "waiting_bytes" behind them}
    GET  /_sim/wait?held=137&ms=5000      answers when so many are held (also calls=, ended=, left=: at least;
                                          in_flight=: at most), 408 when the time is up: a test need not poll
    POST /_sim/reset                      forget bill, faults, counts; release

Nothing here asks for a key: the simulator listens on loopback unless it is told otherwise.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec
import orjson
from aiohttp import web
from msgspec import Struct

from deploy.simulator.bill import MAX_LINES, Bill
from deploy.simulator.faults import FaultBook
from deploy.simulator.player import error_response

MAX_WAIT_MS: Final = 120_000
MAX_WAITERS: Final = 100


class Counts(Struct):
    """Since the start or the last reset; `in_flight` and `held` are now."""

    in_flight: int = 0
    peak: int = 0
    held: int = 0
    calls: int = 0  # valid requests, those that a fault answered included
    streams: int = 0
    ended: int = 0  # calls that are over, however
    left: int = 0  # of these, the client was gone before the end
    refused: int = 0  # 400, 401, 404
    struck: int = 0  # by a fault


class _Hold(Struct, frozen=True, forbid_unknown_fields=True):
    max_ms: int = 60_000


class Desk:
    """The state a running simulator has: its bill, its faults, its counts, and whether answers are held."""

    def __init__(self, max_lines: int = MAX_LINES) -> None:
        self.bill = Bill(max_lines)
        self.faults = FaultBook()
        self.counts = Counts()
        self._released: asyncio.Event | None = None
        self._hold_s = 0.0
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.writing: set[asyncio.Transport] = set()  # of the calls under way

    def enter(self, transport: asyncio.Transport | None, *, stream: bool) -> None:
        """A call has begun."""
        if transport is not None:
            self.writing.add(transport)
        counts = self.counts
        counts.calls += 1
        counts.streams += stream
        counts.in_flight += 1
        counts.peak = max(counts.peak, counts.in_flight)
        self._changed()

    def leave(self, transport: asyncio.Transport | None, *, left: bool) -> None:
        """A call is over."""
        if transport is not None:
            self.writing.discard(transport)
        self.counts.in_flight -= 1
        self.counts.ended += 1
        self.counts.left += left
        self._changed()

    async def gate(self) -> None:
        """Wait while answers are held."""
        released = self._released
        if released is None:
            return
        self.counts.held += 1
        self._changed()
        try:
            await asyncio.wait_for(released.wait(), self._hold_s)
        except TimeoutError:
            pass
        finally:
            self.counts.held -= 1
            self._changed()

    def hold(self, max_ms: int) -> None:
        """Hold every answer from now on."""
        self._hold_s = max_ms / 1000
        self._released = self._released or asyncio.Event()

    def release(self) -> None:
        """Let the held answers go."""
        if self._released is not None:
            self._released.set()
            self._released = None

    def reset(self) -> None:
        """Begin anew; calls under way are finished outside the books."""
        self.release()
        self.bill.clear()
        self.faults.rules.clear()
        self.counts = Counts(in_flight=self.counts.in_flight, held=self.counts.held)

    def _changed(self) -> None:
        if self._waiters:
            for reached, future in self._waiters:
                if not future.done() and reached():
                    future.set_result(None)

    async def until(self, reached: Callable[[], bool], wait_s: float) -> bool:
        """Whether the condition held within the time. Raises ValueError when too many wait already."""
        if reached():
            return True
        if len(self._waiters) >= MAX_WAITERS:
            raise ValueError("too many wait already")
        entry = (reached, asyncio.get_running_loop().create_future())
        self._waiters.append(entry)
        try:
            await asyncio.wait_for(entry[1], wait_s)
        except TimeoutError:
            return False
        finally:
            self._waiters.remove(entry)
        return True


DESK: Final = web.AppKey("desk", Desk)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def _stats(desk: Desk) -> dict[str, Any]:
    waiting = [size for transport in desk.writing if (size := transport.get_write_buffer_size())]
    return {
        **msgspec.to_builtins(desk.counts),
        "blocked": len(waiting),
        "waiting_bytes": sum(waiting),
        "lines": len(desk.bill),
        "lines_dropped": desk.bill.dropped,
    }


async def _bill(request: web.Request) -> web.Response:
    desk, prefix = request.app[DESK], request.query.get("request_id", "")
    calls = desk.bill.show(lambda line: line.request_id.startswith(prefix))
    return _json({"calls": calls, "dropped": desk.bill.dropped})


async def _add_fault(request: web.Request) -> web.Response:
    try:
        rule = request.app[DESK].faults.add(await request.read())
    except (msgspec.MsgspecError, ValueError) as error:
        return error_response(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
    return _json(msgspec.to_builtins(rule), 201)


async def _list_faults(request: web.Request) -> web.Response:
    return _json({"rules": msgspec.to_builtins(request.app[DESK].faults.rules)})


async def _clear_faults(request: web.Request) -> web.Response:
    request.app[DESK].faults.rules.clear()
    return _json({})


async def _hold(request: web.Request) -> web.Response:
    raw = await request.read()
    try:
        wish = msgspec.json.decode(raw or b"{}", type=_Hold)
    except msgspec.MsgspecError as error:
        return error_response(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
    request.app[DESK].hold(min(max(wish.max_ms, 0), MAX_WAIT_MS))
    return _json(_stats(request.app[DESK]))


async def _release(request: web.Request) -> web.Response:
    request.app[DESK].release()
    return _json(_stats(request.app[DESK]))


async def _get_stats(request: web.Request) -> web.Response:
    return _json(_stats(request.app[DESK]))


async def _reset(request: web.Request) -> web.Response:
    request.app[DESK].reset()
    return _json({})


def _condition(desk: Desk, query: dict[str, str]) -> tuple[Callable[[], bool], float]:
    """What to wait for, and seconds. Raises ValueError."""
    wanted = {key: int(value) for key, value in query.items()}
    wait_ms = min(wanted.pop("ms", 5000), MAX_WAIT_MS)
    if not wanted or wanted.keys() - {"held", "calls", "ended", "left", "in_flight"}:
        raise ValueError("wait for held, calls, ended, left or in_flight")

    def reached() -> bool:
        now = msgspec.to_builtins(desk.counts)
        return all(now[key] <= n if key == "in_flight" else now[key] >= n for key, n in wanted.items())

    return reached, wait_ms / 1000


async def _wait(request: web.Request) -> web.Response:
    desk = request.app[DESK]
    try:
        reached, wait_s = _condition(desk, dict(request.query))
        met = await desk.until(reached, wait_s)
    except ValueError as error:
        return error_response(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
    return _json(_stats(desk), 200 if met else 408)


def routes() -> list[web.RouteDef]:
    """The routes under /_sim."""
    return [
        web.get("/_sim/bill", _bill),
        web.post("/_sim/faults", _add_fault),
        web.get("/_sim/faults", _list_faults),
        web.delete("/_sim/faults", _clear_faults),
        web.post("/_sim/hold", _hold),
        web.post("/_sim/release", _release),
        web.get("/_sim/stats", _get_stats),
        web.get("/_sim/wait", _wait),
        web.post("/_sim/reset", _reset),
    ]
