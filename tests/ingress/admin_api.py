"""The admin API of one process on a real Valkey, its loop in a thread, so that plain clients can ask it."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import uvloop

from ingress.admin.resources import Resources
from ingress.admin.router import Router
from ingress.admin.server import AdminServer
from ingress.auth import Auth
from ingress.events import Events
from ingress.observe import Tally
from shared.state.base import Principal
from shared.state.pipeline import Pipeline
from shared.state.redis import State
from tests.state.rig import Money, new_rid, settings_for

ADMIN = "a" * 40
PEPPER = b"p" * 40

T = TypeVar("T")


class AdminApi:
    """What a test may do with it from its own thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.state: State
        self.server: AdminServer
        self.events: Events

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """In its loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def start(self, url: str, **environment: str) -> None:
        settings = settings_for(url, **{"ADMIN_PORT": "0", **environment})
        log = logging.getLogger("hotpath.ingress")
        self.state = await State.connect(settings)
        self.state.run()
        self.events = events = Events(log, time.monotonic)
        auth = Auth(self.state.registry, settings.admin_api_key, events, self.state.clock.now)
        router = Router(Resources(self.state.operations), auth, Tally(), self.state.registry.refresh_soon)
        self.server = AdminServer(settings, router, log)
        await self.server.start()

    async def stop(self) -> None:
        await self.server.close()
        await self.state.close()

    def principal(self, key: str) -> Principal | None:
        """Whom the key is of, once this process has polled."""

        async def ask() -> Principal | None:
            await self.state.registry.poll()
            return self.state.registry.authenticate(key.encode())

        return self.run(ask())

    def spend(self, tenant: str, key: str, cost: int) -> str:
        """A settled call; its rid."""

        async def go() -> str:
            money, rid = Money(self.state, tenant), new_rid()
            await money.reserve(rid, key=key)
            await money.dispatch(rid)
            await money.settle(rid, cost=cost, key=key)
            return rid

        return self.run(go())

    @contextlib.contextmanager
    def without_redis(self) -> Iterator[None]:
        """As if it did not answer: the connection is another one, to nowhere."""
        admin = self.state.admin
        here = admin._pipeline

        async def nowhere() -> Pipeline:
            return Pipeline("redis://127.0.0.1:1/0")

        admin._pipeline = self.run(nowhere())
        try:
            yield
        finally:
            admin._pipeline = here


@contextlib.contextmanager
def serving(url: str, **environment: str) -> Iterator[AdminApi]:
    """Runs it."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="admin api")
    thread.start()
    api = AdminApi(loop)
    try:
        api.run(api.start(url, **environment))
        try:
            yield api
        finally:
            api.run(api.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
