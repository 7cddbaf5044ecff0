"""`hotpath ledger verify` and `hotpath reconcile` as an operator runs them, against a running Hotpath."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from tests.e2e.rig import Up
from tests.e2e.sim import Sim


@pytest.fixture(scope="module")
def spent(up: Up) -> dict[str, Any]:
    """A tenant that asked twice: what `keys create` said, and its name."""
    made: dict[str, Any] = up.cli("keys", "create", "--tenant", "deploy-books", "--limit-usd", "5")
    for _ in range(2):
        ask(up, made["key"])
    return made


def ask(up: Up, key: str) -> str:
    """One whole answer; its request id."""
    body = {"model": "sim-fast", "messages": [{"role": "user", "content": "Good morning"}], "max_tokens": 20}
    request = urllib.request.Request(
        f"{up.url}/v1/chat/completions", json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=20) as answer:
        rid: str = answer.headers["X-BR-Request-Id"]
        return rid


@pytest.fixture
def server(up: Up) -> Iterator["redis.Redis"]:
    """The running Hotpath's Redis."""
    at = urlsplit(up.run["redis_url"])
    client = redis.Redis(host=at.hostname or "", port=at.port or 0, username=at.username, password=at.password)
    yield client
    client.close()


def test_verify(up: Up, spent: dict[str, Any]) -> None:
    """Right: one line per tenant, exit code 0; nobody need stop the traffic for it."""
    found = up.cli("ledger", "verify", "deploy-books")
    (row,) = found["tenants"]
    assert (found["right"], row["tenant"], row["differences"]) == (True, "deploy-books", [])
    assert (row["calls"], row["settled"] > 0, row["pending"]) == (2, True, 0)
    assert up.cli("ledger", "verify")["right"] is True
    said = up.cli_run("ledger", "verify", "deploy-books").stdout
    assert said.startswith("deploy-books: right; ")
    assert len(said.splitlines()) == 1
    assert "there is no tenant nobody" in up.cli_run("ledger", "verify", "nobody").stderr


def test_verify_finds_a_balance_that_somebody_changed(up: Up, spent: dict[str, Any], server: "redis.Redis") -> None:
    """Faults 52: exit code 1, a line that says what differs and one that says what to do."""
    name = f"hp:{{{spent['tenant_id']}}}:bal"
    was = server.hget(name, "t:lifetime")
    assert isinstance(was, bytes)
    server.hset(name, "t:lifetime", "1 0 0")
    try:
        done = up.cli_run("ledger", "verify", "deploy-books")
    finally:
        server.hset(name, "t:lifetime", was)
    assert done.returncode == 1
    first, second, third = done.stdout.splitlines()
    assert "1 difference" in first
    assert "t:lifetime: the balances say 1 0 0" in second
    assert third.strip().startswith("-> hotpath ledger rebuild")


def test_reconcile(up: Up, spent: dict[str, Any], tmp_path: Path) -> None:
    """I1: the simulator's own bill, as it exports it, finds nothing to put right; a line that differs is, once."""
    calls = [each for each in Sim(up.run["simulator_url"]).bill() if each["cost_nano_usd"]]
    file = tmp_path / "bill.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in calls))
    found = up.cli("reconcile", "--bill", str(file), "--tenant", "deploy-books")
    assert (found["difference"], found["kinds"]["right"]["calls"]) == (0, 2)
    rids = {each["rid"] for each in up.cli("ledger", "show", "deploy-books")["entries"]}
    mine = next(each for each in calls if each["request_id"][:32] in rids)
    file.write_text(json.dumps(mine | {"cost_nano_usd": mine["cost_nano_usd"] + 7}) + "\n")
    said = up.cli_run("reconcile", "--bill", str(file), "--dry-run").stdout
    assert "difference: 7 nano-USD ($0.000000007), would be put right" in said
    assert up.cli("reconcile", "--bill", str(file))["difference"] == 7
    assert up.cli("reconcile", "--bill", str(file))["difference"] == 0
    file.write_text(json.dumps(mine) + "\n")
    assert up.cli("reconcile", "--bill", str(file), "--complete", "all", "--tenant", "deploy-books")["difference"] == -7
    assert up.cli("ledger", "verify", "deploy-books")["right"] is True
    file.write_text("no bill\n")
    done = up.cli_run("reconcile", "--bill", str(file))
    assert (done.returncode, "line 1: not a JSON object" in done.stderr) == (1, True)
    assert "No such file" in up.cli_run("reconcile", "--bill", str(tmp_path / "none")).stderr


def test_rebuild(up: Up, spent: dict[str, Any]) -> None:
    """Of a Hotpath that lost nothing."""
    found = up.cli("ledger", "rebuild", "deploy-books", "--dry-run")
    (row,) = found["tenants"]
    assert (row["settlements"], row["snapshot"], row["balances"]) == (0, "", False)
    said = up.cli_run("ledger", "rebuild", "deploy-books")
    assert said.returncode == 0, said.stdout
    assert said.stdout.startswith("deploy-books: nothing is lost\ndeploy-books: right; ")
