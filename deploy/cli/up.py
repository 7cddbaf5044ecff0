"""`hotpath up`: the servers, every role of the Procfile and the simulator, on one machine, until Ctrl-C."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from deploy.cli import banner, control, credentials, fleet, procfile, roll, supervise
from deploy.cli.http import get
from deploy.cli.logs import Screen
from deploy.cli.runfile import RunFile
from shared.settings import Settings, SettingsError
from shared.settings import load as load_settings

LOCK_WAIT_S: Final = 20.0  # a killed supervisor's warden is still tidying up
BACKLOG: Final = 4096  # connections not yet accepted: a burst of 1,000 clients is no reason to refuse one
MAX_SCALE: Final = 64

_SCALE: Final = re.compile(r"([a-z][a-z0-9_-]*)=([0-9]{1,3})\Z")


def parser() -> argparse.ArgumentParser:
    """The options. argparse, because typer costs 80 ms of the two seconds a start may take."""
    parser = argparse.ArgumentParser(
        prog="hotpath up",
        description="Run everything on this machine: NATS, Redis (unless NATS_URL / REDIS_URL are set), every role of "
        "the Procfile, and the simulator unless HOTPATH_CATALOG or OPENAI_API_KEY is set. Ctrl-C drains and stops it.",
    )
    parser.add_argument("--port", type=int, help="where the gateway listens (default GATEWAY_PORT, else 8080; 0: any)")
    parser.add_argument(
        "--scale", default="", metavar="ROLE=N,...", help="processes per role, e.g. guardian=2,provider=2"
    )
    parser.add_argument("--data", default="", metavar="DIR", help="where secrets, logs, servers' files and run.json go")
    parser.add_argument("--no-simulator", action="store_true", help="start no simulator")
    parser.add_argument("--procfile", default="", metavar="FILE", help="another Procfile")
    return parser


def scale_of(text: str, roles: Mapping[str, object]) -> dict[str, int]:
    """`guardian=2,provider=2` as numbers. Raises ValueError for what is no role or not 0 to 64."""
    scale = dict.fromkeys(roles, 1)
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _SCALE.match(part)
        if match is None or int(match[2]) > MAX_SCALE:
            raise ValueError(f"--scale {part}: expected role=number (0 to {MAX_SCALE})")
        if match[1] not in roles:
            raise ValueError(f"--scale {part}: the Procfile has no {match[1]} (it has {', '.join(roles)})")
        scale[match[1]] = int(match[2])
    return scale


def listen(host: str, port: int) -> socket.socket:
    """The gateway's listening socket. Raises OSError with a message that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {exc.strerror}. Stop what listens there, or choose another: --port N"
        ) from exc
    listener.setblocking(False)
    return listener


def listen_admin(host: str, port: int, screen: Screen) -> socket.socket:
    """The admin API's. Whoever needs a fixed port is told that it is another one; a second Hotpath on this machine is
    no reason not to start. Raises OSError for an address that is not this machine's."""
    try:
        return listen(host, port)
    except OSError:
        found = listen(host, 0)
        screen.say(f"ADMIN_PORT {port} is taken: the admin API is on port {found.getsockname()[1]}")
        return found


def lock(data: Path, screen: Screen) -> int:
    """Lock the data directory. Raises OSError when another `hotpath up` runs on it."""
    end = time.monotonic() + LOCK_WAIT_S
    told = False
    while True:
        try:
            return supervise.open_lock(data / "lock")
        except BlockingIOError as exc:
            owner = (data / "lock").read_text("ascii").strip()
            if _alive(owner) or time.monotonic() > end:
                raise OSError(
                    f"another `hotpath up` (pid {owner}) runs on {data}. Stop it, or choose another: --data DIR"
                ) from exc
        if not told:
            screen.say(f"waiting for what `hotpath up` (pid {owner}) left running on {data} ...")
            told = True
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


async def _ready(url: str) -> bool:
    """GET /ready is 200."""
    status, _ = await get(url, "/ready")
    return status == 200


async def _heard(run_file: RunFile, metrics: str, key: str) -> bool:
    """Whether every ingress that answers has heard a beat of the process with this metrics URL."""
    where = urlsplit(metrics).netloc
    if not where:
        return True  # a command of the Procfile that is none of ours
    asked = [get(url, "/metrics/targets", key) for url in run_file.metrics["ingress"].values()]
    return all(status == 0 or where in _targets(body) for status, body in await asyncio.gather(*asked))


def _targets(body: bytes) -> set[str]:
    """The addresses of a Prometheus http_sd answer."""
    try:
        rows = json.loads(body)
        return {str(address) for row in rows for address in row["targets"]}
    except (ValueError, TypeError, KeyError):
        return set()


async def _open(door: control.Control) -> None:
    """Let `hotpath restart` in. Raises NotStarted."""
    try:
        await door.open()
    except OSError as exc:
        raise supervise.NotStarted(f"cannot open {control.NAME} in the data directory: {exc}") from exc


async def _run(plan: fleet.Plan, run_file: RunFile, screen: Screen, lock_fd: int, listener: socket.socket) -> int:
    supervisor = supervise.Supervisor(run_file, screen, lock_fd, listener)
    supervisor.on_signals()
    rolls = roll.Roll(supervisor, lambda metrics: _heard(run_file, metrics, plan.admin_key))

    async def restart(role: str, report: roll.Report) -> list[dict[str, Any]]:
        def say(text: str) -> None:
            screen.say(text)
            report(text)

        try:
            return await rolls.run(role, say)
        except roll.NotReplaced as exc:
            screen.say(f"restart {role}: {exc}")
            raise control.Refused(str(exc)) from exc

    door = control.Control(plan.data, restart)
    try:
        run_file.open()
        for spec in plan.specs:
            supervisor.start(spec)
        ready = await supervisor.wait_ready(lambda: _ready(plan.url))
        if ready:
            await _open(door)
            print(await banner.text(plan), flush=True)
            await supervisor.leaving.wait()
        screen.say("draining and stopping everything (again: at once) ...")
    except supervise.NotStarted as exc:
        screen.say(f"hotpath up: {exc}")
        return exc.code
    finally:
        await door.close()
        await supervisor.stop()
    return 0


def prepare(
    arguments: argparse.Namespace, env: Mapping[str, str], data: Path, listener: socket.socket, admin: socket.socket
) -> fleet.Plan:
    """Decide and write everything that is needed before the first process starts."""
    (data / "logs").mkdir(exist_ok=True)
    secrets = credentials.ensure(data / "secrets.env", env)
    roles = procfile.parse(Path(arguments.procfile or procfile.ROOT / "Procfile").read_text("utf-8"))
    return fleet.plan(
        env=env, data=data, secrets=secrets, listener=listener, admin=admin, roles=roles,
        scale=scale_of(arguments.scale, roles), simulator=not arguments.no_simulator,
    )  # fmt: skip


def _settings(env: Mapping[str, str], arguments: argparse.Namespace) -> Settings:
    """The settings, checked before anything is made; secrets that are not given are generated later."""
    stand_in = {name: f"{name}_".ljust(40, "x") for name in credentials.SETTINGS if name not in env}
    port = {} if arguments.port is None else {"GATEWAY_PORT": str(arguments.port)}
    return load_settings({**env, **stand_in, **port})


def main(words: list[str], env: Mapping[str, str] | None = None) -> int:
    """Run until told to stop; the exit code. 78: settings or catalogue are wrong; 1: something else was."""
    env = dict(os.environ if env is None else env)
    arguments = parser().parse_args(words)
    screen = Screen()
    with contextlib.ExitStack() as stack:
        try:
            settings = _settings(env, arguments)
            data = Path(arguments.data or settings.hotpath_data).resolve()
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock_fd = lock(data, screen)
            stack.callback(os.close, lock_fd)
            listener = stack.enter_context(listen(settings.gateway_host, settings.gateway_port))
            admin = stack.enter_context(listen_admin(settings.admin_host, settings.admin_port, screen))
            plan = prepare(arguments, env, data, listener, admin)
        except SettingsError as exc:
            screen.say(f"hotpath up: {exc}")
            return 78
        except (OSError, ValueError, procfile.ProcfileError, fleet.Missing) as exc:
            screen.say(f"hotpath up: {exc}")
            return 1
        run_file = RunFile(data / "run.json", plan.run_fields())
        return asyncio.run(_run(plan, run_file, screen, lock_fd, listener))


def entry() -> Any:
    """`hotpath up` from the console script."""
    sys.exit(main(sys.argv[2:]))
