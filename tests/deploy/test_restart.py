"""`hotpath restart`: one process at a time, by stand-ins."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.cli import roll, supervise, up
from deploy.cli.logs import Screen
from deploy.cli.runfile import RunFile
from deploy.cli.slot import Slot, Spec
from tests.deploy.test_supervisor import assert_gone, procfile
from tests.e2e.rig import Up, alive
from tests.e2e.sim import until


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts a `hotpath up` of stand-ins; it is ended, and killed when it does not end."""
    made: list[Up] = []

    def make(*options: str, **manners: str) -> Up:
        made.append(Up(tmp_path / "data", "--procfile", str(procfile(tmp_path, **manners)), *options).start())
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.kill()


def restarting(one: Up, role: str) -> "subprocess.Popen[str]":
    """`hotpath restart` in the background."""
    command = [sys.executable, "-m", "deploy.cli", "restart", role, "--data", str(one.data)]
    return subprocess.Popen(command, env=one.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_is_replaced_and_nothing_else(fleet: Callable[..., Up]) -> None:
    """run.json follows, the others are not touched, and whatever was started is ended with the rest."""
    one = fleet("--scale", "guardian=2")
    before = one.run["pids"]
    done = one.cli("restart", "guardian")["restarted"]
    assert [(item["name"], item["old"]) for item in done] == [
        ("guardian.1", before["guardian"][0]), ("guardian.2", before["guardian"][1]),
    ]  # fmt: skip
    after = one.run["pids"]
    assert sorted(item["new"] for item in done) == after["guardian"]
    assert {role: pids for role, pids in after.items() if role != "guardian"} == {
        role: pids for role, pids in before.items() if role != "guardian"
    }
    assert not [pid for pid in before["guardian"] if alive(pid)]
    everything = one.cli("restart", "all")["restarted"]
    assert [item["name"].partition(".")[0] for item in everything] == [
        "provider", "routing", "guardian", "guardian", "ingress",
    ]  # fmt: skip
    pids = one.pids()
    victim = one.run["pids"]["guardian"][0]
    os.kill(victim, signal.SIGKILL)  # the new ones are kept alive as the old ones were
    assert victim not in until(lambda: one.run["pids"]["guardian"], lambda now: len(now) == 2 and victim not in now, 5)
    assert "started again in 0.1 s" in one.said()
    pids += one.pids()
    assert one.stop() == 0
    assert_gone(pids, [])


def test_a_replacement_that_dies_leaves_the_old_one(fleet: Callable[..., Up], tmp_path: Path) -> None:
    """Exit code 1, one line that says so, and everything as it was."""
    flag = tmp_path / "flag"
    one = fleet("--scale", "routing=2", routing=f"broken={flag}")
    before = one.run["pids"]
    flag.touch()
    done = one.cli_run("restart", "routing", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "routing.1: its replacement ended before it was ready" in done.stderr
    assert f"pid {before['routing'][0]} goes on" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert one.run["pids"] == before
    assert all(alive(pid) for pid in before["routing"])
    flag.unlink()
    assert len(one.cli("restart", "routing")["restarted"]) == 2
    assert one.stop() == 0


def test_ctrl_c_while_an_old_one_drains(fleet: Callable[..., Up], tmp_path: Path) -> None:
    """It gets no second SIGTERM, which would end its drain; both it and its replacement are ended."""
    done = tmp_path / "drained"
    one = fleet(provider=f"drains={done}")
    process = restarting(one, "provider")
    assert "provider.1" in until(one.said, lambda text: "is ready, pid" in text, 10)
    pids = one.pids()
    assert len(one.run["pids"]["provider"]) == 2
    second = one.cli_run("restart", "guardian")
    assert (second.returncode, second.stderr) == (1, "hotpath: another restart is under way; wait for it\n")
    one.signal()
    out, err = process.communicate(timeout=10)
    assert (process.returncode, "is ending" in err) == (1, True), out
    time.sleep(0.3)
    assert one.process is not None
    assert one.process.poll() is None, "it waits for the drain"
    done.touch()
    assert one.wait() == 0
    assert not Path(f"{done}.twice").exists()
    assert_gone(pids, [])


def test_a_supervisor_that_is_killed_in_the_middle(fleet: Callable[..., Up], tmp_path: Path) -> None:
    """The warden knows the replacement too."""
    one = fleet(guardian=f"drains={tmp_path / 'never'}")
    process = restarting(one, "guardian")
    until(one.said, lambda text: "is ready, pid" in text, 10)
    pids = one.pids()
    one.kill()
    assert process.wait(10) == 1
    process.communicate()
    assert not until(lambda: [pid for pid in pids if alive(pid)], lambda left: not left, 12)


@pytest.mark.parametrize("role", ["nats", "redis", "simulator", "Provider", "", "x" * 900])
def test_what_cannot_be_rolled(up: Up, role: str) -> None:
    """Servers keep their port, and what is no role is none; in both cases the choice is told."""
    done = up.cli_run("restart", role)
    assert done.returncode == 1
    assert "choose of: ingress, guardian, routing, provider, all" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_nothing_runs(tmp_path: Path) -> None:
    """One line, exit code 1."""
    done = Up(tmp_path / "nothing").cli_run("restart", "guardian")
    assert (done.returncode, done.stderr) == (1, f"hotpath: no `hotpath up` runs on {tmp_path / 'nothing'}\n")


# ---- the roll, in this process ---------------------------------------------------------------------------------------


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[supervise.Supervisor]:
    """Without servers."""
    lock = supervise.open_lock(tmp_path / "lock")
    yield supervise.Supervisor(RunFile(tmp_path / "run.json", {}), Screen(), lock)
    os.close(lock)


def spec(tmp_path: Path, *manners: str, grace: float = 5.0) -> Spec:
    command = [sys.executable, "-m", "tests.deploy.standin", "guardian", *manners]
    env = {"PATH": os.environ["PATH"]}
    return Spec(
        role="guardian", number=1, command=command, env=env, log=tmp_path / "log", order=3, grace=grace, rolls=True
    )


async def heard(_metrics: str) -> bool:
    return True


async def test_a_replacement_that_is_never_ready(
    supervisor: supervise.Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended without a drain: it holds nothing. Meanwhile it is said what is waited for."""
    monkeypatch.setattr(roll, "READY_S", 0.3)
    monkeypatch.setattr(roll, "REPORT_S", 0.1)
    said: list[str] = []
    flag = tmp_path / "mute"
    old = supervisor.start(spec(tmp_path, f"mute={flag}", f"drains={tmp_path / 'never'}", grace=60))
    await old.ready.wait()
    flag.touch()
    async with asyncio.timeout(10):
        with pytest.raises(roll.NotReplaced, match=rf"was not ready within 0.3 s .*; pid {old.pid} goes on"):
            await roll.Roll(supervisor, heard).run("guardian", said.append)
    assert "guardian.1: its replacement is not ready yet after 0 s" in said
    assert supervisor.slots == [old]
    assert old.ready.is_set()
    (tmp_path / "never").touch()
    await supervisor.stop()


async def test_a_replacement_that_nobody_hears(
    supervisor: supervise.Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready is not enough: whoever sends must know it before the old one goes."""
    monkeypatch.setattr(roll, "HEARD_S", 0.2)
    old = supervisor.start(spec(tmp_path))
    await old.ready.wait()
    asked: list[str] = []

    async def deaf(metrics: str) -> bool:
        asked.append(metrics)
        return len(asked) > 20

    rolls = roll.Roll(supervisor, deaf)
    with pytest.raises(roll.NotReplaced, match=r"was not heard by every ingress within 0.2 s"):
        await rolls.run("guardian", print)
    assert supervisor.slots == [old]
    monkeypatch.setattr(roll, "HEARD_S", 10)
    (done,) = await rolls.run("guardian", print)
    (fresh,) = supervisor.slots
    assert (done["old"], done["new"]) == (old.pid, fresh.pid)
    assert asked[-1] == f"http://127.0.0.1:1/{fresh.pid}"
    assert not alive(old.pid)
    await supervisor.stop()


async def test_an_old_one_that_does_not_end_is_said(supervisor: supervise.Supervisor, tmp_path: Path) -> None:
    """It was killed with whatever it held: that is no success."""
    old = supervisor.start(spec(tmp_path, "stubborn", grace=0.3))
    await old.ready.wait()
    with pytest.raises(roll.NotReplaced, match=rf"pid {old.pid} did not end in time and was killed"):
        await roll.Roll(supervisor, heard).run("guardian", print)
    (fresh,) = supervisor.slots
    assert fresh.ready.is_set()
    await supervisor.stop()


async def test_one_that_keeps_dying_is_healed_by_a_restart(supervisor: supervise.Supervisor, tmp_path: Path) -> None:
    """Its backoff is its own: the replacement starts at once, and nothing of the old one's comes back."""
    flag = tmp_path / "flag"
    flag.touch()
    old = supervisor.start(spec(tmp_path, f"broken={flag}"))
    await old.died.wait()
    flag.unlink()
    async with asyncio.timeout(5):
        await roll.Roll(supervisor, heard).run("guardian", print)
    (fresh,) = supervisor.slots
    assert fresh.ready.is_set()
    assert old.task is not None
    assert old.task.done()
    await supervisor.stop()


async def test_a_slot_told_twice_sends_one_signal(tmp_path: Path, supervisor: supervise.Supervisor) -> None:
    """Two stops, one drain."""
    done = tmp_path / "drained"
    slot: Slot = supervisor.start(spec(tmp_path, f"drains={done}", grace=20))
    await slot.ready.wait()
    hurry = asyncio.Event()
    first = asyncio.create_task(slot.stop(hurry))
    await asyncio.sleep(0.1)
    first.cancel()
    second = asyncio.create_task(slot.stop(hurry))
    await asyncio.sleep(0.2)
    assert not second.done()
    done.touch()
    async with asyncio.timeout(5):
        await second
    assert not Path(f"{done}.twice").exists()
    await supervisor.stop()


async def test_who_has_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ingress that answers; one that is frozen or gone is asked in vain and not waited for."""
    run_file = RunFile(tmp_path / "run.json", {})
    for pid in (1, 2, 3):
        run_file.add("ingress", pid, f"http://127.0.0.1:{pid}/metrics")
    row = json.dumps([{"targets": ["127.0.0.1:99"], "labels": {"role": "guardian"}}]).encode()
    answers = {"http://127.0.0.1:1/metrics": (200, row), "http://127.0.0.1:2/metrics": (0, b"")}

    async def get(url: str, path: str, key: str) -> tuple[int, bytes]:
        assert (path, key) == ("/metrics/targets", "admin")
        return answers.get(url, (200, b"[]"))

    monkeypatch.setattr(up, "get", get)
    assert not await up._heard(run_file, "http://127.0.0.1:99/metrics", "admin")
    for body in (b"", b"null", b"[1]", b'[{"targets": 5}]', b"\xff"):
        answers["http://127.0.0.1:3/metrics"] = (200, body)
        assert not await up._heard(run_file, "http://127.0.0.1:99/metrics", "admin")
    answers["http://127.0.0.1:3/metrics"] = (200, row)
    assert await up._heard(run_file, "http://127.0.0.1:99/metrics", "admin")
    assert await up._heard(run_file, "", "admin")
