"""The running Hotpath of the end-to-end tests, and a tenant of one's own in it."""

import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from tests.e2e.drive import Client, session
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

_numbers = itertools.count(1)


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
