"""`hotpath keys|tenant|budget|spend` in this process, against a real Valkey: limits of tenants, keys and users, expiry,
policies. (tests/deploy/test_commands.py starts the real command beside a running Hotpath.)"""

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy import servers
from deploy.cli import tenants
from deploy.cli.app import main
from shared.core.users import user_id
from shared.state.redis import State
from tests.state.rig import Money, new_rid, settings_for
from tests.state.test_costs import Tracker

Run = Callable[..., Any]
DAY = 86_400_000


@pytest.fixture
def run(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("keys", "list")`: the JSON it printed; `fails="..."`: it printed one line with that, and nothing else."""
    settings = {"GATEWAY_API_KEY": "g" * 40, "KEY_PEPPER": "p" * 40, "ADMIN_API_KEY": "a" * 40, "REDIS_URL": valkey_url}
    for name, value in {**settings, "NATS_URL": f"nats://127.0.0.1:{servers.free_port()}"}.items():
        monkeypatch.setenv(name, value)

    def go(*words: str, fails: str = "", text: bool = False) -> Any:
        done = CliRunner().invoke(main, [*words, *([] if text else ["--json"])])
        if fails:
            assert (done.exit_code, done.stdout) == (1, ""), done.output
            assert fails in done.stderr
            assert len(done.stderr.splitlines()) == 1
            return None
        assert done.exit_code == 0, done.output
        return done.stdout if text else json.loads(done.stdout)

    return go


@pytest.fixture
def name() -> str:
    return f"t{secrets.token_hex(4)}"


def limits(budget: dict[str, Any]) -> dict[str, Any]:
    return {level["period"]: level["limit"] for level in budget["levels"]}


def test_a_key_with_everything(run: Run, name: str) -> None:
    made = run(
        "keys", "create", "--tenant", name, "--limit-usd", "5", "--period", "day", "--key-limit-usd", "1.5",
        "--expires", "30d", "--models", "a,b/c", "--rpm", "60", "--tpm", "9000",
    )  # fmt: skip
    assert set(made) == {"key", "key_id", "tenant_id"}
    assert limits(run("budget", "show", name)) == {"day": 5 * 10**9, "month": None, "lifetime": None}
    of_key = run("budget", "show", name, "--key", made["key_id"])
    assert (limits(of_key), of_key["key"]) == ({"day": None, "month": 15 * 10**8, "lifetime": None}, made["key_id"])
    assert {level["level"] for level in of_key["levels"]} == {"key"}
    (listed,) = run("keys", "list", "--tenant", name)["keys"]
    assert 29.9 * DAY < listed["expires"] - listed["created"] < 30.1 * DAY
    assert (listed["models"], listed["rpm"], listed["tpm"]) == (["a", "b/c"], 60, 9000)
    found = run("keys", "set", made["key_id"], "--expires", "never", "--models", "none", "--rpm", "0")
    assert (found["expires"], found["models"], found["rpm"], found["tpm"]) == (0, [], 0, 9000)
    shown = run("keys", "list", "--tenant", name, text=True)
    assert made["key_id"] in shown
    assert made["key"] not in shown


def test_budgets_of_keys_and_users(run: Run, name: str) -> None:
    """S0-16: three levels. A user is named as requests name it, and stored as an opaque id (D6)."""
    made, other = (run("keys", "create", "--tenant", each) for each in (name, f"{name}-other"))
    user = run("budget", "set", name, "--limit-usd", "0.25", "--period", "day", "--user", "ann@example.org")
    assert user["user"] == user_id(b"p" * 40, made["tenant_id"], "ann@example.org")
    assert limits(user) == {"day": 25 * 10**7, "month": None, "lifetime": None}
    key = run("budget", "set", name, "--limit-usd", "1", "--key", made["key_id"])
    assert limits(key)["month"] == 10**9
    assert limits(run("budget", "set", name, "--limit-usd", "none", "--key", made["key_id"]))["month"] is None
    assert limits(run("budget", "show", name)) == {"day": None, "month": None, "lifetime": None}
    assert "user " + user["user"] in run("budget", "show", name, "--user", "ann@example.org", text=True)
    run("budget", "show", name, "--key", other["key_id"], fails=f"there is no key {other['key_id']}; ")
    run("budget", "show", name, "--key", "a", "--user", "b", fails="a key or a user, not both")
    run("budget", "set", name, "--limit-usd", "1", "--user", "x" * 257, fails="at most 256 characters")


def test_policies(run: Run, name: str) -> None:
    run("keys", "create", "--tenant", name)
    words = ("--mode", "active", "--pii", "redact", "--keywords", "geheim,top secret", "--no-clamp", "--rpm", "10")
    found = run("tenant", "set", name, *words)
    assert found | {"tenant_id": "", "created": 0} == {
        "tenant": name, "tenant_id": "", "synthetic": False, "created": 0, "mode": "active", "pii": "redact",
        "keywords": ["geheim", "top secret"], "clamp": False, "rpm": 10, "tpm": 0,
    }  # fmt: skip
    assert run("tenant", "set", name, "--keywords", "none", "--clamp") == found | {"keywords": [], "clamp": True}
    assert "no limit" in run("tenant", "show", name, text=True)
    assert run("tenant", "show", "default")["mode"] == "observe"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tenant", "show", "nobody"), "there is no tenant nobody; `hotpath keys create --tenant nobody`"),
        (("tenant", "set", "default"), "nothing to set"),
        (("tenant", "set", "default", "--mode", "on"), "Invalid enum value 'on'"),
        (("tenant", "set", "default", "--rpm", "-1"), "$.rpm"),
        (("tenant", "set", "default", "--keywords", ""), "a,b or as none"),
        (("keys", "set", "aaaaaaaaaaaa", "--rpm", "1"), "there is no key aaaaaaaaaaaa"),
        (("keys", "create", "--tenant", "x", "--expires", "soon"), "--expires soon: expected 30d"),
        (("keys", "create", "--tenant", "x", "--expires", "2020-01-01"), "gone by"),
        (("keys", "create", "--tenant", "x", "--key-limit-usd", ""), "--key-limit-usd : expected an amount"),
        (("budget", "set", "default", "--limit-usd", "1", "--user", ""), "--user is empty"),
        (("budget", "set", "default", "--limit-usd", "1", "--key", ""), "--key is empty"),
        (("budget", "show", "default", "--user", ""), "--user is empty"),
        (("spend", "default", "--by", "user"), "--by user: expected"),
        (("spend", "default", "--by", "day", "--days", "63"), "at most 62 days"),
        (("spend", "nobody", "--by", "day"), "there is no tenant nobody"),
        (("ledger", "show", "nobody"), "there is no tenant nobody"),
    ],
)
def test_refusals(run: Run, words: tuple[str, ...], message: str) -> None:
    run(*words, fails=message)


def test_expiries() -> None:
    """A span from now, a UTC date or time, never."""
    now = 1_700_000_000_000
    assert tenants.expiry("90m", now) == now + 90 * 60_000
    assert tenants.expiry("2w", now) == now + 14 * DAY
    assert tenants.expiry("2027-01-31", now) == 1_801_353_600_000
    assert tenants.expiry("2027-01-31T12:00:00+02:00", now) == 1_801_353_600_000 + 10 * 3_600_000
    assert tenants.expiry("never", now) == 0
    for odd in ("", "0d", "30", "-1d", "30 d", "1y", "2027-13-01"):
        with pytest.raises(ValueError, match="expected 30d"):
            tenants.expiry(odd, now)


def test_spend(run: Run, name: str, valkey_url: str) -> None:
    made, other = run("keys", "create", "--tenant", name), run("keys", "create", "--tenant", name)

    async def use() -> None:
        state = await State.connect(settings_for(valkey_url))
        money = Money(state, made["tenant_id"])
        for key, cost in ((made, 60), (made, 40), (other, 300)):
            rid = new_rid()
            await money.reserve(rid, amount=500, key=key["key_id"])
            await money.dispatch(rid, amount=500)
            await money.settle(rid, cost=cost, key=key["key_id"])
        await money.reserve(new_rid(), amount=7, key=made["key_id"])
        tracker = Tracker(state, made["tenant_id"])
        today = state.clock.now() // DAY
        await tracker.learn(tracker.record(day=today, cost=7), tracker.record(day=today - 9, cost=100, model="dear"))
        await money.raw("HSET", f"hp:{{{made['tenant_id']}}}:bal", "t:2020-01-01", "11 0 0")
        await state.close()

    asyncio.run(use())
    by_key = run("spend", name, "--by", "key")
    assert (by_key["settled"], by_key["days"]) == (400, 0)
    assert by_key["rows"] == [
        {"name": other["key_id"], "settled": 300, "pending": 0, "unconfirmed": 0},
        {"name": made["key_id"], "settled": 100, "pending": 7, "unconfirmed": 0},
    ]
    assert run("spend", name, "--by", "key", "--days", "1")["rows"] == by_key["rows"]
    by_model = run("spend", name)
    assert (by_model["by"], by_model["settled"]) == ("model", 107)
    assert by_model["rows"] == [
        {"name": "dear", "settled": 100, "requests": 1, "input_tokens": 10, "output_tokens": 5},
        {"name": "m", "settled": 7, "requests": 1, "input_tokens": 10, "output_tokens": 5},
    ]
    today = run("spend", name, "--by", "model", "--days", "1")
    assert (today["settled"], [row["name"] for row in today["rows"]]) == (7, ["m"])
    by_day = run("spend", name, "--by", "day", "--days", "2")
    assert (by_day["settled"], [row["pending"] for row in by_day["rows"]]) == (400, [7])
    assert "$0.0000004" in run("spend", name, "--by", "day", text=True)
