"""What JetStream does not take either: appended to a file, on disk before anybody goes on, published by whoever lives.

    SPOOL_DIR/<instance>.<number>     frames: length and CRC-32 (little-endian, 4 bytes each), then the payload

A file belongs to the process that holds its lock (flock), which the kernel frees when that process dies. `Spool` writes
one; `Collector` takes every file whose lock is free, at boot and each second, publishes what it holds and deletes it.
A process that is well lets go of its own file once the stream is there again, so there is one road only. What is
published twice (a collector died between) is told apart by the records' readers.

A torn tail was never acknowledged to anybody, so it is dropped. Damage in the midst of a file is not ours to judge: the
file is set aside as `<name>.damaged`, and the log says so.
"""

import asyncio
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

#: A frame is one message of the bus.
MAX_FRAME: Final = 64 * 1024 * 1024
#: A file is let go of, and another begun, beyond this.
ROTATE_BYTES: Final = 64 * 1024 * 1024
#: What one turn of a collector holds in memory, and publishes at once.
TURN_BYTES: Final = 1024 * 1024
TURN_FRAMES: Final = 64
LOOK_S: Final = 1.0
#: A disk that takes longer is as good as none: the record is kept in memory then.
APPEND_S: Final = 2.0
DAMAGED: Final = ".damaged"

_HEAD: Final = struct.Struct("<II")

_log: Final = logging.getLogger("hotpath.spool")


class SpoolFailed(Exception):
    """The disk did not take it (full, not writable, too slow)."""


def frame(payload: bytes) -> bytes:
    """One frame."""
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


class Frames(Struct, frozen=True):
    """What a part of a file holds: whole frames, and where the next one begins."""

    payloads: list[bytes]
    end: int
    damaged: bool  # what follows is no frame, and no torn tail either


def read(descriptor: int, offset: int) -> Frames:
    """The frames from `offset` on, a turn's worth. Raises OSError."""
    size = os.fstat(descriptor).st_size
    payloads: list[bytes] = []
    held = 0
    while len(payloads) < TURN_FRAMES and held < TURN_BYTES:
        head = os.pread(descriptor, _HEAD.size, offset)
        if len(head) < _HEAD.size:
            return Frames(payloads, offset, damaged=False)
        length, crc = _HEAD.unpack(head)
        end = offset + _HEAD.size + length
        # torn (of nothing but zeros, where the power went), unless it claims what no writer of ours writes
        if not length or length > MAX_FRAME or end > size:
            return Frames(payloads, offset, damaged=length > MAX_FRAME)
        payload = os.pread(descriptor, length, offset + _HEAD.size)
        if zlib.crc32(payload) != crc:
            return Frames(payloads, offset, damaged=end < size)
        payloads.append(payload)
        held += length
        offset = end
    return Frames(payloads, offset, damaged=False)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _File:
    """The file that is written: one thread at a time is in it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError. It gets its name once we have its lock: a collector takes what bears one."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = path
        unnamed = path.with_name(f".{path.name}")
        self.descriptor = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(path)
            _sync_directory(path.parent)
        except OSError:
            os.close(self.descriptor)
            raise

    def append(self, data: bytes) -> None:
        """On disk when it returns. Raises OSError: a part of it may be there, and nothing may come behind it."""
        written = 0
        while written < len(data):
            written += os.write(self.descriptor, data[written:])
        os.fsync(self.descriptor)
        self.size += len(data)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Spool:
    """Of one process; makes its file when something is first appended."""

    def __init__(self, directory: Path, instance: str) -> None:
        self._directory = directory
        self._instance = instance
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._file: _File | None = None
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self.appended = 0

    async def append(self, payload: bytes) -> None:
        """Returns once it is on disk; what comes meanwhile shares the next fsync. Raises SpoolFailed."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((frame(payload), done))
        if self._writer is None:
            self._writer = self._loop.create_task(self._write())
        try:
            async with asyncio.timeout(APPEND_S):
                await done
        except TimeoutError as error:  # it may reach the disk yet: told apart by who reads it
            raise SpoolFailed("the disk did not take it in time") from error
        except OSError as error:
            raise SpoolFailed(str(error)) from error
        self.appended += 1

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                fault: OSError | None = None
                try:
                    await asyncio.to_thread(self._put, b"".join(data for data, _ in batch))
                except OSError as error:
                    fault = error
                for _, done in batch:
                    if done.done():
                        continue
                    if fault is None:
                        done.set_result(None)
                    else:
                        done.set_exception(fault)
                if self._file is not None and self._file.size >= ROTATE_BYTES:
                    self._close()
        finally:
            self._writer = None

    def _put(self, data: bytes) -> None:
        """In a thread. Raises OSError."""
        if self._file is None:
            self._number += 1
            self._file = _File(self._directory / f"{self._instance}.{self._number}")
        try:
            self._file.append(data)
        except OSError:
            if not self._file.size:  # nobody was told that it holds anything; a full disk would have one for each try
                self._file.path.unlink(missing_ok=True)
            self._close()  # whoever reads it stops where it is torn
            raise

    def let_go(self) -> None:
        """Leave what was written to the collectors, this process's own first."""
        if self._writer is None:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file.descriptor)
            self._file = None

    async def close(self) -> None:
        """The same at the end."""
        if self._writer is not None:
            await self._writer
        self._close()


class _Taken(Struct):
    """A file whose lock we have, and how far it is published."""

    path: Path
    descriptor: int
    offset: int = 0


class Collector:
    """Publishes what lies in a directory. `publish(payload)` returns once it is stored, or raises one of `faults`."""

    def __init__(
        self, directory: Path, publish: Callable[[bytes], Awaitable[object]], faults: type[Exception],
        before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`before` is called before each look: a process lets go of its own file."""
        self._directory = directory
        self._publish = publish
        self._faults = faults
        self._before = before
        self._taken: dict[str, _Taken] = {}
        self._task: asyncio.Task[None] | None = None
        self.collected = 0

    def start(self) -> None:
        """Look now, and each second."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Leave what is not published to others."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for taken in self._taken.values():
            os.close(taken.descriptor)
        self._taken.clear()

    async def _run(self) -> None:
        while True:
            self._before()
            try:
                await self.collect()
            except OSError as error:
                _log.warning("the spool cannot be read", extra={"error": str(error)})
            await asyncio.sleep(LOOK_S)

    async def collect(self) -> None:
        """Publish every file whose lock is free, as far as the stream takes it. Raises OSError."""
        for taken in await asyncio.to_thread(self._take):
            if not await self._empty(taken):
                return

    def _take(self) -> list[_Taken]:
        """In a thread: the files that are ours now, oldest first."""
        for path in _files(self._directory):
            if path.name not in self._taken and (descriptor := _open_free(path)) is not None:
                self._taken[path.name] = _Taken(path, descriptor)
        return list(self._taken.values())

    async def _empty(self, taken: _Taken) -> bool:
        """Publish one file and delete it; False when the stream takes no more for now."""
        while True:
            found = await asyncio.to_thread(read, taken.descriptor, taken.offset)
            results = await asyncio.gather(*map(self._publish, found.payloads), return_exceptions=True)
            for result in results:
                if isinstance(result, self._faults):
                    return False
                if isinstance(result, BaseException):
                    raise result
            self.collected += len(results)
            taken.offset = found.end
            if not found.payloads or found.damaged:
                break
        del self._taken[taken.path.name]
        await asyncio.to_thread(self._remove, taken, found.damaged)
        if found.damaged:
            _log.critical("a spool file is damaged: set aside", extra={"file": taken.path.name, "offset": found.end})
        return True

    @staticmethod
    def _remove(taken: _Taken, damaged: bool) -> None:
        if damaged:
            taken.path.rename(taken.path.with_name(taken.path.name + DAMAGED))
        else:
            taken.path.unlink(missing_ok=True)
        os.close(taken.descriptor)


def _files(directory: Path) -> Iterator[Path]:
    """The oldest first."""
    try:
        found = [entry for entry in os.scandir(directory) if _is_spool(entry)]
        yield from (directory / entry.name for entry in sorted(found, key=lambda each: each.stat().st_mtime))
    except FileNotFoundError:
        return


def _is_spool(entry: "os.DirEntry[str]") -> bool:
    return entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(DAMAGED)


def _open_free(path: Path) -> int | None:
    """The descriptor of a file whose lock we got; None when somebody else has it, or has deleted it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if _lock(descriptor):
        try:
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except OSError:
            pass  # deleted between: by the one who had published it
    os.close(descriptor)
    return None
