"""What the ingress remembers to show: counts, the last traces, the first requests' stages, where metrics are served.

Counting is two dict operations a request; prometheus_client's own counters and histograms cost 3 us, so they are
filled only when somebody asks.
"""

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.bus.roster import Roster
from shared.wire.messages import Hop

#: Issue 2: the ingress keeps the last 10,000 for `hotpath trace RID`.
TRACES: Final = 10_000
#: S0-03: only the first three requests after boot.
COLD: Final = 3
#: Seconds; from a refusal to a long stream.
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_json: Final = msgspec.json.Encoder().encode
_hops: Final = msgspec.msgpack.Decoder(tuple[Hop, ...]).decode


class Tally(Collector):
    """Requests by route and status, their durations by route, and numbers read when asked for."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], int] = {}
        self._durations: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self.numbers: dict[str, tuple[str, Callable[[], float]]] = {}  # name -> (text, how to read it)

    def count(self, route: str, status: int, seconds: float) -> None:
        """One request ended. `route` is from the route table and `status` an HTTP status: both closed sets."""
        key = (route, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        buckets = self._durations.get(route)
        if buckets is None:
            buckets = self._durations[route] = [0] * (len(BUCKETS) + 1)
            self._sums[route] = 0.0
        buckets[bisect_left(BUCKETS, seconds)] += 1
        self._sums[route] += seconds

    def requests(self, route: str, status: int) -> int:
        """How many ended so."""
        return self._requests.get((route, status), 0)

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        requests = CounterMetricFamily("hotpath_requests", "Requests by route and status", labels=("route", "status"))
        for (route, status), count in self._requests.items():
            requests.add_metric((route, str(status)), count)
        yield requests
        durations = HistogramMetricFamily("hotpath_request_seconds", "Time to the last byte written", labels=("route",))
        for route, buckets in self._durations.items():
            total, rows = 0, []
            for bound, count in zip([*map(str, BUCKETS), "+Inf"], buckets, strict=True):
                total += count
                rows.append((bound, total))
            durations.add_metric((route,), rows, self._sums[route])
        yield durations
        for name, (text, read) in self.numbers.items():
            yield CounterMetricFamily(f"hotpath_{name}", text, value=read())


class Trace(msgspec.Struct, frozen=True, gc=False):
    """One finished request, as strings and bytes only, so that the collector need not walk ten thousand of them."""

    rid: str
    label: str
    model: str
    outcome: str
    deliveries: int
    ms: float
    hops: bytes  # msgpack of tuple[Hop, ...]


class Traces:
    """The last TRACES requests. Looking one up walks them: it is rare, and keeping them costs one append."""

    def __init__(self, limit: int = TRACES) -> None:
        self._kept: deque[Trace] = deque(maxlen=limit)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, trace: Trace) -> None:
        """The oldest goes when the last place is taken."""
        self._kept.append(trace)

    def find(self, wanted: str) -> bytes | None:
        """JSON of the newest request with this rid or X-Request-ID; None when it is not (or no longer) kept."""
        for trace in reversed(self._kept):
            if wanted in (trace.rid, trace.label):
                return _json(_shown(trace))
        return None


def _shown(trace: Trace) -> dict[str, Any]:
    hops = [msgspec.structs.asdict(hop) for hop in _hops(trace.hops)]
    fields = msgspec.structs.asdict(trace)
    return {**fields, "ms": round(trace.ms, 3), "hops": hops}


class ColdStart:
    """The first COLD requests log how long each stage took (S0-02, S0-03)."""

    def __init__(self, log: logging.Logger, started_at: float) -> None:
        self._log = log
        self._started_at = started_at
        self._begun = 0

    def stages(self) -> list[tuple[str, float]] | None:
        """A list to fill with (stage, when it ended), for the first three; None from then on."""
        if self._begun >= COLD:
            return None
        self._begun += 1
        return []

    def report(self, stages: list[tuple[str, float]], arrived: float, label: str, rid: str) -> None:
        """One structured line."""
        took: dict[str, float] = {}
        before = arrived
        for name, at in stages:
            took[name] = round((at - before) * 1000, 3)
            before = at
        self._log.info(
            "[COLD-START]",
            extra={
                "requestId": label,
                "rid": rid,
                "stages_ms": took,
                "total_ms": round((time.monotonic() - arrived) * 1000, 3),
                "since_boot_ms": round((arrived - self._started_at) * 1000, 3),
            },
        )


def targets(rosters: Mapping[str, Roster], now: float) -> bytes:
    """Prometheus http_sd: every live process's metrics address, with the roles it runs."""
    roles: dict[str, list[str]] = {}
    for role, roster in sorted(rosters.items()):
        for beat in roster.alive(now):
            address = urlsplit(beat.metrics).netloc if beat.metrics else ""
            if address:
                roles.setdefault(address, []).append(role)
    rows = [
        {"targets": [address], "labels": {"role": ",".join(sorted(set(names)))}} for address, names in roles.items()
    ]
    return _json(rows)
