"""Numbers of one process, and the small server that shows them at `/metrics`.

The registry is the process's own (prometheus_client's global one would be shared by tests and roles). The server binds
its port at boot but loads aiohttp only when somebody connects or a role adds a route: aiohttp costs 0.2 s of CPU to
import, which three worker processes would spend on every start for nobody.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from shared.core.overload import Queue

if TYPE_CHECKING:
    from aiohttp import web

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_log: Final = logging.getLogger("hotpath.metrics")


class Metrics:
    """The process's registry; names get the prefix `hotpath_`. Labels come from closed sets, never from clients."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        self._held = self.gauge("held", "Things this process holds now: each goes back to where it was (I8)", ("what",))

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        """A number that only grows."""
        return Counter(f"hotpath_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        """A number as it is now; `set_function` reads it when it is asked for, which costs the hot path nothing."""
        return Gauge(f"hotpath_{name}", text, labels, registry=self.registry)

    def held(self, what: str, read: Callable[[], int]) -> None:
        """The size of something that grows with the requests under way, and with nothing else."""
        self._held.labels(what).set_function(lambda: float(read()))

    def show_queue(self, role: str, queue: Queue) -> None:
        """How long requests wait in a role's own queue, and how many it shed for that."""
        wait = self.gauge(f"{role}_queue_wait_ms", "Longest wait of a request in this process since the last look")
        wait.set_function(lambda: queue.worst() * 1000)
        shed = self.gauge(f"{role}_queue_shed", "Requests shed since they waited too long in this process's queue")
        shed.set_function(lambda: float(queue.shed))

    def histogram(
        self, name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = Histogram.DEFAULT_BUCKETS
    ) -> Histogram:
        """A distribution; `buckets` are upper bounds in the unit the name says."""
        return Histogram(f"hotpath_{name}", text, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """Prometheus's text format."""
        return bytes(generate_latest(self.registry))


def loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class MetricsServer:
    """`/metrics` of one process and what its roles add: open on loopback, elsewhere for the admin key (S1-G01)."""

    def __init__(self, metrics: Metrics, host: str, port: int, admin_key: str) -> None:
        self._metrics = metrics
        self._open = loopback(host)
        self._admin = hashlib.sha256(b"Bearer " + admin_key.encode()).digest()
        self._app: web.Application | None = None
        self._runner: web.AppRunner | None = None
        self._starting: asyncio.Task[None] | None = None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=64)
        self._socket.setblocking(False)
        shown = host if host not in {"0.0.0.0", "::"} else socket.gethostname()
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self._socket.getsockname()[1]}/metrics"

    @property
    def app(self) -> "web.Application":
        """The aiohttp Application, for a role that adds routes: before the server starts."""
        if self._app is None:
            self._app = _application(self._metrics.render, self._allowed)
        return self._app

    def start(self) -> None:
        """Serve from the first connection on."""
        asyncio.get_running_loop().add_reader(self._socket, self._on_first)

    def _on_first(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._starting = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        # In a thread: the loop goes on serving requests meanwhile.
        web = await asyncio.to_thread(_load_aiohttp)
        self._runner = web.AppRunner(self.app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    def _allowed(self, header: bytes) -> bool:
        """Whether the Authorization header lets in: digests of equal length are compared (D7)."""
        return self._open or hmac.compare_digest(hashlib.sha256(header).digest(), self._admin)

    async def close(self) -> None:
        """Stop serving."""
        asyncio.get_running_loop().remove_reader(self._socket)
        if self._starting is not None:
            await self._starting
        if self._runner is not None:
            await self._runner.cleanup()
        self._socket.close()


def _load_aiohttp() -> "web":  # type: ignore[valid-type]
    from aiohttp import web  # noqa: PLC0415 - see the module's docstring

    return web


def _application(render: Callable[[], bytes], allowed: Callable[[bytes], bool]) -> "web.Application":
    from aiohttp import web  # noqa: PLC0415 - see the module's docstring
    from aiohttp.typedefs import Handler  # noqa: PLC0415

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not allowed(request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")):
            raise web.HTTPUnauthorized(text="The admin key is needed: Authorization: Bearer <ADMIN_API_KEY>\n")
        return await handler(request)

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application(middlewares=[guard])
    app.router.add_get("/metrics", metrics)
    return app
