"""schemathesis asks the admin API what its OpenAPI file allows and what it does not: every answer has a status and a
shape that the file names, nothing invalid is taken, nothing valid is refused, nobody gets in without the key.

    python -m tests.ingress.admin_fuzz --examples 300          the same for longer, and one operation after the other
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from deploy import servers
from ingress.admin import openapi
from tests.ingress.admin_api import ADMIN, AdminApi, serving

if TYPE_CHECKING:
    from pathlib import Path

schema = schemathesis.openapi.from_dict(openapi.document())


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminApi]:
    """On a Valkey of its own: what is asked for is done."""
    directory: Path = tmp_path_factory.mktemp("valkey")
    port = servers.free_port()
    with (
        servers.running(servers.valkey_command(directory, port), port, directory / "log"),
        serving(f"redis://127.0.0.1:{port}/0") as found,
    ):
        yield found


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_operation(api: AdminApi, case: Any) -> None:
    case.call_and_validate(base_url=api.url, headers={"Authorization": f"Bearer {ADMIN}"})
