"""`python -m tests.bench.start`: starts Hotpath for the harness, in front of its mock upstream.

Writes the catalogue, then becomes `hotpath up`; a short-lived child waits until that is ready, sets the limit and is
gone before the harness measures. Every start gets a data directory of its own, so that tests/bench/money.py can look
at each run's books.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

#: Known in advance, since the harness writes the header into its configuration. Guards nothing but a benchmark.
KEY: Final = "bench_key_that_guards_nothing_but_a_benchmark_0123456789"
LIMIT_USD: Final = "1000000"
READY_S: Final = 60.0
MODELS: Final = ("gpt-4o-mini", "mock-fast", "mock-paced")

_ENDPOINT: Final = """\
[[endpoints]]
id = "mock"
provider = "openai"
base_url = "http://127.0.0.1:{port}/v1"
allow_private = true
"""
_MODEL: Final = """
[[models]]
name = "{name}"
endpoints = [{{ endpoint = "mock", model = "{name}" }}]
max_output_tokens = 16384
price = {{ input = "0.15", cached_input = "0.075", output = "0.60" }}
"""


def catalogue(mock: int) -> str:
    """The models the harness asks for, all answered by its mock."""
    return _ENDPOINT.format(port=mock) + "".join(_MODEL.format(name=name) for name in MODELS)


def own_directory(base: Path) -> Path:
    """A new, numbered directory under `base`."""
    base.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in base.iterdir() if path.name.isdigit()]
    fresh = base / str(max(taken, default=0) + 1)
    fresh.mkdir()
    return fresh


def set_limit(data: Path) -> int:
    """Wait until all roles are up, then give the tenant of the benchmark's key its limit per day."""
    end = time.monotonic() + READY_S
    while not _ready(data / "run.json"):
        if time.monotonic() > end:
            print(f"hotpath was not ready within {READY_S} s", file=sys.stderr)
            return 1
        time.sleep(0.05)
    limit = ["budget", "set", "default", "--period", "day", "--limit-usd", LIMIT_USD, "--data", str(data)]
    return subprocess.run([sys.executable, "-m", "deploy.cli.main", *limit], check=False).returncode


def _ready(run_file: Path) -> bool:
    try:
        pids = json.loads(run_file.read_text())["pids"]
    except (OSError, ValueError):
        return False
    return all(pids.get(role) for role in ("ingress", "guardian", "routing", "provider", "redis"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.start", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mock", type=int, required=True, help="port of the mock upstream")
    parser.add_argument("--data", type=Path, required=True, help="each start makes a directory under it")
    parser.add_argument("--scale", default="")
    parser.add_argument("--set-limit", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.set_limit:
        sys.exit(set_limit(chosen.data))
    data = own_directory(chosen.data.resolve())
    (data / "bench.toml").write_text(catalogue(chosen.mock))
    os.environ |= {"GATEWAY_API_KEY": KEY, "HOTPATH_CATALOG": str(data / "bench.toml")}
    again = [
        sys.executable,
        "-m",
        "tests.bench.start",
        "--set-limit",
        "--port",
        "0",
        "--mock",
        "0",
        "--data",
        str(data),
    ]
    subprocess.Popen(again)
    up = ["up", "--port", str(chosen.port), "--data", str(data), "--no-simulator"]
    scale = ["--scale", chosen.scale] if chosen.scale else []
    os.execv(sys.executable, [sys.executable, "-m", "deploy.cli.main", *up, *scale])


if __name__ == "__main__":
    main()
