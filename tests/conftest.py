"""The real servers every test may use: one Valkey and one NATS per test session, from the wheels."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import servers
from tests.e2e.sim import Sim, running_simulator


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Valkey (AOF on). Tests use their own tenant ids or FLUSHALL first."""
    directory: Path = tmp_path_factory.mktemp("valkey")
    port = servers.free_port()
    with servers.running(servers.valkey_command(directory, port), port, directory / "log"):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real NATS without users (those are tested in tests/e2e)."""
    directory: Path = tmp_path_factory.mktemp("nats")
    port = servers.free_port()
    config = directory / "nats.conf"
    config.write_text(f'listen: "127.0.0.1:{port}"\nmax_payload: 2MB\njetstream {{ store_dir: "{directory}/js" }}\n')
    with servers.running(servers.nats_command(config), port, directory / "log"):
        yield f"nats://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def simulator() -> Iterator[Sim]:
    """A simulator as its own process, for tests that need no Hotpath in front of it."""
    with running_simulator() as sim:
        yield sim
