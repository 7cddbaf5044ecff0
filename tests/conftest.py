"""The real servers every test may use: one Valkey and one NATS per test session, from the wheels."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy import servers
from tests.e2e.sim import Sim, running_simulator

if TYPE_CHECKING:
    from tests.e2e.rig import Up


#: Rooms whose tests start fleets, load the machine or look at every process. (tests/telemetry: a lone surrogate in a
#: captured line cannot pass from one pytest process to another.)
ALONE = ("e2e", "load", "deploy", "interop", "telemetry")
#: Of these rooms, the files that have seconds to spare for whatever they wait for.
TOGETHER = frozenset(
    f"test_{name}.py"
    for name in (
        "bus", "circuits", "cutoff", "invariants", "lease", "limit", "mixed_builds", "money", "money_matrix",
        "nats_users", "path", "proxy", "soak",  # e2e
        "commands", "honcho", "parts", "prices", "rebuild", "reconcile", "tenants",  # deploy
    )
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What must run with the machine to itself; single files say so by `pytestmark = pytest.mark.alone`."""
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        if room in ALONE and item.path.name not in TOGETHER:
            item.add_marker(pytest.mark.alone)


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


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Up"]:
    """Hotpath as `hotpath up` starts it, with four guardians and two providers, shared by tests/e2e and tests/interop.

    The circuit never opens here (the mixed load breaks many calls on purpose; tests/e2e/test_faults.py looks at the
    breaker), and a lease ends 1 s after its deadline, so that a test can wait for it.
    """
    from tests.e2e.rig import Up  # noqa: PLC0415 - only these tests need the whole machinery

    settings = {"CIRCUIT_FAILURE_THRESHOLD": "1000000", "LEDGER_LEASE_GRACE_MS": "1000"}
    with Up(tmp_path_factory.mktemp("up"), "--scale", "guardian=4,provider=2", env=settings) as running:
        yield running
