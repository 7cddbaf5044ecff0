"""The socket by which `hotpath restart` reaches a running `hotpath up`, with hostile hands on it."""

import asyncio
import json
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import control
from deploy.cli.control import Control, Refused


class Door:
    """A Control whose restarts are scripted."""

    def __init__(self, data: Path) -> None:
        self.asked: list[str] = []
        self.held = asyncio.Event()
        self.held.set()
        self.control = Control(data, self.restart)

    async def restart(self, role: str, say: Callable[[str], None]) -> Any:
        self.asked.append(role)
        say(f"{role} begins")
        await self.held.wait()
        if role == "bad":
            raise Refused("no")
        return [{"name": role}]


async def raw(path: Path, data: bytes) -> list[Any]:
    """What comes back for these bytes."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    try:
        answer = await reader.read()
    except ConnectionResetError:  # not all of it was read
        answer = b""
    writer.close()
    return [json.loads(line) for line in answer.splitlines()]


async def test_the_socket_is_its_owners_and_answers_in_lines(tmp_path: Path) -> None:
    door = Door(tmp_path)
    (tmp_path / control.NAME).touch()  # left by a supervisor that was killed
    await door.control.open()
    path = tmp_path / control.NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await raw(path, b'{"restart": "guardian"}\n') == [
        {"say": "guardian begins"},
        {"done": [{"name": "guardian"}]},
    ]
    said: list[str] = []
    assert await asyncio.to_thread(control.restart, tmp_path, "routing", said.append) == [{"name": "routing"}]
    assert said == ["routing begins"]
    with pytest.raises(Refused, match="no"):
        await asyncio.to_thread(control.restart, tmp_path, "bad", said.append)
    await door.control.close()
    assert not path.exists()
    with pytest.raises(Refused, match="no `hotpath up` runs"):
        control.restart(tmp_path, "routing", said.append)


@pytest.mark.parametrize(
    "data",
    [
        b"\n", b"null\n", b"[]\n", b"{}\n", b'{"restart": 5}\n', b'{"restart": null}\n', b"\xff\xfe\n",
        b"[" * 900 + b"\n",
        b'{"restart": "' + b"x" * 5000 + b'"}\n', b"x" * 100_000, b'{"restart"',
    ],
)  # fmt: skip
async def test_hostile_words(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is restarted, one line says why, and the next one is served."""
    monkeypatch.setattr(control, "REQUEST_S", 0.2)
    door = Door(tmp_path)
    await door.control.open()
    answers = await raw(tmp_path / control.NAME, data)
    assert [list(answer) for answer in answers] == [["error"]] or len(data) > control.MAX_REQUEST
    assert door.asked == []
    assert (await raw(tmp_path / control.NAME, b'{"restart": "a"}\n'))[-1] == {"done": [{"name": "a"}]}
    await door.control.close()


async def test_one_too_many_is_sent_away(tmp_path: Path) -> None:
    """Who says nothing is cut after 5 s, and there are never more than a few of them."""
    door = Door(tmp_path)
    await door.control.open()
    path = tmp_path / control.NAME
    silent = [await asyncio.open_unix_connection(path) for _ in range(control.MAX_CLIENTS)]
    async with asyncio.timeout(5):
        while len(door.control._clients) < control.MAX_CLIENTS:
            await asyncio.sleep(0.01)
    for _ in range(20):  # whether it is sent away before it asks or after
        with pytest.raises(Refused, match="8 others are being served; try again"):
            await asyncio.to_thread(control.restart, tmp_path, "a", print)
    silent.pop()[1].close()
    async with asyncio.timeout(5):
        while len(door.control._clients) >= control.MAX_CLIENTS:
            await asyncio.sleep(0.01)
    assert (await raw(path, b'{"restart": "a"}\n'))[-1] == {"done": [{"name": "a"}]}
    for _, writer in silent:
        writer.close()
    await door.control.close()


async def test_a_client_that_leaves_does_not_stop_what_it_asked_for(tmp_path: Path) -> None:
    """Half a restart is worse than a whole one; and one that ends gives up what it was asked."""
    door = Door(tmp_path)
    door.held.clear()
    await door.control.open()
    _, writer = await asyncio.open_unix_connection(tmp_path / control.NAME)
    writer.write(b'{"restart": "a"}\n')
    async with asyncio.timeout(5):
        while not door.asked:
            await asyncio.sleep(0.01)
    writer.close()
    await asyncio.sleep(0.05)
    assert len(door.control._clients) == 1
    door.held.set()
    async with asyncio.timeout(5):
        while door.control._clients:
            await asyncio.sleep(0.01)
    door.held.clear()
    waiting = asyncio.create_task(asyncio.to_thread(control.restart, tmp_path, "b", lambda _: None))
    async with asyncio.timeout(5):
        while len(door.asked) < 2:
            await asyncio.sleep(0.01)
    await door.control.close()
    with pytest.raises(Refused, match="is ending"):
        await waiting


async def test_a_long_path(tmp_path: Path) -> None:
    """A socket's address has room for 108 bytes; a data directory may be deeper."""
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    door = Door(deep)
    await door.control.open()
    assert await asyncio.to_thread(control.restart, deep, "a", lambda _: None) == [{"name": "a"}]
    await door.control.close()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.connect(str(deep / control.NAME))
