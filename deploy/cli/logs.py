"""Where the processes' output goes: a bounded file for each, and what matters, in short, to the terminal."""

import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO

MAX_FILE: Final = 8 * 1024 * 1024  # bytes; the file before it is kept as <name>.1
MAX_LINE: Final = 65_536  # bytes of one line; the rest of a longer one starts a new line
TAIL: Final = 8  # lines kept to show why a process ended
REPEAT_S: Final = 5.0  # the same words from several processes are shown once within this
MAX_SEEN: Final = 256

_SHOWN: Final = frozenset({"warning", "error", "critical", "fatal"})
_BRIEF: Final = frozenset({"ts", "level", "role", "instance", "msg", "requestId", "logger", "pid", "exception"})


class LogFile:
    """Append-only, at most twice MAX_FILE bytes with its predecessor. Written whole lines at a time.

    Opening it may raise OSError; once open, what a full disk does not take is lost: the process goes on.
    """

    def __init__(self, path: Path, limit: int = MAX_FILE) -> None:
        self.path = path
        self._limit = limit
        self._rotate()

    def _rotate(self) -> None:
        if self.path.exists():
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        self._file = self.path.open("wb", buffering=0)
        self._size = 0

    def write(self, lines: bytes) -> None:
        """Append."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: it could not be opened anew
            if self._size + len(lines) > self._limit and self._size:
                self._file.close()
                self._rotate()
            self._file.write(lines)
            self._size += len(lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Screen:
    """The terminal: one short line per warning, repeated ones of several processes once."""

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out: TextIO | None = sys.stderr if out is None else out
        self._clock = clock
        self._seen: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line, whatever it is; a terminal that is gone is no reason to stop."""
        if self._out is None:
            return
        try:
            print(text, file=self._out, flush=True)
        except (OSError, ValueError):  # ValueError: closed
            self._out = None

    def line(self, name: str, raw: bytes) -> None:
        """One line of a process: warnings and worse in short form; what is not JSON (a traceback) as it stands."""
        text = raw.decode("utf-8", "replace").rstrip()
        if not text:
            return
        record = _record(text)
        if record is None:
            self._once(text, f"{name} | {text}")
        elif str(record.get("level", "")).lower() in _SHOWN:
            more = " ".join(f"{key}={value}" for key, value in record.items() if key not in _BRIEF)
            why = str(record.get("exception") or "").rstrip().rpartition("\n")[2].strip()
            short = " ".join(filter(None, (str(record.get("level")).lower(), str(record.get("msg", "")), more, why)))
            self._once(short, f"{name} | {short}")

    def _once(self, words: str, line: str) -> None:
        now = self._clock()
        if now - self._seen.get(words, -REPEAT_S) < REPEAT_S:
            return
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen[words] = now
        self.say(line)


def _record(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Output(asyncio.Protocol):
    """The read end of a process's stdout and stderr. `on_line` None: to the file only (servers)."""

    def __init__(self, file: LogFile, on_line: Callable[[bytes], None] | None) -> None:
        self._file = file
        self._on_line = on_line
        self._rest = b""
        self.tail: deque[bytes] = deque(maxlen=TAIL)
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Whole lines to the file at once, the last half line waits."""
        lines, mark, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        if mark:
            self._take(lines + mark)
        if len(self._rest) > MAX_LINE:
            self._take(self._rest + b"\n")
            self._rest = b""

    def _take(self, lines: bytes) -> None:
        self._file.write(lines)
        for line in lines.splitlines():
            self.tail.append(line)
            if self._on_line is not None:
                self._on_line(line)

    def connection_lost(self, _: Exception | None) -> None:
        """The process closed it, or ended."""
        if self._rest:
            self._take(self._rest + b"\n")
        if not self.ended.done():
            self.ended.set_result(None)
