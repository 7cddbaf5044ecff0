"""The load program: what it counts, and that it can say no (issue 2, section 4: progress, table and JSON)."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.e2e.sim import Sim
from tests.load import __main__ as program
from tests.load import report
from tests.load.work import Mix, Result, jobs, parse_weights


def test_percentiles_are_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [report.percentile(values, percent) for percent in (50, 90, 99)] == [50, 90, 99]
    assert report.percentile([7.0], 99) == 7.0
    assert report.percentile([], 50) is None


def test_the_same_seed_asks_the_same() -> None:
    mix = Mix(weights=parse_weights("whole=1,stream=2,tools=1"), leave=0.5, chunks=5, seed=3)
    first, second = jobs(mix), jobs(mix)
    made = [next(first) for _ in range(50)]
    assert made == [next(second) for _ in range(50)]
    assert {job.kind for job in made} == {"whole", "stream", "tools"}
    assert any(job.leave_after for job in made)
    assert all(job.body.get("stream") for job in made if job.leave_after)


@pytest.mark.parametrize("text", ["", "whole", "half=1", "whole=0", "whole=-1"])
def test_a_wrong_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mix"):
        parse_weights(text)


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_SAMPLES", 3)
    counted = report.Report()
    for _ in range(5):
        counted.add(Result("stream", "ok", 200, 1.0, 1.0, [1.0, 2.0]))
    shown = counted.show(1.0)
    assert (shown["requests"], shown["latency_ms"]["n"], shown["gap_ms"]["n"]) == (5, 3, 3)


def test_a_run_over_http(simulator: Sim, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts agree with the simulator's own."""
    simulator.reset()
    out = tmp_path / "report.json"
    arguments = ["http", "--url", simulator.url, "--key", "any", "--requests", "60", "--concurrency", "8"]
    assert program.main([*arguments, "--json", str(out), "--chunks", "5", "--leave", "0.2"]) == 0
    shown = json.loads(out.read_text())
    bill = simulator.bill()
    assert shown["requests"] == len(bill) == 60
    assert shown["ok"] + shown["status"].get("left", 0) == 60
    assert shown["latency_ms"]["n"] == shown["ok"]
    assert 0 < shown["output_tokens"] <= sum(line["output_tokens"] for line in bill)
    assert "first token" in capsys.readouterr().out


def test_a_run_that_meets_errors_fails_and_names_them(simulator: Sim, capsys: pytest.CaptureFixture[str]) -> None:
    simulator.reset()
    simulator.fault(status=500, times=2, match={"stream": False})
    simulator.fault(error_after=1, match={"stream": True})
    simulator.fault(no_done=True, match={"stream": True})
    arguments = ["http", "--url", simulator.url, "--requests", "30", "--concurrency", "1", "--mix", "whole=1,stream=1"]
    assert program.main([*arguments, "--json", "-"]) == 1
    shown = json.loads(capsys.readouterr().out)
    simulator.reset()
    assert shown["status"] == {"ok": 26, "server_error": 3, "truncated": 1}
    assert shown["http"] == {"200": 28, "500": 2}


def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["http"], ["nats", "--url", "nats://x"]):
        with pytest.raises(SystemExit):
            program.arguments(arguments)
    assert "--tenant and --key-id" in capsys.readouterr().err


def test_the_table_is_printed() -> None:
    console = Console(record=True, width=120)
    report.table(report.Report().show(1.0), console)
    assert "0 requests in" in console.export_text()
