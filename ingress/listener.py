"""Where clients connect: opened, closed and opened again without a connection lost (S1-H5, issue 3).

Two ways to share a port among ingress processes:

    handed down   one socket of `hotpath up` for all: what waits in it when we close is taken by the others
    our own       SO_REUSEPORT (honcho): a queue for each process. The kernel spreads new connections by a hash and
                  resets what waits in the queue of a socket that is closed, half-open handshakes included (it moves
                  them to another queue only with net.ipv4.tcp_migrate_req=1, which is off by default)

So a socket of our own is closed in three steps: new handshakes are dropped by a filter on it (the client's kernel sends
the SYN again after a second, and it goes to another process), those under way get HANDSHAKE_S to complete, and
everything in the queue is taken before the close.
"""

import asyncio
import ctypes
import resource
import socket
import struct
import sys
from collections.abc import Callable
from typing import Final

from shared.service import BootError
from shared.settings import Settings

BACKLOG: Final = 4096
#: What the kernel may hold for one client (Linux doubles it; accepted sockets inherit it). Left to itself it grows to
#: megabytes, all of which would count as taken by a client that reads nothing.
SEND_BUFFER: Final = 128 * 1024
#: A handshake under way completes within one round trip, and processes that share a port are in one house with their
#: load balancer. A client that connects in this time waits a second more.
HANDSHAKE_S: Final = 0.05

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; the socket module does not name it
#: Classic BPF on the TCP header: drop what has SYN and not ACK, keep the rest (linux/filter.h).
_NO_SYN: Final = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # A = the byte of the flags
        (0x54, 0, 0, 0x12),  # A &= SYN | ACK
        (0x15, 0, 1, 0x02),  # A == SYN: go on, else skip one
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFF_FFFF),  # keep
    )
)

#: Descriptors of everything but clients: NATS, Redis, the metrics server, connections that are turned away. Some 20 and
#: a third of the clients will do, where there are few (`ulimit -n 64`).
OTHER_FILES: Final = 256

Protocol = Callable[[], asyncio.Protocol]


def allow_connections(wanted: int) -> int:
    """Raise this process's limit of open files as far as `wanted` client connections need and the system allows; how
    many they may be (faults 87). Shells start programs with 1024 files, whatever the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if soft != endless and soft < wanted + OTHER_FILES:
        soft = wanted + OTHER_FILES if hard == endless else min(wanted + OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == endless else max(1, min(wanted, soft - min(OTHER_FILES, soft // 2)))


class Listener:
    """The listening socket of one ingress process."""

    def __init__(self, settings: Settings) -> None:
        self._host = settings.gateway_host
        self.port = settings.gateway_port
        self._handed_down = settings.hotpath_listen_fd >= 0
        self._socket: socket.socket | None = None
        if self._handed_down:
            self._socket = socket.socket(fileno=settings.hotpath_listen_fd)
        self._server: asyncio.Server | None = None
        self._protocol: Protocol | None = None

    @property
    def open(self) -> bool:
        """Whether clients are let in."""
        return self._server is not None

    async def start(self, protocol: Protocol | None = None) -> None:
        """Let clients in; `protocol` makes their connections (the one given before by default). Raises BootError."""
        self._protocol = protocol or self._protocol
        assert self._protocol is not None
        if self._socket is None:
            self._socket = self._bind()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        # a duplicate: the server closes its own, and this one still holds the queue
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, sock=self._socket.dup(), backlog=BACKLOG)

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self.port), family=family, backlog=BACKLOG, reuse_port=True)
        except OSError as error:
            where = f"{self._host} port {self.port}"
            raise BootError(f"cannot listen on {where} ({error}); set GATEWAY_HOST, GATEWAY_PORT") from error

    async def stop(self) -> None:
        """Let nobody in any more; whoever connected before is served."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._handed_down:
            server.close()
            return
        assert self._socket is not None
        if drop_handshakes(self._socket):
            await asyncio.sleep(HANDSHAKE_S)
        server.close()
        await self._take_all(self._socket)
        self._socket.close()
        self._socket = None

    async def close(self) -> None:
        """Stop for good."""
        await self.stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _take_all(self, sock: socket.socket) -> None:
        """Accept what waits in the queue."""
        loop = asyncio.get_running_loop()
        assert self._protocol is not None
        while True:
            try:
                accepted, _ = sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # that client has left again
                continue
            accepted.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, accepted)


def drop_handshakes(sock: socket.socket) -> bool:
    """Have the kernel drop every SYN for this listening socket; False where it cannot (not Linux)."""
    if sys.platform != "linux":
        return False
    steps = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
    program = struct.pack("HP", len(_NO_SYN) // 8, ctypes.addressof(steps))
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        return False
    return True
