"""Several builds on one NATS and one Redis: another commit's tree beside this, processes of both (faults 83)."""

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import pytest
from msgspec import Struct

from deploy import servers
from deploy.cli import confs, credentials, fleet
from deploy.cli.procfile import ROOT
from shared.settings import load as load_settings
from tests.e2e.rig import clean_env
from tests.e2e.sim import Sim

MODULES: Final = {role: "ingress" if role == "ingress" else f"workers.{role}" for role in credentials.ROLES}
READY_S: Final = 20.0
END_S: Final = 15.0


def tree_of(commit: str, directory: Path) -> Path:
    """The commit's tree, unpacked. Skips the test, saying why, where there is no such commit."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no older build to run beside this one")
    name = subprocess.run([git, "rev-parse", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True)  # noqa: PLW1510
    if name.returncode != 0:
        pytest.skip(f"{commit} is not in this clone (a shallow one? git fetch --unshallow): {name.stderr.strip()}")
    packed = subprocess.run(
        [git, "archive", name.stdout.strip(), "ingress", "workers", "shared", "deploy"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(directory, filter="data")
    where = [sys.executable, "-c", "import shared; print(shared.__file__)"]
    found = subprocess.run(where, cwd=directory, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(directory), f"it would run {found}, not the older tree"
    return directory


class Running(Struct, frozen=True):
    """One process that said it is ready."""

    build: str  # "old" or "new"
    role: str
    instance: str
    metrics: str
    process: "subprocess.Popen[bytes]"
    log: Path


class Fleet:
    """Embedded servers with the users of today, and processes of either tree. A context manager: all end with it."""

    def __init__(self, directory: Path, sim: Sim, old: Path, **settings: str) -> None:
        self.trees = {"old": old, "new": ROOT}
        self.running: list[Running] = []
        self.nats_log = directory / "logs" / "nats.log"
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._secrets = credentials.ensure(directory / "secrets.env", {})
        self.ports = {build: servers.free_port() for build in self.trees}
        self._nats, self._redis = servers.free_port(), servers.free_port()
        self.loadgen_url = fleet.embedded_nats_url("loadgen", self._secrets, self._nats)
        self.env = clean_env(settings) | {name: self._secrets[name] for name in credentials.SETTINGS}
        self.env |= {
            "HOTPATH_DATA": str(directory), "HOTPATH_CATALOG": str(confs.sim_catalog(directory, sim.url)),
            "NATS_URL": fleet.embedded_nats_url("operator", self._secrets, self._nats),
            "REDIS_URL": f"redis://127.0.0.1:{self._redis}/0",
        }  # fmt: skip

    def __enter__(self) -> Self:
        max_body = load_settings(self.env).max_body_bytes
        conf = confs.nats_conf(self._directory, "127.0.0.1", self._nats, self._secrets, max_body)
        out = self._directory / "servers.log"
        with self._stack as stack:
            stack.enter_context(servers.running(servers.nats_command(conf), self._nats, out))
            valkey = servers.valkey_command(self._directory / "redis", self._redis)
            stack.enter_context(servers.running(valkey, self._redis, out))
            stack.callback(lambda: self.stop(list(self.running)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ---- processes

    def start(self, build: str, *roles: str) -> list[Running]:
        """One process of each role, started at once, ready."""
        starting = [self._launch(build, role) for role in roles]
        return [self._ready(*each) for each in starting]

    def _launch(self, build: str, role: str) -> tuple[str, str, int, "subprocess.Popen[bytes]", Path]:
        """The builds before decision 15 know no user per role and connect as whoever NATS_URL names."""
        env = dict(self.env)
        if build == "new":
            env |= fleet.role_nats_urls(self._secrets, self._nats)
            env = fleet.own_env(role, env, (), ())
        read, write = os.pipe()
        env |= {"HOTPATH_READY_FD": str(write), "GATEWAY_PORT": str(self.ports[build]), "ADMIN_PORT": "0"}
        log = self._directory / "logs" / f"{build}.{role}.{len(self.running)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULES[role]], cwd=self.trees[build], env=env, pass_fds=(write,),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        os.close(write)
        return build, role, read, process, log

    def _ready(self, build: str, role: str, read: int, process: "subprocess.Popen[bytes]", log: Path) -> Running:
        end, got = time.monotonic() + READY_S, b""
        with contextlib.closing(os.fdopen(read, "rb", buffering=0)) as pipe:
            while not got.endswith(b"\n"):
                assert time.monotonic() < end, f"{build} {role} was not ready:\n{log.read_text()}"
                if select.select([pipe], [], [], 0.1)[0]:
                    piece = pipe.read(4096)
                    assert piece, f"{build} {role} ended with {process.wait(5)}:\n{log.read_text()}"
                    got += piece
        told = json.loads(got)
        made = Running(build, role, told["instance"], told["metrics"], process, log)
        self.running.append(made)
        return made

    def stop(self, which: list[Running]) -> None:
        """SIGTERM, all at once, and wait. Raises AssertionError when one does not drain and end well."""
        for one in which:
            self.running.remove(one)
            one.process.send_signal(signal.SIGTERM)
        late = []
        for one in which:
            try:
                code = one.process.wait(END_S)
            except subprocess.TimeoutExpired:
                one.process.kill()
                code = one.process.wait()
            if code:
                late.append((one.build, one.role, code, one.log.read_text()[-2000:]))
        assert not late, late

    # ---- command line, of either tree

    def cli(self, *words: str, build: str = "new") -> Any:
        """`hotpath WORDS... --json`: its JSON."""
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *words, "--json"], cwd=self.trees[build], env=self.env,
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (build, words, done.stderr)
        return json.loads(done.stdout)

    # ---- what they say

    def builds(self) -> dict[str, str]:
        """Which build each live instance is of."""
        return {one.instance: one.build for one in self.running}

    def complaints(self) -> Iterator[str]:
        """Lines of level error, from any process that ever ran here."""
        for log in sorted((self._directory / "logs").glob("*.*.*.log")):
            for line in log.read_text().splitlines():
                if not line.startswith("{") or json.loads(line)["level"] in {"error", "critical"}:
                    yield f"{log.name}: {line}"
