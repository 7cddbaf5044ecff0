"""`python -m tests.bench.conf > FILE`: a `--conf` file for the harness in $BENCH with Hotpath as an entry of it.

Hotpath runs as `hotpath up` starts it: a process per role, NATS and Valkey embedded, append-only file on, default
logging, and the tenant with a limit per day (tests/bench/start.py sets it). The harness fills in ${...}.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.bench.start import KEY

ROOT = Path(__file__).resolve().parents[2]


def hotpath(scale: str = "") -> dict[str, Any]:
    """The entry for Hotpath."""
    start = f"{sys.executable} -m tests.bench.start --port ${{PORT}} --mock ${{MOCK}} --data ${{OUT}}/hotpath"
    return {
        "start": {"gw": f"{start} --scale {scale}" if scale else start},
        "cwd": str(ROOT),
        "url": "http://127.0.0.1:${PORT}/v1/chat/completions",
        "headers": [f"Authorization: Bearer {KEY}"],
        "ready_s": 60,
        "warm_s": 2,
    }


def conf(bench: Path, names: list[str], scale: str = "") -> dict[str, Any]:
    """The named entries of the harness's own registry, then Hotpath's. Raises KeyError for a name it has not."""
    known = json.loads((bench / "conf" / "gateways.json").read_text())
    return {name: known[name] for name in names} | {"hotpath": hotpath(scale)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.conf", description=__doc__)
    parser.add_argument("names", nargs="*", default=["direct", "lim-base"], help="entries to measure beside Hotpath")
    parser.add_argument("--scale", default="", help="of hotpath up, e.g. provider=2")
    chosen = parser.parse_args(argv)
    bench = os.environ.get("BENCH")
    if not bench:
        parser.error("set BENCH to the folder of the harness (its README.md, bench.py and conf/)")
    try:
        made = conf(Path(bench), chosen.names, chosen.scale)
    except (OSError, KeyError) as error:
        parser.error(f"{bench} has no such entry: {error}")
    print(json.dumps(made, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
