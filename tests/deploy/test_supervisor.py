"""`hotpath up` with real servers and stand-in roles: ready, restarted, stopped in order, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy import servers
from tests.e2e.rig import Up, alive
from tests.e2e.sim import until

HERE = Path(__file__).parent
ROLES = ("ingress", "guardian", "routing", "provider")
FLEET = {*ROLES, "nats", "redis", "simulator"}


def procfile(directory: Path, **manners: str) -> Path:
    """A Procfile of stand-ins with these manners."""
    path = directory / "Procfile"
    path.write_text("".join(f"{r}: python -m tests.deploy.standin {r} {manners.get(r, '')}\n" for r in ROLES))
    return path


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Makes a `hotpath up` (not yet started) of stand-ins; whatever is left of it is killed."""
    made: list[Up] = []

    def make(*options: str, env: dict[str, str] | None = None, **manners: str) -> Up:
        one = Up(tmp_path / "data", "--procfile", str(procfile(tmp_path, **manners)), *options, env=env)
        made.append(one)
        return one

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.kill()


def ports(run: dict[str, str]) -> list[int]:
    """Every port that something listens on."""
    urls = (run["url"], run["nats_url"], run["redis_url"], run["simulator_url"])
    return [port for url in urls if (port := urlsplit(url).port)]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_gone(pids: list[int], used: list[int]) -> None:
    """No process, no port."""
    left = until(lambda: [pid for pid in pids if alive(pid)], lambda found: not found, 2)
    assert not left
    assert not [port for port in used if listening(port)]


def test_life(up: Callable[..., Up]) -> None:
    """Ready means all of it; run.json is the issue's; Ctrl-C leaves no process and no port (acceptance 1)."""
    one = up("--scale", "guardian=2,provider=3", ingress="loud").start()
    run = one.run
    assert set(run) == {
        "url", "nats_url", "loadgen_nats_url", "redis_url", "simulator_url", "api_key", "admin_key", "admin_url",
        "metrics", "pids",
    }  # fmt: skip
    assert set(run["pids"]) == set(run["metrics"]) == FLEET
    assert {role: len(pids) for role, pids in run["pids"].items()} == dict.fromkeys(FLEET, 1) | {
        "guardian": 2,
        "provider": 3,
    }
    assert sorted(run["metrics"]["provider"]) == sorted(f"http://127.0.0.1:1/{pid}" for pid in run["pids"]["provider"])
    assert (one.data / "run.json").stat().st_mode & 0o777 == 0o600
    assert one.data.stat().st_mode & 0o077 == 0
    assert all(listening(port) for port in ports(run))
    assert "ingress.1 | warning ingress is worried disk=full" in one.said()
    assert "ingress.1 | plain words" in one.said()
    assert "nobody wants to know" not in one.said()
    assert "nobody wants to know" in (one.data / "logs" / "ingress.1.log").read_text()
    assert run["url"] in one.said()
    assert run["api_key"] in one.said()
    pids, used = one.pids(), ports(run)
    assert one.stop() == 0
    assert_gone(pids, used)
    assert not (one.data / "run.json").exists()


def test_the_order_of_the_end(up: Callable[..., Up]) -> None:
    """The ingress has ended before a provider is told to, the servers are last; SIGTERM does the same as Ctrl-C."""
    one = up().start()
    pids = {role: pids[0] for role, pids in one.run["pids"].items()}
    os.kill(pids["ingress"], signal.SIGSTOP)  # it cannot drain
    one.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert all(alive(pid) for pid in pids.values())
    os.kill(pids["provider"], signal.SIGSTOP)
    os.kill(pids["ingress"], signal.SIGCONT)
    assert not until(lambda: alive(pids["ingress"]), lambda found: not found, 2)
    time.sleep(0.2)
    assert all(alive(pids[role]) for role in FLEET - {"ingress"})
    os.kill(pids["provider"], signal.SIGCONT)
    assert one.wait() == 0
    assert_gone(list(pids.values()), [])


def test_a_role_that_dies_is_started_again(up: Callable[..., Up]) -> None:
    """Fault 21: with backoff, nothing else is stopped, and run.json follows; the servers too, on their ports."""
    one = up("--scale", "provider=2").start()
    before = one.run
    for role in ("provider", "redis", "simulator"):
        victim = one.run["pids"][role][0]
        os.kill(victim, signal.SIGKILL)
        count = len(before["pids"][role])
        until(lambda: one.run["pids"], lambda pids: len(pids[role]) == count and victim not in pids[role], 5)  # noqa: B023
        after = one.run["pids"]
        assert len(after[role]) == count
        assert victim not in after[role]
        assert all(alive(pid) for pid in after[role])
    after_all = one.run
    for role in ("ingress", "guardian", "routing", "nats"):
        assert after_all["pids"][role] == before["pids"][role]
    assert before["pids"]["provider"][1] in after_all["pids"]["provider"]
    assert ports(after_all) == ports(before)
    assert all(listening(port) for port in ports(after_all))
    assert "provider.1 was killed by SIGKILL; started again in 0.1 s" in one.said()
    assert one.stop() == 0


def test_a_role_that_keeps_dying(up: Callable[..., Up]) -> None:
    """Fault 21: each restart waits twice as long as the last; the rest stays as it is, and Ctrl-C ends the waiting."""
    one = up(routing="crash")
    one.launch()
    said = until(one.said, lambda text: "in 0.8 s" in text, 10)
    waits = [line.rpartition(" in ")[2].split()[0] for line in said.splitlines() if "routing.1 ended with" in line]
    assert waits[:4] == ["0.1", "0.2", "0.4", "0.8"]
    assert "exit code 3" in said
    began = time.monotonic()
    one.signal()
    assert one.wait() == 0
    assert time.monotonic() - began < 3


def test_a_second_signal_kills(up: Callable[..., Up]) -> None:
    """A role that does not end cannot hold the supervisor up for ever, nor for longer than one more Ctrl-C."""
    one = up(guardian="stubborn").start()
    pids, used = one.pids(), ports(one.run)
    one.signal()
    time.sleep(0.3)
    assert alive(one.run["pids"]["guardian"][0])
    began = time.monotonic()
    one.signal()
    one.wait(5)
    assert time.monotonic() - began < 2
    assert_gone(pids, used)


def test_a_supervisor_that_is_killed(up: Callable[..., Up]) -> None:
    """SIGKILL gives it no chance; its warden ends roles and servers, stubborn ones too, and the next start waits."""
    one = up(guardian="stubborn").start()
    pids, used = one.pids(), ports(one.run)
    one.kill()
    port = urlsplit(json.loads((one.data / "run.json").read_text())["url"]).port
    again = up("--port", str(port))
    again.launch()  # while the warden is still at work
    assert not until(lambda: [pid for pid in pids if alive(pid)], lambda left: not left, 10)
    again.wait_ready()
    assert not [number for number in used[1:] if listening(number)]
    assert not set(again.pids()) & set(pids)
    assert again.stop() == 0


def test_refused_settings(up: Callable[..., Up]) -> None:
    """A role that exits with 78 ends the start at once, with its words and nothing left running."""
    one = up(routing="refused")
    one.launch()
    assert one.wait(10) == 78
    assert "GATEWAY_SOMETHING: is not right" in one.said()
    assert "routing.1 refused the configuration" in one.said()
    assert not (one.data / "run.json").exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GATEWAY_API_KEY": "1"}, "GATEWAY_API_KEY must be at least 32 characters"),
        ({"GATEWAY_API_KEY": ""}, "GATEWAY_API_KEY must be at least 32 characters"),
        ({"GATEWAY_API_KEY": "ä" * 40}, "GATEWAY_API_KEY contains invalid characters"),
        ({"KEY_PEPPER": "x" * 40, "ADMIN_API_KEY": "x" * 40}, "must differ"),
        ({"GATEWAY_PORT": "web"}, "GATEWAY_PORT"),
        ({"TIMEOUT_MS": "0"}, "TIMEOUT_MS"),
    ],
)
def test_bad_settings(up: Callable[..., Up], env: dict[str, str], message: str) -> None:
    """S1-C1a-c, D16: nothing is started, nothing is written."""
    one = up(env=env)
    one.options = (*one.options, "--port", "0") if "GATEWAY_PORT" not in env else one.options
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "up", "--data", str(one.data)],
        env=one.env, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert message in done.stderr
    assert not one.data.exists()


def test_a_port_in_use(up: Callable[..., Up]) -> None:
    """It is said in one line what to do; nothing is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one = up("--port", str(port))
        one.launch()
        assert one.wait(10) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in one.said()
    assert "--port N" in one.said()
    assert "Traceback" not in one.said()


def test_two_on_one_directory(up: Callable[..., Up]) -> None:
    """The second says who has it; the first does not notice."""
    first = up().start()
    second = Up(first.data, *first.options, env={})
    second._log = first.data.with_name("second.out")
    second.launch()
    assert second.wait(10) == 1
    assert f"another `hotpath up` (pid {first.process.pid if first.process else ''}) runs on" in second.said()
    assert all(alive(pid) for pid in first.pids())
    assert first.stop() == 0


def test_given_servers_and_catalogue(up: Callable[..., Up], valkey_url: str, nats_url: str) -> None:
    """NATS_URL, REDIS_URL and HOTPATH_CATALOG are used as they stand: no server and no simulator of ours."""
    catalogue = Path(__file__).parents[2] / "deploy" / "catalog.toml"
    env = {"NATS_URL": nats_url, "REDIS_URL": valkey_url, "HOTPATH_CATALOG": str(catalogue)}
    one = up(env=env).start()
    run = one.run
    assert (run["nats_url"], run["loadgen_nats_url"], run["redis_url"]) == (nats_url, nats_url, valkey_url)
    assert run["simulator_url"] is None
    assert [run["pids"][name] for name in ("nats", "redis", "simulator")] == [[], [], []]
    assert not (one.data / "catalog.toml").exists()
    one.stop()


@pytest.mark.parametrize("how", ["--no-simulator", "OPENAI_API_KEY"])
def test_no_simulator(up: Callable[..., Up], how: str) -> None:
    """A provider's key, or being told, means the catalogue of the repository."""
    one = up(how) if how.startswith("--") else up(env={how: "sk-x"})
    one.start()
    assert one.run["simulator_url"] is None
    one.stop()


def test_no_secret_in_any_argv(up: Callable[..., Up]) -> None:
    """I9: nor in the environment of who needs none: a role knows its own NATS user, only the provider its keys."""
    one = up(env={"OPENAI_API_KEY": "sk-very-secret"}).start()
    secrets = dict(line.split("=", 1) for line in (one.data / "secrets.env").read_text().split())
    secrets["OPENAI_API_KEY"] = "sk-very-secret"
    assert len(secrets) == 11
    needed = {"GATEWAY_API_KEY", "KEY_PEPPER", "ADMIN_API_KEY", "REDIS_PASSWORD"}
    own = {role: {f"NATS_{role.upper()}_PASSWORD"} for role in ("ingress", "guardian", "routing", "provider")}
    own["provider"].add("OPENAI_API_KEY")
    for role, pids in one.run["pids"].items():
        for pid in pids:
            argv = Path(f"/proc/{pid}/cmdline").read_text()
            assert not [secret for secret in secrets.values() if secret in argv]
            environ = Path(f"/proc/{pid}/environ").read_text()
            known = {name for name, secret in secrets.items() if secret in environ}
            assert known == (needed | own.get(role, set()) if role in own else set()), role
    logs = "".join(path.read_text() for path in (one.data / "logs").iterdir())
    assert not [secret for secret in secrets.values() if secret in logs]
    one.stop()


def test_one_socket_for_all_ingresses(up: Callable[..., Up]) -> None:
    """Every ingress accepts on the socket the supervisor opened: one that dies takes no waiting connection with it."""
    one = up("--scale", "ingress=2").start()
    first, second = one.run["pids"]["ingress"]
    os.kill(first, signal.SIGSTOP)
    with urllib.request.urlopen(one.url + "/ready", timeout=5) as answer:
        assert answer.status == 200
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGKILL)
    with urllib.request.urlopen(one.url + "/ready", timeout=5) as answer:  # waits in the socket for the next one
        assert answer.status == 200
    one.stop()


def test_free_ports_are_not_ephemeral() -> None:
    """A server's port is never one that the system may hand to a client while the server is being restarted."""
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(1024 < servers.free_port() < low for _ in range(50))


def test_a_log_that_cannot_be_written(up: Callable[..., Up]) -> None:
    """It ends the start with one line that names it, not with silence."""
    one = up()
    (one.data / "logs" / "guardian.1.log.1").mkdir(parents=True)
    (one.data / "logs" / "guardian.1.log").write_text("of the last start")
    one.launch()
    assert one.wait(20) == 1
    assert "hotpath up: guardian.1: " in one.said()
    assert "Traceback" not in one.said()
