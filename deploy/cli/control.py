"""How other commands talk to a running `hotpath up`: a unix socket in its data directory, for its owner only.

One line of JSON asks, lines of JSON answer:

    -> {"restart": "provider"}
    <- {"say": "provider.1: starting a replacement of pid 12"}      any number, at least every 5 s
    <- {"done": [...]}  or  {"error": "..."}                         the last

Who cannot write a line in REQUEST_S, writes more than MAX_REQUEST bytes or is one too many is sent away.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

NAME: Final = "control.sock"
MAX_REQUEST: Final = 1024
MAX_ANSWER: Final = 65_536  # bytes of one line, for the client
REQUEST_S: Final = 5.0
SILENCE_S: Final = 30.0  # the client's patience: answers come every 5 s
MAX_CLIENTS: Final = 8
#: sun_path has 108 bytes on Linux, 104 elsewhere.
MAX_PATH: Final = 100

#: Takes a role and a taker of progress lines.
Restart = Callable[[str, Callable[[str], None]], Awaitable[Any]]


class Refused(Exception):
    """The other side says no; the message is its own."""


@contextlib.contextmanager
def address(data: Path) -> Iterator[str]:
    """The socket's path, short enough for the kernel whatever the directory's is. Raises OSError."""
    path = str(data / NAME)
    if len(os.fsencode(path)) <= MAX_PATH:
        yield path
        return
    if not Path("/proc/self/fd").is_dir():
        raise OSError(f"{data} is too long a path for a socket; choose a shorter --data DIR")
    directory = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{NAME}"
    finally:
        os.close(directory)


def bind(data: Path) -> socket.socket:
    """The listening socket, mode 0600 from its first moment. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(sock.fileno(), 0o600)  # what bind makes has the socket's own mode
        with address(data) as path:
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()  # of a supervisor that was killed: we hold the directory's lock
            sock.bind(path)
            Path(path).chmod(0o600)  # where fchmod has no such effect
        sock.listen(MAX_CLIENTS)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


class Control:
    """The supervisor's end."""

    def __init__(self, data: Path, restart: Restart) -> None:
        self._data = data
        self._restart = restart
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._serve, sock=bind(self._data), limit=MAX_REQUEST)

    async def close(self) -> None:
        """Nobody is served any more; what was asked is given up."""
        if self._server is None:
            return
        self._server.close()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            (self._data / NAME).unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) < MAX_CLIENTS:
            # a task of its own: when asyncio's is cancelled it complains
            task = asyncio.create_task(self._answer(reader, writer))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)
            await asyncio.wait({task})
        else:
            writer.write(json.dumps({"error": f"{MAX_CLIENTS} others are being served; try again"}).encode() + b"\n")
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(**fields: Any) -> None:
            if not writer.is_closing():
                writer.write(json.dumps(fields).encode() + b"\n")

        try:
            role = await _request(reader)
            answer(done=await self._restart(role, lambda text: answer(say=text)))
        except Refused as exc:
            answer(error=str(exc))
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(writer.drain(), REQUEST_S)


async def _request(reader: asyncio.StreamReader) -> str:
    """The role to restart. Raises Refused."""
    try:
        line = await asyncio.wait_for(reader.readline(), REQUEST_S)
        asked = json.loads(line)
    except (ValueError, TimeoutError, ConnectionError, RecursionError) as exc:  # ValueError: too long, or no JSON
        raise Refused("expected one line of JSON") from exc
    role = asked.get("restart") if isinstance(asked, dict) else None
    if not isinstance(role, str):
        raise Refused('expected {"restart": ROLE}')
    return role


def restart(data: Path, role: str, say: Callable[[str], None]) -> Any:
    """Ask the `hotpath up` of this directory to restart a role, and wait for it. Raises Refused, OSError."""
    nobody = f"no `hotpath up` runs on {data}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SILENCE_S)
        try:
            with address(data) as path:
                sock.connect(path)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as exc:
            raise Refused(nobody) from exc
        with contextlib.suppress(BrokenPipeError):  # sent away, and told why
            sock.sendall(json.dumps({"restart": role}).encode() + b"\n")
        with sock.makefile("rb") as lines:
            while line := lines.readline(MAX_ANSWER):
                answer = json.loads(line)
                if "say" in answer:
                    say(str(answer["say"]))
                elif "error" in answer:
                    raise Refused(str(answer["error"]))
                else:
                    return answer["done"]
    raise Refused(f"the `hotpath up` of {data} is ending; nothing more was restarted")
