"""Where each request on a connection begins and ends, read ahead of the parser, and the bounds it does not set. Pure.

llhttp refuses what is malformed; it bounds neither a chunk's extension, nor the number of chunks, nor a head as a whole
(128 fields of 8 KiB each). What is counted here is refused before the parser sees a byte of it. A request whose head
and body came in one piece, as nearly all do, costs two searches in the head: 1 us, a hundredth of the request.

    HEAD -> BODY -> HEAD ...                      Content-Length
    HEAD -> SIZE -> DATA -> SIZE ... -> TRAILER -> HEAD          chunked (RFC 9112 7.1)

Where the two readings of a head could differ (two lengths, a coding that is not `chunked`, a space before a colon) the
parser refuses and the connection ends, so that it does not matter what is made of it here.
"""

import re
from typing import Final

#: Request line and fields together; nginx takes 32 KiB, node 16 KiB.
MAX_HEAD: Final = 65_536
#: A chunk's size with its extensions, which nobody uses (faults 59).
MAX_CHUNK_LINE: Final = 1024
#: Trailers are read by nobody here (faults 60).
MAX_TRAILERS: Final = 8192
#: So many chunks may be of any size; beyond them they must hold LEAST_CHUNK bytes on average (faults 45). A chunk costs
#: 1.5 us whatever it holds, so that this many cost the other connections 25 ms at the most.
FREE_CHUNKS: Final = 16_384
LEAST_CHUNK: Final = 64

_HEAD, _BODY, _SIZE, _DATA, _TRAILER = range(5)

_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
#: The first of: a length (1), a coding (2), the end of the head (3). A head with both a length and a coding is refused
#: by the parser, so the first will do. The parser takes any number of leading zeros, and a length that is not seen here
#: would let the client write, in that body, a head that makes the rest of the connection look like one long body.
_NEXT: Final = re.compile(
    rb"\r\n(?:(?i:content-length):[ \t]*0*([0-9]{1,18})[ \t]*(?=\r\n)|((?i:transfer-encoding)):|(\r\n))"
)


class BadFraming(Exception):
    """The bytes go beyond a bound. `head`: it was the head that is too large."""

    def __init__(self, reason: str, *, head: bool = False) -> None:
        super().__init__(reason)
        self.head = head


class Framing:
    """Follows the bytes of one connection."""

    __slots__ = ("_chunks", "_left", "_size", "_state", "_tail")

    def __init__(self) -> None:
        self._state = _HEAD
        self._tail = b""  # of a head, a chunk line or the trailers: what has come of it
        self._left = 0  # bytes of the body, or of the chunk and its CRLF, still to come
        self._chunks = 0
        self._size = 0  # bytes of the body that the chunks so far announced

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; True: they are one whole request. Raises BadFraming; nothing may be fed after that."""
        if self._state == _HEAD and not self._tail and self._whole(data):
            return True
        seen = 0  # bytes of `data` that were searched already
        if self._tail:
            seen = len(self._tail)
            data = self._tail + data
            self._tail = b""
        at, end = 0, len(data)
        while at < end:
            state = self._state
            if state == _HEAD:
                at = self._head(data, at, max(at, seen - 3))
            elif state == _SIZE:
                at = self._chunk_lines(data, at)
            elif state == _TRAILER:
                at = self._trailer(data, at)
            else:
                step = min(self._left, end - at)
                self._left -= step
                at += step
                if not self._left:
                    self._state = _HEAD if state == _BODY else _SIZE
        return False

    @staticmethod
    def _whole(data: bytes) -> bool:
        """Whether it is exactly one request with a Content-Length: the shortest way to say so."""
        found = _NEXT.search(data, 0, MAX_HEAD)
        if found is None or found.lastindex != 1:
            return False
        stop = data.find(b"\r\n\r\n", found.end(), MAX_HEAD)
        return stop >= 0 and stop + 4 + int(found[1]) == len(data)

    def _head(self, data: bytes, at: int, search: int) -> int:
        stop = data.find(b"\r\n\r\n", search)
        if (len(data) - 3 if stop < 0 else stop) - at > MAX_HEAD:
            raise BadFraming("the head is too large", head=True)
        if stop < 0:
            return self._keep(data, at)
        found = _NEXT.search(data, at, stop + 4)
        if found is not None and found.lastindex == 2:
            self._state = _SIZE
            self._chunks = self._size = 0
        elif found is not None and found.lastindex == 1 and (left := int(found[1])):
            self._state, self._left = _BODY, left
        return stop + 4

    def _chunk_lines(self, data: bytes, at: int) -> int:
        """Chunks as far as they stand in `data` as a whole."""
        end = len(data)
        while at < end:
            line = _CHUNK.match(data, at, at + MAX_CHUNK_LINE)
            if line is None:
                if end - at >= MAX_CHUNK_LINE or b"\n" in data[at:]:
                    raise BadFraming("the line of a chunk is not valid")
                return self._keep(data, at)
            size = int(line[1], 16)
            at = line.end()
            if not size:
                self._state = _TRAILER
                return at
            self._chunks += 1
            self._size += size
            if self._chunks > FREE_CHUNKS and self._size < self._chunks * LEAST_CHUNK:
                raise BadFraming("the body comes in too many chunks")
            at += size + 2
            if at > end:
                self._state, self._left = _DATA, at - end
                return end
        return at

    def _trailer(self, data: bytes, at: int) -> int:
        """The empty line after the last chunk, and what stands before it."""
        if data.startswith(b"\r\n", at):
            self._state = _HEAD
            return at + 2
        stop = data.find(b"\r\n\r\n", at)
        if (len(data) - 3 if stop < 0 else stop) - at > MAX_TRAILERS:
            raise BadFraming("the trailers are too large")
        if stop < 0:
            return self._keep(data, at)
        self._state = _HEAD
        return stop + 4

    def _keep(self, data: bytes, at: int) -> int:
        self._tail = data[at:]
        return len(data)
