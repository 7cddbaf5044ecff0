"""The simulator as it is run: its own process, on uvloop."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def simulator_process() -> Iterator[str]:
    """The URL of a simulator process, told on its ready descriptor."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "deploy.simulator", "--port", "0", "--seed", "7", "--tps", "100"]
    process = subprocess.Popen(command, pass_fds=[writing], env={**os.environ, "HOTPATH_READY_FD": str(writing)})
    os.close(writing)
    try:
        with os.fdopen(reading) as ready:
            line = json.loads(ready.readline())
        assert line["role"] == "simulator"
        assert line["pid"] == process.pid
        yield line["url"]
    finally:
        process.terminate()
        assert process.wait(5) == 0
