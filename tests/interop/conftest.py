"""The targets of the client tests."""

import pytest

from tests.interop.target import Target, target_of, with_v1


@pytest.fixture(params=["simulator", "hotpath"])
def target(request: pytest.FixtureRequest) -> Target:
    """Each test runs against the simulator alone and against Hotpath in front of one."""
    if request.param == "hotpath":
        hotpath: Target = request.getfixturevalue("hotpath")
        return hotpath
    simulator = request.getfixturevalue("simulator")
    return Target(with_v1(simulator.url), "any", simulator, gateway=False)


@pytest.fixture(scope="session")
def hotpath(request: pytest.FixtureRequest) -> Target:
    """Hotpath as `hotpath up` starts it."""
    return target_of(request.getfixturevalue("up").run)
