"""The Procfile under honcho: what `hotpath env` writes is enough, and every role scales (issue 2, section 1)."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy import servers
from deploy.cli import procfile
from shared.bus.nats import NatsBus
from shared.wire import subjects
from shared.wire.messages import decode_beat
from tests.e2e.rig import Up, alive
from tests.e2e.sim import until


def status(url: str) -> int:
    """Of a GET; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    """Every descendant."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if alive(pid) else []
    return [one for child in map(int, listed) for one in (child, *children(child))]


@contextmanager
def honcho(written: str, directory: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`honcho start` with this .env, from an environment that knows nothing of a virtual one."""
    env_file = directory / ".env"
    env_file.write_text(written)
    command = [sys.executable, "-m", "honcho", "-d", str(procfile.ROOT), "-e", str(env_file), *options]
    with (directory / "honcho.out").open("wb") as out:
        env = {"PATH": os.defpath, "PORT": "5000"}
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=procfile.ROOT, start_new_session=True)
    left: list[int] = []
    try:
        yield process
        left = children(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(15)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in left:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
    assert not until(lambda: [pid for pid in left if alive(pid)], lambda found: not found, 2)


async def test_scaled_against_given_servers(tmp_path: Path, nats_url: str, valkey_url: str) -> None:
    """`honcho start -c ingress=2,guardian=2,provider=4`: two ingresses share GATEWAY_PORT, all beat."""
    port = servers.free_port()
    one = Up(tmp_path / "data", env={"NATS_URL": nats_url, "REDIS_URL": valkey_url, "GATEWAY_PORT": str(port)})
    written = one.cli_run("env").stdout
    beats: Counter[str] = Counter()
    seen: set[str] = set()

    def on_beat(_subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        beat = decode_beat(payload)
        if beat.instance not in seen and not beat.draining:
            seen.add(beat.instance)
            beats[beat.role] += 1

    bus = await NatsBus.connect(nats_url, "test-honcho")
    await bus.subscribe(subjects.beat("*", "*"), on_beat)
    with honcho(written, tmp_path, "start", "-c", "ingress=2,guardian=2,provider=4") as process:
        ready = until(lambda: status(f"http://127.0.0.1:{port}/ready"), lambda found: found == 200, 20)
        assert ready == 200, (tmp_path / "honcho.out").read_text()
        end = time.monotonic() + 5
        while sum(beats.values()) < 9 and time.monotonic() < end:
            await bus.flush()
        assert beats == {"ingress": 2, "guardian": 2, "routing": 1, "provider": 4}
        assert process.poll() is None
    await bus.close()


def test_procfile_dev(tmp_path: Path) -> None:
    """Servers and simulator too: `hotpath env > .env && honcho start -f deploy/Procfile.dev`, and an answer."""
    port = servers.free_port()
    one = Up(tmp_path / "data", env={"GATEWAY_PORT": str(port)})
    written = one.cli_run("env").stdout
    key = next(line.partition("=")[2] for line in written.splitlines() if line.startswith("GATEWAY_API_KEY="))
    with honcho(written, tmp_path, "-f", "deploy/Procfile.dev", "start"):
        url = f"http://127.0.0.1:{port}"
        ready = until(lambda: status(f"{url}/ready"), lambda found: found == 200, 20)
        assert ready == 200, (tmp_path / "honcho.out").read_text()
        body = b'{"model": "sim-fast", "messages": [{"role": "user", "content": "Hello"}]}'
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_one_worker_process(tmp_path: Path, nats_url: str, valkey_url: str) -> None:
    """`WORKER_ROLES=guardian,routing,provider python -m workers`: one process, three roles, one ingress beside it."""
    port = servers.free_port()
    given = {"NATS_URL": nats_url, "REDIS_URL": valkey_url, "GATEWAY_PORT": str(port)}
    given["WORKER_ROLES"] = "guardian,routing,provider"
    written = Up(tmp_path / "data", env=given).cli_run("env").stdout
    file = tmp_path / "Procfile"
    file.write_text("ingress: python -m ingress\nworkers: python -m workers\n")
    with honcho(written, tmp_path, "-f", str(file), "start") as process:
        ready = until(lambda: status(f"http://127.0.0.1:{port}/ready"), lambda found: found == 200, 20)
        assert ready == 200, (tmp_path / "honcho.out").read_text()
        pythons = [pid for pid in children(process.pid) if b"workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(pythons) <= 2  # the shell, and the process
