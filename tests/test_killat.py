"""Kill points: nothing without HOTPATH_TEST=1, SIGKILL at the named one, once for all processes of a folder."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from shared.service import killat
from tests.e2e.rig import Up
from tests.e2e.sim import until

ROOT = Path(__file__).parent.parent
USE = re.compile(r"""reach(?:_soon)?\(\s*"([a-z_.]+)"(?: if [^)]* else "([a-z_.]+)")?\)""")
RUN = """
import asyncio, sys
from shared.service.killat import reach, reach_soon
async def main():
    {call}("guardian.on_message")
    print("same turn", flush=True)
    await asyncio.sleep(0.01)
    print("later", flush=True)
asyncio.run(main())
"""


def run(call: str = "reach", **env: str) -> tuple[int, list[str]]:
    """A process that comes to guardian.on_message: (exit code, what it printed)."""
    command = [sys.executable, "-c", RUN.format(call=call)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, done.stdout.splitlines()


ALIVE = (0, ["same turn", "later"])


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"KILLAT": "guardian.on_message"},
        {"HOTPATH_TEST": "0", "KILLAT": "guardian.on_message"},
        {"HOTPATH_TEST": "1"},
        {"HOTPATH_TEST": "1", "KILLAT": "guardian.after_reserve"},
    ],
)
def test_nobody_dies_unasked(env: dict[str, str]) -> None:
    assert run(**env) == ALIVE


def test_at_the_point() -> None:
    assert run(HOTPATH_TEST="1", KILLAT="guardian.on_message") == (-signal.SIGKILL, [])
    code, said = run("reach_soon", HOTPATH_TEST="1", KILLAT="guardian.on_message")
    assert (code, said) == (-signal.SIGKILL, ["same turn"])


def test_once_a_file(tmp_path: Path) -> None:
    (tmp_path / "guardian.on_message").touch()
    env = {"HOTPATH_TEST": "1", "KILLAT_DIR": str(tmp_path)}
    assert run(**env) == (-signal.SIGKILL, [])
    assert run(**env) == ALIVE


def test_with_stop_in_the_file_it_is_frozen_there(tmp_path: Path) -> None:
    (tmp_path / "guardian.on_message").write_text(killat.STOP)
    env = {"HOTPATH_TEST": "1", "KILLAT_DIR": str(tmp_path)}
    command = [sys.executable, "-c", RUN.format(call="reach")]
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert not list(tmp_path.iterdir())
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=30)
    assert (process.returncode, said.splitlines()) == ALIVE


def test_every_point_stands_in_the_code_once() -> None:
    """The list is the truth: no point without a place, no place without a point."""
    found = [
        name
        for folder in ("ingress", "workers")
        for path in (ROOT / folder).rglob("*.py")
        for pair in USE.findall(path.read_text())
        for name in pair
        if name
    ]
    assert sorted(found) == sorted(killat.POINTS)
    assert len(killat.POINTS) >= 20


def test_it_costs_nothing_here() -> None:
    """The tests' own process never dies of it, whatever its environment: the functions are bound at import."""
    assert killat.reach is killat.reach_soon
    killat.reach("guardian.on_message")


def test_one_process_of_a_fleet_dies_of_it(tmp_path: Path) -> None:
    """`hotpath up` hands KILLAT to the first process of each role, once: the request is served by the other one, and
    the first comes back whole (faults 6)."""
    env = {"HOTPATH_TEST": "1", "KILLAT": "guardian.after_reserve"}
    with Up(tmp_path / "up", "--scale", "guardian=2", env=env) as up:
        before = set(up.run["pids"]["guardian"])
        for _ in range(20):
            assert ask(up) == 200
            if set(up.run["pids"]["guardian"]) != before:
                break
        said = until(up.said, lambda text: "started again" in text, 5)
        assert said.count("was killed by SIGKILL") == 1
        after = until(lambda: up.run["pids"]["guardian"], lambda pids: len(pids) == 2, 10)
        assert len(before & set(after)) == 1
        assert [ask(up) for _ in range(20)] == [200] * 20
        assert up.said().count("was killed by SIGKILL") == 1


def ask(up: Up) -> int:
    """One request's status."""
    body = {"model": "sim-fast", "messages": [{"role": "user", "content": "[[sim chunks=2]]"}]}
    headers = {"Authorization": f"Bearer {up.run['api_key']}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{up.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        status: int = answer.status
    return status
