"""The running Hotpath of the end-to-end tests, and a tenant of one's own in it."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from tests.e2e.door import SECRETS, SETTINGS, Door, catalogue
from tests.e2e.drive import Client, session
from tests.e2e.echo import Echo
from tests.e2e.outage import Servers
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, running_simulator

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """NATS and Valkey of a module's own, behind fault proxies."""
    with Servers(tmp_path_factory.mktemp("servers")) as made:
        yield made


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory, around: Servers) -> Iterator[Up]:
    """Two of each worker, everything through the proxies: the `up` of modules that strike at servers."""
    with Up(tmp_path_factory.mktemp("up"), "--scale", "guardian=2,routing=2,provider=2", env=around.env()) as running:
        yield running


@pytest.fixture
def sim(up: Up) -> Sim:
    """Its simulator, books empty."""
    simulator = Sim(up.run["simulator_url"])
    simulator.reset()
    return simulator


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A session without bounds."""
    async with session() as made:
        yield made


@pytest.fixture
def tenant(up: Up) -> Callable[..., dict[str, Any]]:
    """Makes a tenant and a key, with `hotpath keys create` options: {"tenant", "key", "key_id", "tenant_id"}."""

    def make(*options: str) -> dict[str, Any]:
        name = f"t{next(_numbers)}"
        return {"tenant": name, **up.cli("keys", "create", "--tenant", name, *options)}

    return make


@pytest.fixture
def client(up: Up, http: aiohttp.ClientSession) -> Client:
    """A client with the default tenant's key."""
    return Client(http, up.url, up.run["api_key"])


@pytest.fixture(scope="session")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """The front door of the tests of bad input; when it has stopped, every sink is searched once more."""
    directory = tmp_path_factory.mktemp("door")
    echo = Echo()
    with running_simulator() as sim:
        written = directory / "catalog.toml"
        written.write_text(catalogue(sim.url, echo.url))
        with Up(directory / "data", env={**SETTINGS, **SECRETS, "HOTPATH_CATALOG": str(written)}) as running:
            yield Door(running, sim, echo)
        for log in (directory / "data" / "logs").iterdir():
            assert b"canary-" not in log.read_bytes(), log.name
    echo.close()
