"""What a load run came to: counted while it runs, shown as a table, written as JSON."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table

from tests.load.work import Result

MAX_SAMPLES: Final = 1_000_000  # of each time; later ones are counted, not kept
PERCENTILES: Final = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest rank, over sorted values; None without any."""
    if not values:
        return None
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)]


class Report:
    """The results so far."""

    def __init__(self) -> None:
        self.ended = 0
        self.by_status: Counter[str] = Counter()
        self.by_http: Counter[int] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self._times: dict[str, list[float]] = {"latency": [], "ttft": [], "gap": []}

    def add(self, result: Result) -> None:
        self.ended += 1
        self.by_status[result.status] += 1
        self.by_http[result.http] += 1
        self.by_kind[f"{result.kind} {'ok' if result.status == 'ok' else 'not ok'}"] += 1
        for name in ("input_tokens", "output_tokens", "cost_nano"):
            self.totals[name] += getattr(result, name)
        if result.status == "ok":
            self._keep("latency", [result.latency])
            self._keep("ttft", [result.ttft] if result.ttft else [])
            self._keep("gap", result.gaps)

    def _keep(self, name: str, values: list[float]) -> None:
        kept = self._times[name]
        kept.extend(values[: MAX_SAMPLES - len(kept)])

    def show(self, seconds: float) -> dict[str, Any]:
        """As JSON: times in milliseconds, of requests that ended well."""
        times: dict[str, Any] = {}
        for name, values in self._times.items():
            ordered = sorted(values)
            shown = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
            times[name + "_ms"] = {"n": len(ordered), **shown, "max": ordered[-1] if ordered else None}
        return {
            "requests": self.ended,
            "seconds": round(seconds, 3),
            "per_second": round(self.ended / seconds, 1) if seconds else None,
            "ok": self.by_status["ok"],
            "status": dict(self.by_status.most_common()),
            "http": {str(status): count for status, count in sorted(self.by_http.items())},
            "kinds": dict(sorted(self.by_kind.items())),
            **times,
            "input_tokens": self.totals["input_tokens"],
            "output_tokens": self.totals["output_tokens"],
            "cost_nano_usd": self.totals["cost_nano"],
        }


def write(shown: dict[str, Any], path: Path) -> None:
    """The report as a file."""
    path.write_bytes(orjson.dumps(shown, option=orjson.OPT_INDENT_2) + b"\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(shown: dict[str, Any], console: Console) -> None:
    """The report for people."""
    counts = Table(title=f"{shown['requests']} requests in {shown['seconds']} s: {shown['per_second']} a second")
    counts.add_column("ended")
    counts.add_column("requests", justify="right")
    for status, count in shown["status"].items():
        counts.add_row(status, str(count), style=None if status == "ok" else "yellow")
    console.print(counts)
    times = Table(title="milliseconds, of those that ended well")
    for column in ("", "n", *(f"p{percent}" for percent in PERCENTILES), "max"):
        times.add_column(column, justify="right" if column else "left")
    for name, title in (("latency_ms", "latency"), ("ttft_ms", "first token"), ("gap_ms", "between chunks")):
        row = shown[name]
        numbers = [_number(row[f"p{percent}"]) for percent in PERCENTILES]
        times.add_row(title, str(row["n"]), *numbers, _number(row["max"]))
    console.print(times)
    tokens = f"{shown['input_tokens']} tokens in, {shown['output_tokens']} out"
    console.print(f"{tokens}; cost told: {shown['cost_nano_usd']} nano-USD")
