"""Does the time of a 401 tell how much of a key was right? (faults 76, D7, S1-C1d)

    python -m tests.bench.key_timing [--tries 100000]

A Hotpath of its own; one kept-alive connection asks with keys of which the id and the first n characters of the secret
are right, in random order. Every answer must be 401. Shown: the mean of the fastest nine tenths for each n, and the
slope in ns per right character with its standard error. A comparison that stops at the first wrong character would show
a positive slope with a standard error far below it; exit code 1 when the slope is above four of them.
"""

import argparse
import asyncio
import math
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from tests.e2e.rig import Up

#: Characters of the secret that are right; 21 stand before it, 43 are in it.
RIGHT = (0, 1, 2, 4, 8, 16, 32, 42)
PREFIX = 21
KEPT = 0.9
SIGMAS = 4.0


class Slope(Struct, frozen=True):
    """Least squares of time over right characters."""

    ns: float
    error: float

    @property
    def told(self) -> bool:
        """Whether the time says something."""
        return self.ns > SIGMAS * self.error


def slope(samples: Mapping[int, Sequence[float]]) -> Slope:
    """Of the values by n, in ns, the slowest tenth of each left out (the machine's, not the code's)."""
    pairs = [(n, value) for n, values in samples.items() for value in sorted(values)[: int(len(values) * KEPT)]]
    middle_n = statistics.fmean(n for n, _ in pairs)
    middle = statistics.fmean(value for _, value in pairs)
    spread = sum((n - middle_n) ** 2 for n, _ in pairs)
    found = sum((n - middle_n) * (value - middle) for n, value in pairs) / spread
    rest = sum((value - middle - found * (n - middle_n)) ** 2 for n, value in pairs)
    return Slope(ns=found, error=math.sqrt(rest / (len(pairs) - 2) / spread))


def wrong(key: str, right: int) -> str:
    """A key of the same shape: the id, `right` characters of the secret, then others, the next one surely wrong."""
    kept = key[: PREFIX + right]
    different = "A" if key[PREFIX + right] != "A" else "B"
    return kept + different + secrets.token_urlsafe(32)[: len(key) - len(kept) - 1]


async def measure(url: str, key: str, tries: int) -> dict[int, list[float]]:
    """ns from the last byte sent to the first read, by n. Raises AssertionError for anything but 401."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    samples: dict[int, list[float]] = {n: [] for n in RIGHT}
    dice = random.Random(7)
    for number in range(tries):
        n = dice.choice(RIGHT)
        line = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {wrong(key, n)}\r\n\r\n".encode()
        began = time.perf_counter_ns()
        writer.write(line)
        head = await reader.readuntil(b"\r\n\r\n")
        took = time.perf_counter_ns() - began
        assert head.startswith(b"HTTP/1.1 401 "), head
        await reader.readexactly(int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]))
        samples[n].append(float(took))
        if number % 10_000 == 9_999:
            print(f"{number + 1} tries", file=sys.stderr, flush=True)
    writer.close()
    return samples


def main() -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.key_timing")
    parser.add_argument("--tries", type=int, default=100_000)
    tries = parser.parse_args().tries
    with tempfile.TemporaryDirectory() as directory, Up(Path(directory) / "data") as up:
        key = up.cli("keys", "create", "--tenant", "timed")["key"]
        samples = asyncio.run(measure(up.url, key, tries))
    for n, values in samples.items():
        mean = statistics.fmean(sorted(values)[: int(len(values) * KEPT)])
        print(f"{n:3} right: {mean / 1000:8.2f} us   ({len(values)} tries)")
    found = slope(samples)
    print(f"slope {found.ns:+.2f} ns per right character, standard error {found.error:.2f}")
    return 1 if found.told else 0


if __name__ == "__main__":
    sys.exit(main())
