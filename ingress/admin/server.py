"""The port of the admin API in one ingress process.

Processes of one machine share it: by the socket that `hotpath up` hands down (HOTPATH_ADMIN_FD), else by SO_REUSEPORT.
A port that cannot be had costs the operator this process's admin API and nobody a request: it is said in the log, shows
as `hotpath_admin_listening` 0, and is tried again.
"""

import asyncio
import errno
import logging
import socket
from typing import Final

from ingress.admin.router import Router
from ingress.protocol import Server, Timers
from shared.settings import Settings

BACKLOG: Final = 64
#: An operator, a few dashboards; a flood must leave the descriptors to the clients of the gateway.
MAX_CONNECTIONS: Final = 64
#: How often a port that cannot be had is tried again.
RETRY_S: Final = 5.0
#: For the answers under way when the process leaves.
LAST_S: Final = 2.0

_TIMERS: Final = Timers(head=10.0, idle=15.0, stalled=30.0)


class AdminServer:
    """See the module."""

    def __init__(self, settings: Settings, router: Router, log: logging.Logger) -> None:
        self._host = settings.admin_host
        self._port = settings.admin_port
        self._fd = settings.hotpath_admin_fd
        self._router = router
        self._log = log
        self._connections: Server | None = None
        self._server: asyncio.Server | None = None
        self._trying: asyncio.Task[None] | None = None
        self.port = 0  # where it listens; 0: nowhere

    @property
    def listening(self) -> bool:
        """Whether it has its port."""
        return self._server is not None

    async def start(self) -> None:
        """Listen, now or as soon as it is possible. Never fails."""
        self._connections = Server(
            self._router,
            refuse=self._router.refuse,
            read=self._router.queue.read,
            crowded=lambda: False,
            answer_unparsed=lambda _: b"",
            max_connections=MAX_CONNECTIONS,
            timers=_TIMERS,
            log=self._log,
        )
        if not await self._listen():
            self._trying = asyncio.create_task(self._try())

    async def _try(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            if await self._listen(again=True):
                return

    async def _listen(self, *, again: bool = False) -> bool:
        assert self._connections is not None
        try:
            listener = self._socket()
            listener.setblocking(False)
            port = listener.getsockname()[1]
            self._server = await asyncio.get_running_loop().create_server(
                self._connections, sock=listener, backlog=BACKLOG
            )
        except OSError as error:
            if not again:
                self._log.error(
                    "no admin API in this process: its port cannot be had. Set ADMIN_HOST and ADMIN_PORT",
                    extra={"host": self._host, "port": self._port, "error": error.strerror},
                )
            return False
        self.port = port
        self._log.info("admin API", extra={"host": self._host, "port": port})
        return True

    def _socket(self) -> socket.socket:
        if self._fd >= 0:
            handed_down = socket.socket(fileno=self._fd)
            if not handed_down.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                handed_down.detach()  # somebody else's, who must not lose it
                raise OSError(errno.EINVAL, "HOTPATH_ADMIN_FD is no listening socket")
            return handed_down
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        return socket.create_server((self._host, self._port), family=family, backlog=BACKLOG, reuse_port=True)

    async def close(self) -> None:
        """Let nobody in any more, end what is under way."""
        if self._trying is not None:
            self._trying.cancel()
        self._router.leaving = True
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._connections is not None:
            self._connections.pre_shutdown()
            await self._connections.shutdown(LAST_S)
