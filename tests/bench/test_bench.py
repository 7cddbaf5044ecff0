"""The harness's configuration and the audit of a benchmark's books (issue 2, acceptance 7)."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy import servers
from deploy.cli import confs, credentials, where
from shared.catalog import load as load_catalog
from shared.settings import load as load_settings
from shared.state.base import Level
from shared.state.ledger import Entry
from shared.state.redis import State
from tests.bench import conf, legs, money, start


def entry(**changes: Any) -> Entry:
    base = Entry(
        rid="ab" * 16, call=1, state="settled", amount=9_000_000, cost=money.WHOLE, estimated=False,
        instance="p", delivery=1, deadline=0, day=20778,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def day(settled: int, **changes: Any) -> Level:
    base = Level(level="tenant", period="day", settled=settled, pending=0, unconfirmed=0, limit=10**15)
    return msgspec.structs.replace(base, **changes)


def test_good_books() -> None:
    """One unary answer costs 42 x $0.15 + 40 x $0.60 per million, a stream 60 x $0.60; a left one is estimated."""
    left = entry(cost=12_345, estimated=True)
    entries = [entry(), entry(cost=money.STREAM), left, entry(state="voided", cost=0)]
    books = money.audit(entries, [day(30_300 + 42_300 + 12_345)])
    assert books.wrong == []
    assert books.calls == {"whole": 1, "stream": 1, "estimated": 1, "voided": 1}


@pytest.mark.parametrize(
    ("one", "level", "what"),
    [
        (entry(cost=30_301), day(30_301), "was settled at 30301"),
        (entry(), day(30_299), "add up to 30300"),
        (entry(), day(30_300, pending=1), "1 pending"),
        (entry(), day(30_300, unconfirmed=2), "2 unconfirmed"),
        (entry(), day(30_300, limit=None), "no limit per day"),
        (entry(state="unconfirmed", cost=0), day(0), "is unconfirmed"),
        (entry(state="dispatched", cost=0), day(0), "is dispatched"),
    ],
)
def test_wrong_books_are_found(one: Entry, level: Level, what: str) -> None:
    books = money.audit([one], [level])
    assert any(what in line for line in books.wrong), books.wrong


def test_the_books_of_a_data_directory(tmp_path: Path) -> None:
    """What `hotpath up` left behind is read with its own configuration and secrets."""
    own = {"GATEWAY_API_KEY": start.KEY}
    secrets = credentials.ensure(tmp_path / "secrets.env", own)
    port = servers.free_port()
    path = confs.redis_conf(tmp_path, port, secrets["REDIS_PASSWORD"])
    found = where.find(str(tmp_path), own | {"REDIS_URL": f"redis://:{secrets['REDIS_PASSWORD']}@127.0.0.1:{port}/0"})

    async def post() -> None:
        state = await State.connect(found.settings())
        now = state.clock.now()
        tenant, rid, soon = money.TENANT, "cd" * 16, now + 60_000
        await state.set_limit(tenant, "day", 10**15)
        await state.ledger.reserve(
            tenant=tenant, rid=rid, delivery=1, amount=50_000, deadline=soon, not_after=soon, key="k"
        )
        await state.ledger.dispatch(
            tenant=tenant, rid=rid, delivery=1, instance="p", lost="", amount=50_000, max_calls=1, not_after=soon
        )
        await state.ledger.settle(tenant=tenant, rid=rid, call=1, cost=money.WHOLE)
        await state.close()

    with servers.running([servers.valkey_binary(), str(path)], port, tmp_path / "log"):
        asyncio.run(post())
    books = money.look(tmp_path)
    assert (books.calls, books.settled, books.wrong) == ({"whole": 1}, money.WHOLE, [])


def test_the_harness_count(tmp_path: Path) -> None:
    runs = [
        {"name": "direct", "cases": {"u1": {"requests": 7}}},
        {"name": "hotpath", "cases": {"u1": {"requests": 5}, "p50": {"ok": 3, "chunks": 180}}},
        {"name": "hotpath", "cases": {"u1": {"requests": 4}, "p50": {"fail": "x"}}},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert money.counted(tmp_path / "results.jsonl") == 12


def test_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's own entries as they stand, and Hotpath as `hotpath up` starts it."""
    (tmp_path / "conf").mkdir()
    known = {"direct": {"url": "d"}, "lim-base": {"url": "l"}, "other": {"url": "o"}}
    (tmp_path / "conf" / "gateways.json").write_text(json.dumps(known))
    monkeypatch.setenv("BENCH", str(tmp_path))
    assert conf.main(["--scale", "provider=2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made) == ["direct", "lim-base", "hotpath"]
    assert made["lim-base"] == known["lim-base"]
    assert made["hotpath"]["start"]["gw"].endswith("--data ${OUT}/hotpath --scale provider=2")
    assert made["hotpath"]["headers"] == [f"Authorization: Bearer {start.KEY}"]
    with pytest.raises(SystemExit):
        conf.main(["nothing"])
    monkeypatch.delenv("BENCH")
    with pytest.raises(SystemExit):
        conf.main([])


@pytest.mark.skipif(not os.environ.get("BENCH"), reason="set BENCH to the harness's folder")
def test_the_real_harness_has_the_entries(capsys: pytest.CaptureFixture[str]) -> None:
    assert conf.main([]) == 0
    made = json.loads(capsys.readouterr().out)
    assert "${MOCK}" in made["direct"]["url"]
    assert "ingress" in made["lim-base"]["start"]


def test_the_key_and_the_catalogue_pass_the_gateways_own_checks(tmp_path: Path) -> None:
    """Or every benchmark would start with a refusal."""
    secrets = credentials.ensure(tmp_path / "secrets.env", {"GATEWAY_API_KEY": start.KEY})
    assert load_settings(secrets).gateway_api_key == start.KEY
    path = tmp_path / "bench.toml"
    path.write_text(start.catalogue(19101))
    catalog = load_catalog(str(path), {})
    assert set(catalog.models) == set(start.MODELS)
    price = catalog.models["mock-fast"].price
    assert 42 * price.input + 60 * price.output == money.STREAM * 1_000_000


def test_every_start_has_its_own_directory(tmp_path: Path) -> None:
    made = [start.own_directory(tmp_path / "hotpath") for _ in range(3)]
    assert [path.name for path in made] == ["1", "2", "3"]


def test_cpu_by_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"pids": {"ingress": [os.getpid()], "guardian": []}}))
    assert legs.main([str(tmp_path), "--seconds", "0.01"]) == 0
    assert capsys.readouterr().out.startswith("ingress ")
    assert legs.cpu_seconds(os.getpid()) > 0
    assert legs.cpu_seconds(2**22 + 1) == 0.0
