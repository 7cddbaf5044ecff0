"""What the tests of the shared state stand on: the session's Valkey, or one of a test's own to break."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from deploy import servers
from shared.state import circuits, ledger
from shared.state.redis import State
from tests.state.rig import Money, settings_for

Connect = Callable[..., Awaitable[State]]


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not fail a test that is not about time; those that are ask for `real_timeouts`."""
    if "real_timeouts" not in request.fixturenames:
        monkeypatch.setattr(ledger, "ADMIT_TIMEOUT", 10.0)
        monkeypatch.setattr(ledger, "POST_TIMEOUT", 10.0)
        monkeypatch.setattr(circuits, "_TIMEOUT", 10.0)
        monkeypatch.setattr(circuits, "_CLAIM_TIMEOUT", 10.0)


@pytest.fixture
def real_timeouts() -> None:
    """The ledger's own timeouts (DESIGN 4)."""


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[str]:
    """A Valkey for this test alone: it may be paused, filled, flushed or made a replica."""
    port = servers.free_port()
    with servers.running(servers.valkey_command(tmp_path / "valkey", port), port, tmp_path / "log"):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connects States (`await connect(url, NAME="value")`) and closes them at the end."""
    states: list[State] = []

    async def make(url: str, **environment: str) -> State:
        states.append(await State.connect(settings_for(url, **environment)))
        return states[-1]

    yield make
    for state in states:
        await state.close()


@pytest.fixture
async def state(connect: Connect, valkey_url: str) -> State:
    """A State on the session's Valkey."""
    return await connect(valkey_url)


@pytest.fixture
def money(state: State) -> Money:
    """The ledger of a tenant of this test's own."""
    return Money(state, f"t{secrets.token_hex(6)}")


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, as production runs: its timers differ (a handle of a time that has passed has no `when`)."""
    return {"uvloop": uvloop.new_event_loop}
