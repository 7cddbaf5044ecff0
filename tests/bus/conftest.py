"""Both buses behind one fixture: what a test of `tests/bus/test_bus.py` states holds for each."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from deploy import servers
from shared.bus.memory import Broker, MemoryBus
from shared.bus.nats import NatsBus

AnyBus = NatsBus | MemoryBus
Connect = Callable[[str], Awaitable[AnyBus]]


@pytest.fixture(params=["nats", "memory"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes clients of one bus by name; they are closed after the test."""
    made: list[AnyBus] = []
    broker = Broker()

    async def to_nats(name: str) -> AnyBus:
        made.append(await NatsBus.connect(request.getfixturevalue("nats_url"), name))
        return made[-1]

    async def to_memory(name: str) -> AnyBus:
        made.append(broker.client(name))
        return made[-1]

    yield to_nats if request.param == "nats" else to_memory
    for bus in made:
        await bus.close()


class Seen:
    """A handler that keeps what it was given; `await seen.count(n)` waits for the n-th message."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str, bytes, bool]] = []
        self._changed = asyncio.Event()

    def __call__(self, subject: str, reply: str, payload: bytes, no_responders: bool) -> None:
        self.messages.append((subject, reply, payload, no_responders))
        self._changed.set()

    async def count(self, wanted: int, timeout: float = 5) -> None:
        async with asyncio.timeout(timeout):
            while len(self.messages) < wanted:
                self._changed.clear()
                await self._changed.wait()

    @property
    def payloads(self) -> list[bytes]:
        return [message[2] for message in self.messages]


class Server:
    """A NATS of one's own, to kill, freeze and start again on the same port."""

    def __init__(self, directory: Path, config: str = "") -> None:
        self.port = servers.free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._log = directory / "log"
        self._config = directory / "nats.conf"
        self._write(config)
        self._stack = contextlib.ExitStack()
        self.pid = 0

    def start(self) -> None:
        running = servers.running(servers.nats_command(self._config), self.port, self._log)
        self.pid = self._stack.enter_context(running).pid

    def _write(self, config: str) -> None:
        self._config.write_text(f'listen: "127.0.0.1:{self.port}"\nmax_payload: 2MB\n{config}\n')

    def reload(self, config: str) -> None:
        """Another configuration, without a restart."""
        self._write(config)
        os.kill(self.pid, signal.SIGHUP)

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()
