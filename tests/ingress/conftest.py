"""Fixtures of the ingress's tests."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from tests.ingress.world import KEY, World

MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture
async def make_world() -> AsyncIterator[MakeWorld]:
    """Worlds with settings of their own."""
    made: list[World] = []

    async def make(**options: Any) -> World:
        world = await World().start(**options)
        made.append(world)
        return world

    yield make
    for world in made:
        await world.close()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """The usual one."""
    return await make_world()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client with the tenant's key."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        yield session
