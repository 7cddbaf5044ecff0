"""Server-sent events: a bounded incremental parser and an encoder that cannot break a line (WHATWG HTML 9.2.6, S0-10).

The parser takes bytes as they were read and gives the payloads of `data:` lines, one per event. How the bytes were cut
makes no difference to what comes out (I11). Event names, ids and retry times are read past: each dialect repeats in
its JSON what it says in `event:`. An endless line or event costs at most `MAX_EVENT` bytes: then `failed` is set and
nothing more is read. Fragments of a line are kept in a list and joined once, so that a line in a thousand pieces costs
no thousand copies.
"""

from typing import Final

import msgspec
import orjson

#: Bytes of one event, its line ends not counted. Larger than any chunk a provider documents, small enough for 1000
#: streams at once (faults 66, 132).
MAX_EVENT: Final = 1_048_576
#: Bytes of what is not an event stream but may be an error in plain JSON, kept to be read (faults 129, 131).
MAX_STRAY: Final = 65_536

_BOM: Final = b"\xef\xbb\xbf"


class NotJson(ValueError):
    """The bytes are not JSON: they cannot be written as an event."""


def encode(data: bytes) -> bytes:
    """One event of a JSON payload: `data: {...}` and a blank line, without a bare CR or LF inside (S0-10).

    JSON that came with line ends between its tokens is written again without them. Raises NotJson for bytes with a
    line end that are not JSON.
    """
    if b"\n" in data or b"\r" in data:
        try:
            orjson.loads(data)  # strict where msgspec's formatter is not: UTF-8 inside strings
            data = msgspec.json.format(data, indent=-1)
        except (ValueError, RecursionError) as exc:
            raise NotJson(str(exc)) from exc
    return b"data: " + data + b"\n\n"


class Parser:
    """The events of one stream. `feed` bytes, take payloads; after the last bytes ask `rest()`."""

    __slots__ = (
        "_after_cr",
        "_data",
        "_head",
        "_parts",
        "_parts_size",
        "_size",
        "_started",
        "_stray",
        "_stray_size",
        "failed",
        "limit",
    )

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self.limit = limit
        self.failed = False  # an event was over the limit: nothing after it is read
        self._started = False  # the place for a byte order mark is past
        self._head = b""  # up to two bytes that may become one
        self._after_cr = False  # the last line ended in CR: an LF that follows belongs to it
        self._parts: list[bytes] = []  # the pieces of an unfinished line
        self._parts_size = 0
        self._data: list[bytes] = []  # the `data:` lines of an unfinished event
        self._size = 0  # bytes of the finished lines of that event
        self._stray: list[bytes] = []
        self._stray_size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads of the events these bytes complete. When `failed` is set after it, there will be no more."""
        if (
            self._started
            and not self._parts
            and not self._size
            and not self._after_cr
            and chunk[-2:] == b"\n\n"
            and b"\r" not in chunk
            and len(chunk) <= self.limit
            and not self.failed
        ):
            return self._feed_whole(chunk)
        return self._feed_any(chunk)

    def _feed_whole(self, chunk: bytes) -> list[bytes]:
        """The common case: one read, whole events, LF."""
        if chunk[:6] == b"data: " and chunk.find(b"\n") == len(chunk) - 2:
            return [chunk[6:-2]]
        found = []
        for event in chunk[:-2].split(b"\n\n"):
            if event[:6] == b"data: " and b"\n" not in event:
                found.append(event[6:])
            else:
                for line in event.split(b"\n"):
                    self._line(line, found)
                self._line(b"", found)
        return found

    def _feed_any(self, chunk: bytes) -> list[bytes]:
        found: list[bytes] = []
        if not self._started:
            chunk = self._head + chunk
            if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                self._head = chunk
                return found
            self._started = True
            self._head = b""
            chunk = chunk.removeprefix(_BOM)
        if not chunk or self.failed:
            return found
        if self._after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
        self._after_cr = chunk[-1:] == b"\r" if chunk else False
        lines = (chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in chunk else chunk).split(b"\n")
        tail = lines.pop()
        for line in lines:
            if self._parts:
                self._parts.append(line)
                line = b"".join(self._parts)  # noqa: PLW2901 - the line, now whole
                self._parts.clear()
                self._parts_size = 0
            self._line(line, found)
            if self.failed:
                return found
        if tail:
            self._parts.append(tail)
            self._parts_size += len(tail)
            if self._size + self._parts_size > self.limit:
                self._fail()
        return found

    def _line(self, line: bytes, found: list[bytes]) -> None:
        if not line:
            if self._data:
                found.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data.clear()
            self._size = 0
            return
        self._size += len(line)
        if self._size > self.limit:
            self._fail()
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value[1:] if value[:1] == b" " else value)
        elif line[:1] == b"{" or self._stray:
            self._keep_stray(line)

    def _keep_stray(self, line: bytes) -> None:
        self._stray_size += len(line)
        if self._stray_size <= MAX_STRAY:
            self._stray.append(line)

    def _fail(self) -> None:
        self.failed = True
        self._parts.clear()
        self._data.clear()
        self._stray.clear()

    def rest(self) -> bytes:
        """At the end of the bytes: the payload of an event that lacks its blank line, b"" when there is none.

        The specification drops it; a provider that closed after its last chunk meant it (faults 120).
        """
        if self.failed:
            return b""
        line = b"".join(self._parts)
        name, _, value = line.partition(b":")
        lines = self._data
        if name == b"data":
            lines = [*lines, value[1:] if value[:1] == b" " else value]
        return b"\n".join(lines)

    def stray(self) -> bytes:
        """At the end of the bytes: the lines that look like JSON outside of any event, b"" when there are none."""
        last = b"".join(self._parts)
        lines = [*self._stray, last] if last[:1] == b"{" or (self._stray and last) else self._stray
        return b"\n".join(lines) if self._stray_size + len(last) <= MAX_STRAY else b""
