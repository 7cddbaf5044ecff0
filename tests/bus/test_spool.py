"""The spool: on disk before anybody goes on, taken over from the dead, published once, damage told (DESIGN 4)."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus import spool as module
from shared.bus.spool import Collector, Spool, SpoolFailed, frame


class Stream:
    """What a collector publishes to."""

    def __init__(self) -> None:
        self.away = False
        self.stored: list[bytes] = []

    async def publish(self, payload: bytes) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise ConnectionError
        self.stored.append(payload)


def collector(directory: Path, stream: Stream) -> Collector:
    return Collector(directory, stream.publish, ConnectionError)


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    made = Spool(tmp_path / "spool", "inst")
    yield made
    await made.close()


async def test_what_is_appended_is_published_once_and_the_file_is_gone(spool: Spool, tmp_path: Path) -> None:
    stream = Stream()
    taking = collector(tmp_path / "spool", stream)
    await taking.collect()  # there is no folder yet
    await asyncio.gather(*(spool.append(b"%d" % number) for number in range(200)))
    await taking.collect()
    assert stream.stored == []  # its owner lives, and holds the lock
    spool.let_go()
    await taking.collect()
    assert stream.stored == [b"%d" % number for number in range(200)]
    await spool.append(b"later")
    spool.let_go()
    await taking.collect()
    assert stream.stored[200:] == [b"later"]
    assert list((tmp_path / "spool").iterdir()) == []
    await taking.close()


async def test_a_stream_that_is_away_gets_it_later_from_where_it_stopped(spool: Spool, tmp_path: Path) -> None:
    stream, other = Stream(), Stream()
    for number in range(2 * module.TURN_FRAMES):
        await asyncio.wait_for(spool.append(b"%d" % number), 5)
    spool.let_go()
    stream.away = True
    taking, idle = collector(tmp_path / "spool", stream), collector(tmp_path / "spool", other)
    await taking.collect()
    await idle.collect()
    assert other.stored == []  # somebody has the lock already
    stream.away = False
    await taking.collect()
    assert len(stream.stored) == 2 * module.TURN_FRAMES
    await taking.close()
    await idle.close()


_WRITER = """
import asyncio, sys
from pathlib import Path
from shared.bus.spool import Spool

async def main():
    spool = Spool(Path(sys.argv[1]), "dead")
    for number in range(1_000_000):
        await spool.append(b"%d" % number)
        print(number, flush=True)

asyncio.run(main())
"""


async def test_what_a_killed_process_wrote_is_taken_over(tmp_path: Path) -> None:
    """Every append that returned is there, although its process was killed in the midst of another."""
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        while writer.stdout.readline() != b"50\n":
            pass
        stream = Stream()
        taking = collector(tmp_path, stream)
        await taking.collect()
        assert stream.stored == []
        writer.send_signal(signal.SIGKILL)
        told = 50 + len(writer.stdout.read().splitlines())
        writer.wait()
    await taking.collect()
    assert stream.stored == [b"%d" % number for number in range(len(stream.stored))]
    assert len(stream.stored) in (told + 1, told + 2)  # the last may not have been told
    assert list(tmp_path.iterdir()) == []
    await taking.close()


@pytest.mark.parametrize("tail", [*(frame(b"four")[:cut] for cut in (1, 7, 8, 11)), b"\0" * 4096])
async def test_a_torn_tail_is_dropped(tmp_path: Path, tail: bytes) -> None:
    """Zeros are what a power cut leaves where the size reached the disk and the bytes did not."""
    (tmp_path / "dead.1").write_bytes(frame(b"one") + tail)
    stream = Stream()
    taking = collector(tmp_path, stream)
    await taking.collect()
    assert stream.stored == [b"one"]
    assert list(tmp_path.iterdir()) == []
    await taking.close()


async def test_a_last_frame_with_wrong_bytes_is_torn_too(tmp_path: Path) -> None:
    """The length reached the disk, the bytes did not: a power cut may leave zeros."""
    (tmp_path / "dead.1").write_bytes(frame(b"one") + frame(b"four")[:-2] + b"\0\0")
    stream = Stream()
    taking = collector(tmp_path, stream)
    await taking.collect()
    assert stream.stored == [b"one"]
    assert list(tmp_path.iterdir()) == []
    await taking.close()


async def test_damage_in_the_midst_is_set_aside_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = frame(b"one") + frame(b"two") + frame(b"three")
    (tmp_path / "dead.1").write_bytes(whole[:19] + b"X" + whole[20:])
    (tmp_path / "dead.2").write_bytes(frame(b"four"))
    stream = Stream()
    taking = collector(tmp_path, stream)
    await taking.collect()
    assert stream.stored == [b"one", b"four"]
    assert [path.name for path in tmp_path.iterdir()] == ["dead.1.damaged"]
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    await taking.collect()
    await taking.close()


async def test_a_disk_that_is_full_says_so_and_takes_again_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails half-way leaves nothing torn in front of what comes later."""
    spool = Spool(tmp_path, "inst")
    await spool.append(b"one")
    real, full = os.write, True

    def write(descriptor: int, data: bytes) -> int:
        if not full:
            return real(descriptor, data)
        if len(data) > 3:
            return real(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    for _ in range(3):
        with pytest.raises(SpoolFailed, match="No space"):
            await spool.append(b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["inst.1"]  # not one for each try
    full = False
    await spool.append(b"three")
    await spool.close()
    stream = Stream()
    taking = collector(tmp_path, stream)
    await taking.collect()
    assert sorted(stream.stored) == [b"one", b"three"]
    await taking.close()


async def test_nobody_goes_on_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile shares the next fsync; a disk that hangs is as good as none."""
    real, may, calls = os.fsync, threading.Event(), []

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            calls.append(os.fstat(descriptor).st_size)
            may.wait(5)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    spool = Spool(tmp_path, "inst")
    first = asyncio.ensure_future(spool.append(b"one"))
    async with asyncio.timeout(5):
        while not calls:
            await asyncio.sleep(0.005)
    others = [asyncio.ensure_future(spool.append(b"%d" % number)) for number in range(20)]
    await asyncio.sleep(0.05)
    assert not first.done()
    may.set()
    await asyncio.gather(first, *others)
    assert len(calls) == 2
    monkeypatch.setattr(module, "APPEND_S", 0.05)
    may.clear()
    with pytest.raises(SpoolFailed, match="in time"):
        await spool.append(b"x")
    may.set()
    await spool.close()


async def test_a_file_that_another_one_has_just_deleted_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening and the lock its owner published it and deleted it."""
    (tmp_path / "dead.1").write_bytes(frame(b"one"))
    real = module._lock

    def lock(descriptor: int) -> bool:
        (tmp_path / "dead.1").unlink(missing_ok=True)
        return real(descriptor)

    monkeypatch.setattr(module, "_lock", lock)
    stream = Stream()
    taking = collector(tmp_path, stream)
    await taking.collect()
    assert stream.stored == []
    await taking.close()


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spool = Spool(tmp_path / "file" / "spool", "inst")
    with pytest.raises(SpoolFailed):
        await spool.append(b"x")
    await spool.close()
