"""A fresh clone and its first command, with nothing but a Python (acceptance 1). Needs a package index: CI runs it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy import servers
from deploy.cli import procfile
from tests.e2e.rig import clean_env
from tests.e2e.sim import until

pytestmark = pytest.mark.interop


def clone(target: Path) -> None:
    """What git would bring: the tracked files as they stand here, and those that are about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=procfile.ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source, copy = procfile.ROOT / name, target / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def start(folder: Path, env: dict[str, str], *options: str) -> "tuple[subprocess.Popen[bytes], Path]":
    out = folder / "up.out"
    with out.open("wb") as sink:
        command = ["./deploy/up", "--port", str(servers.free_port()), *options]
        return subprocess.Popen(command, cwd=folder, env=env, stdout=sink, stderr=sink, start_new_session=True), out


def ready(process: "subprocess.Popen[bytes]", out: Path, within: float) -> float:
    """Seconds until it was."""
    began = time.monotonic()
    until(out.read_text, lambda text: "is ready on" in text or process.poll() is not None, within)
    assert "is ready on" in out.read_text(), out.read_text()
    return time.monotonic() - began


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_fresh_clone(tmp_path: Path) -> None:
    """`./deploy/up` makes its environment, once; the second start is ready in 2 s and touches no pip; the environment
    works when it is activated; a moved clone makes a new one."""
    folder = tmp_path / "a clone"
    clone(folder)
    kept = {name: value for name, value in clean_env().items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
    # Any Python, but not one of an environment in which everything is installed already.
    env = {**kept, "PATH": os.defpath, "HOTPATH_PYTHON": str(Path(sys.base_prefix) / "bin" / "python3")}
    process, out = start(folder, env)
    ready(process, out, 240)
    stop(process)
    assert "installing requirements.txt" in out.read_text()
    process, out = start(folder, env)
    took = ready(process, out, 20)
    print(f"second start: {took:.2f} s")
    assert took <= 2
    assert "installing" not in out.read_text()
    activated = ". .venv/bin/activate && hotpath version --json && hotpath keys list"
    subprocess.run(["sh", "-c", activated], cwd=folder, env=env, check=True, timeout=20, capture_output=True)
    stop(process)


def test_no_python(tmp_path: Path) -> None:
    """It is said what is missing."""
    env = {"PATH": str(tmp_path)}
    for tool in ("dirname", "cksum", "cat", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    folder = tmp_path / "clone"
    (folder / "deploy").mkdir(parents=True)
    for name in ("up", "venv.sh", "requirements.txt"):
        shutil.copy(procfile.ROOT / "deploy" / name, folder / "deploy" / name)
    done = subprocess.run(["./deploy/up"], cwd=folder, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or newer" in done.stderr
