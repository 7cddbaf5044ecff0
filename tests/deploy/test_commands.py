"""The command line against a running Hotpath: what it prints, for people and as JSON, and how it fails."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from deploy import servers
from deploy.cli import banner, doctor, envfile, where
from tests.e2e.rig import CliError, Up, clean_env


def paragraph(said: str, start: str) -> list[str]:
    """The lines of the banner from the one that begins with `start` to the next empty one, as one would paste them."""
    lines = [line.removeprefix("  ") for line in said.splitlines()]
    begin = next(number for number, line in enumerate(lines) if line.startswith(start))
    return lines[begin : lines.index("", begin)]


# ---- the banner ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_line(up: Up) -> None:
    """It works as pasted."""
    (line,) = paragraph(up.said(), "curl ")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=20, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]


def test_the_snippet(up: Up) -> None:
    """Five lines, and they work as pasted."""
    lines = paragraph(up.said(), "from openai")
    assert len(lines) == 5
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.stderr == ""
    assert len(done.stdout.split()) > 3


def test_ready_in_two_seconds(up: Up, tmp_path: Path) -> None:
    """Issue 2: the second start is ready within 2 s (the first made the directory)."""
    Up(tmp_path / "data", env={}).start().stop()
    again = Up(tmp_path / "data", env={})
    again.launch()
    try:
        again.wait_ready(2.0)
    finally:
        again.stop()


# ---- keys, budget, ledger, trace -------------------------------------------------------------------------------------


def test_keys(up: Up) -> None:
    """Created once shown, listed without the secret, revoked once."""
    made = up.cli("keys", "create", "--tenant", "deploy-keys", "--synthetic")
    assert set(made) == {"key", "key_id", "tenant_id"}
    assert re.fullmatch(r"br_live_[a-z0-9]{12}_[A-Za-z0-9_-]{43}", made["key"])
    second = up.cli("keys", "create", "--tenant", "deploy-keys")
    assert (second["tenant_id"], second["key_id"] != made["key_id"]) == (made["tenant_id"], True)
    listed = up.cli("keys", "list")
    assert made["key"] not in json.dumps(listed)
    (mine,) = [key for key in listed["keys"] if key["key_id"] == made["key_id"]]
    assert (mine["tenant"], mine["synthetic"], mine["revoked"]) == ("deploy-keys", True, 0)
    assert up.cli("keys", "revoke", made["key_id"])["revoked"] is True
    (mine,) = [key for key in up.cli("keys", "list")["keys"] if key["key_id"] == made["key_id"]]
    assert mine["revoked"] > 0
    text = up.cli_run("keys", "create", "--tenant", "deploy-keys").stdout
    assert "the key is not shown again" in text
    assert "deploy-keys" in up.cli_run("keys", "list").stdout


def test_budget(up: Up) -> None:
    """`budget show` as the issue writes it; amounts are nano-USD integers, for people they are USD."""
    up.cli("keys", "create", "--tenant", "deploy-budget", "--limit-usd", "5", "--period", "day")
    shown = up.cli("budget", "show", "deploy-budget")
    assert set(shown) == {"tenant", "levels"}
    by_period = {level["period"]: level for level in shown["levels"]}
    assert set(by_period) == {"day", "month", "lifetime"}
    assert by_period["day"] == {
        "level": "tenant", "period": "day", "settled": 0, "pending": 0, "unconfirmed": 0, "limit": 5_000_000_000,
    }  # fmt: skip
    assert by_period["month"]["limit"] is None
    changed = up.cli("budget", "set", "deploy-budget", "--limit-usd", "none", "--period", "day")
    assert {level["limit"] for level in changed["levels"]} == {None}
    up.cli("budget", "set", "deploy-budget", "--limit-usd", "0.03", "--period", "month")
    text = up.cli_run("budget", "show", "deploy-budget").stdout
    assert "$0.03" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("budget", "show", "nobody"), "there is no tenant nobody"),
        (("budget", "set", "default", "--limit-usd", "much"), "--limit-usd much"),
        (("budget", "set", "default", "--limit-usd", "1", "--period", "year"), "expected day, month or lifetime"),
        (("budget", "set", "default", "--limit-usd", "9007200"), "."),
        (("keys", "create", "--tenant", "a b"), "a tenant's name"),
        (("keys", "create", "--tenant", "x", "--limit-usd", "-1"), "--limit-usd -1"),
        (("keys", "create", "--tenant", "x", "--limit-usd", ""), "expected an amount"),
        (("budget", "set", "default", "--limit-usd", ""), "expected an amount"),
        (("keys", "revoke", "aaaaaaaaaaaa"), "there is no key aaaaaaaaaaaa"),
        (("keys", "revoke", "../x"), "there is no key"),
        (("ledger", "show", "default", "xyz"), "32 hex digits"),
        (("trace", "0" * 32), "no ingress remembers"),
        (("trace", "a/b"), "not a request id"),
    ],
)
def test_refusals(up: Up, words: tuple[str, ...], message: str) -> None:
    """One line on stderr and exit code 1."""
    done = up.cli_run(*words, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(message, done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_nothing_runs(tmp_path: Path) -> None:
    """Without a Hotpath the command says how to name one."""
    nowhere = Up(tmp_path / "nothing", env={"REDIS_URL": f"redis://127.0.0.1:{servers.free_port()}/0"})
    done = nowhere.cli_run("keys", "list")
    assert (done.returncode, len(done.stderr.splitlines()) > 1) == (78, True)
    assert "KEY_PEPPER" in done.stderr
    with pytest.raises(CliError):
        nowhere.cli("budget", "show", "default")
    nowhere.env |= {name: name * 4 for name in ("GATEWAY_API_KEY", "KEY_PEPPER", "ADMIN_API_KEY")}
    done = nowhere.cli_run("keys", "list")
    assert done.returncode == 1
    assert "Redis does not answer" in done.stderr


def test_prices(up: Up) -> None:
    """Of the simulator that runs, for people and as JSON."""
    found = up.cli("prices", "show", "sim-fast")
    assert [row["endpoint"] for row in found["endpoints"]] == ["sim", "sim-b"]
    assert found["reserved_at"]["output"] == 600_000_000
    assert "$0.60" in up.cli_run("prices", "show", "sim-fast").stdout


def test_version(up: Up) -> None:
    """What runs, with the servers' versions."""
    found = up.cli("version")
    assert list(found) == ["hotpath", "python", "nats-server", "valkey"]
    assert all(re.match(r"\d+\.\d+", version) for version in found.values())


# ---- env -------------------------------------------------------------------------------------------------------------


def test_env_of_a_running_hotpath(up: Up) -> None:
    """Its servers with a user for each role, its secrets, its catalogue."""
    found, run = up.cli("env"), up.run
    assert found["REDIS_URL"] == run["redis_url"]
    assert found["NATS_URL"] == run["nats_url"]
    for role in ("ingress", "guardian", "routing", "provider"):
        own = urlsplit(found[f"NATS_URL_{role.upper()}"])
        assert (own.username, own.port) == (role, urlsplit(run["nats_url"]).port)
    assert found["GATEWAY_API_KEY"] == run["api_key"]
    assert found["ADMIN_API_KEY"] == run["admin_key"]
    assert Path(found["HOTPATH_CATALOG"]) == up.data / "catalog.toml"


def test_env_of_nothing(tmp_path: Path) -> None:
    """Embedded servers' URLs with generated passwords, a simulator's catalogue; the same again the second time."""
    first = envfile.lines(str(tmp_path / "d"), {"GATEWAY_PORT": "1234", "PATH": "/bin"})
    assert first["GATEWAY_PORT"] == "1234"
    assert urlsplit(first["NATS_URL"]).username == "operator"
    assert urlsplit(first["NATS_URL_PROVIDER"]).username == "provider"
    assert f"127.0.0.1:{first['SIMULATOR_PORT']}/" in Path(first["HOTPATH_CATALOG"]).read_text()
    assert first["PATH"].endswith(":/bin")
    again = envfile.lines(str(tmp_path / "d"), {"GATEWAY_PORT": "1234", "PATH": "/bin"})
    assert [again[name] for name in ("GATEWAY_API_KEY", "KEY_PEPPER")] == [
        first[name] for name in ("GATEWAY_API_KEY", "KEY_PEPPER")
    ]


def test_env_of_given_servers(tmp_path: Path) -> None:
    """NATS_URL, NATS_URL_<ROLE>, REDIS_URL and the provider's key are passed through as they are."""
    env = {
        "NATS_URL": "nats://a:b@n:1", "NATS_URL_GUARDIAN": "nats://g:b@n:1", "REDIS_URL": "redis://r:2/0",
        "OPENAI_API_KEY": "sk-1", "GATEWAY_PORT": "1",
    }  # fmt: skip
    found = envfile.lines(str(tmp_path / "d"), env)
    assert {name: found[name] for name in env} == env
    assert "HOTPATH_CATALOG" not in found


def test_env_of_a_role(tmp_path: Path) -> None:
    """For runners that can give each process its own environment: its own NATS user, and a provider the keys."""
    whole = envfile.lines(str(tmp_path / "d"), {"GATEWAY_PORT": "1", "OPENAI_API_KEY": "sk-1"})
    for role in ("ingress", "guardian", "routing", "provider"):
        found = envfile.of_role(whole, role)
        assert [name for name in found if name.startswith("NATS_URL")] == [f"NATS_URL_{role.upper()}"]
        assert (found["OPENAI_API_KEY"] == "sk-1") is (role == "provider")
        assert found["KEY_PEPPER"] == whole["KEY_PEPPER"]
    with pytest.raises(ValueError, match="--role operator: expected ingress"):
        envfile.of_role(whole, "operator")


# ---- doctor ----------------------------------------------------------------------------------------------------------


def states(checks: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in checks["checks"]}


def test_doctor_of_a_healthy_one(up: Up) -> None:
    """Everything is well, exit code 0."""
    assert set(states(up.cli("doctor")).values()) == {"ok"}
    done = up.cli_run("doctor")
    assert done.returncode == 0
    assert f"{up.run['admin_url']} answers" in done.stdout
    assert up.run["admin_url"] in up.said()
    assert "embedded: operator, loadgen, a user per role" in done.stdout


def test_doctor_before_the_first_start(tmp_path: Path) -> None:
    """Nothing is wrong yet; each line says what to do."""
    env = clean_env({"GATEWAY_PORT": str(servers.free_port()), "NATS_URL": "nats://127.0.0.1:1"})
    env["REDIS_URL"] = "redis://127.0.0.1:1/0"
    found = doctor.examine(where.find(str(tmp_path), env))
    assert "fail" not in states(found).values()
    assert states(found)["endpoint openai-main"] == "warn"
    assert all(check["do"] for check in found["checks"] if check["state"] == "warn")


def test_doctor_of_servers_of_ones_own(tmp_path: Path, nats_url: str) -> None:
    """No per-role users is said; a Redis that evicts or forgets is a failure with its remedy."""
    port = servers.free_port()
    command = [servers.valkey_binary(), "--port", str(port), "--save", "", "--maxmemory-policy", "allkeys-lru"]
    env = clean_env({"NATS_URL": nats_url, "REDIS_URL": f"redis://127.0.0.1:{port}/0"})
    with servers.running(command, port, tmp_path / "log"):
        found = doctor.examine(where.find("", env))
    assert states(found)["nats users"] == "warn"
    assert (states(found)["redis eviction"], states(found)["redis aof"]) == ("fail", "fail")
    env |= {f"NATS_URL_{role}": nats_url + "/" for role in ("INGRESS", "GUARDIAN", "ROUTING", "PROVIDER")}
    assert states(doctor.examine(where.find("", env)))["nats users"] == "ok"
    env["MAX_BODY_BYTES"] = str(2 * 1024 * 1024)
    assert states(doctor.examine(where.find("", env)))["nats"] == "fail"


def test_doctor_of_bad_settings(tmp_path: Path) -> None:
    """Each fault is its own line."""
    env = clean_env({"GATEWAY_API_KEY": "short", "TIMEOUT_MS": "soon", "HOTPATH_DATA": str(tmp_path)})
    checks = doctor.examine(where.find("", env))["checks"]
    assert len([check for check in checks if check["state"] == "fail"]) == 2


def test_the_banner_names_a_model_that_is_served() -> None:
    """Whatever the catalogue has; quotes in its name survive the shell."""
    model = 'org/it\'s "that" one'
    line = banner.curl("http://x", "key", model)
    words = subprocess.run(["sh", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"], capture_output=True, text=True)  # noqa: PLW1510
    assert json.loads(words.stdout.splitlines()[-1])["model"] == model


def test_the_banner_of_a_given_key_takes_it_from_the_environment() -> None:
    """I9: an operator's key is not printed, and the line still works as pasted."""
    line = banner.curl("http://x", f"${banner.VARIABLE}", "m")
    script = f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"
    words = subprocess.run(
        ["sh", "-c", script], env={banner.VARIABLE: "k-1"}, capture_output=True, text=True, check=True
    )
    assert "Authorization: Bearer k-1" in words.stdout.splitlines()
