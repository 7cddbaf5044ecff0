"""`python -m tests.bench.legs DIR [--seconds 5]`: CPU by role of a running `hotpath up`, from /proc.

Run it while something loads the gateway: the harness itself accounts only for the whole tree.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 when it is gone (proc(5), fields 14 and 15 of stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sample(pids: dict[str, list[int]]) -> dict[str, float]:
    """Role -> CPU seconds so far."""
    return {role: sum(cpu_seconds(pid) for pid in found) for role, found in pids.items() if found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.legs", description=__doc__)
    parser.add_argument("data", type=Path, help="the data directory of the running hotpath up")
    parser.add_argument("--seconds", type=float, default=5.0)
    chosen = parser.parse_args(argv)
    pids = json.loads((chosen.data / "run.json").read_text())["pids"]
    before, began = sample(pids), time.monotonic()
    time.sleep(chosen.seconds)
    after, seconds = sample(pids), time.monotonic() - began
    used = {role: after[role] - before[role] for role in after}
    for role, spent in sorted(used.items(), key=lambda pair: -pair[1]):
        share = 100 * spent / sum(used.values()) if sum(used.values()) else 0.0
        print(f"{role:10s} {spent:7.2f} s CPU  {100 * spent / seconds:6.1f} % of a core  {share:5.1f} % of all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
