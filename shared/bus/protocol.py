"""The NATS client protocol, read side: bytes in, operations out, however they were cut. No I/O.

Source: docs.nats.io, "Client Protocol". A server sends INFO, MSG, HMSG, PING, PONG, +OK and -ERR, each a line that ends
with CRLF; MSG and HMSG are followed by as many bytes as the line says, and CRLF.
"""

from collections.abc import Callable
from typing import Final

#: Longest line: INFO lists the servers of a cluster, all others are short.
MAX_LINE: Final = 65_536
#: Largest message: NATS itself allows no more (its `max_payload` is at most 64 MiB).
MAX_MESSAGE: Final = 64 * 1024 * 1024

_NO_RESPONDERS: Final = b"NATS/1.0 503"
_STATUS: Final = b"NATS/1.0 "
_M: Final = ord("M")
_H: Final = ord("H")

#: deliver(sid, subject, reply, payload, no_responders)
Deliver = Callable[[bytes, bytes, bytes, bytes, bool], None]
#: operation(name, rest of the line), for all others
Operation = Callable[[bytes, bytes], None]


class ProtocolError(Exception):
    """The server sent what no NATS server sends: the connection is of no further use."""


class Parser:
    """Feeds on what the socket brings: `deliver` for each message, `operation` for each other line, in order."""

    def __init__(self, deliver: Deliver, operation: Operation) -> None:
        self._deliver = deliver
        self._operation = operation
        # An incomplete tail and what came since: joined once enough is there, so a large message costs one copy.
        self._parts: list[bytes] = []
        self._have = 0
        self._need = 0

    @property
    def held(self) -> int:
        """Bytes of an incomplete line or message."""
        return self._have

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises ProtocolError."""
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._parts)
            self._parts.clear()
            self._have = 0
        position = 0
        size = len(data)
        while position < size:
            end = data.find(b"\r\n", position)
            if end < 0:
                if size - position > MAX_LINE:
                    raise ProtocolError("an endless line")
                self._hold(data, position, size - position + 1)
                return
            first = data[position]
            if first in (_M, _H):
                stop = self._message(data, position, end, first == _H)
                if stop == 0:
                    return
                position = stop
            else:
                name, _, rest = data[position:end].partition(b" ")
                self._operation(name.upper(), rest.strip())
                position = end + 2

    def _message(self, data: bytes, position: int, end: int, headed: bool) -> int:
        """Deliver the message whose line is data[position:end]; where it ends, or 0 when it is not all there."""
        fields = data[position:end].split()
        count = len(fields) - headed
        try:
            length = int(fields[-1])
            head = int(fields[-2]) if headed else 0
            sid = fields[2]
        except (ValueError, IndexError) as error:
            raise ProtocolError("a malformed message line") from error
        if not 4 <= count <= 5 or not 0 <= head <= length <= MAX_MESSAGE:
            raise ProtocolError("a malformed message line")
        start = end + 2
        stop = start + length
        if len(data) < stop + 2:
            self._hold(data, position, stop + 2 - position)
            return 0
        if not data.startswith(b"\r\n", stop):
            raise ProtocolError("a message of another length than its line says")
        no_responders = headed and head == length and data.startswith(_NO_RESPONDERS, start)
        if head == length and data.startswith(_STATUS, start) and not no_responders:
            head = 0  # a status of JetStream (404, 408, 409) is delivered as its text, since it has nothing else
        self._deliver(sid, fields[1], fields[3] if count == 5 else b"", data[start + head : stop], no_responders)
        return stop + 2

    def _hold(self, data: bytes, position: int, need: int) -> None:
        self._parts.append(data[position:])
        self._have = len(data) - position
        self._need = need
