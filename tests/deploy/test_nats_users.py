"""The generated nats.conf on a real server: what each user may do (DESIGN 3, acceptance 3)."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any, Self

import nats
import pytest

from deploy import servers
from deploy.cli import confs, credentials, fleet
from shared.wire import subjects

ALLOWED_PUBLISH = (subjects.ADMIT, subjects.control("abc"), subjects.beat("loadgen", "abc"))
REFUSED_PUBLISH = (
    subjects.worker("guardian", "abc"), subjects.worker("provider", "abc"), subjects.reply("ingress", "abc"),
    subjects.reply("loadgen", "abc"), subjects.beat("guardian", "abc"), subjects.OUTCOME, subjects.NOTICE_REGISTRY,
    subjects.NOTICE_CIRCUIT, subjects.inbox("abc", "1"), f"{subjects.ADMIT}.more", f"{subjects.control('abc')}.more",
    "$JS.API.INFO", "$SYS.REQ.SERVER.PING", "_INBOX.abc", "anything",
)  # fmt: skip
REFUSED_SUBSCRIBE = (
    ">", "hotpath.>", f"{subjects.PREFIX}.>", subjects.ADMIT, subjects.reply("ingress", "*"), subjects.reply("*", "*"),
    subjects.beat("guardian", "*"), subjects.beat("loadgen", "*"), subjects.control("*"),
    f"{subjects.PREFIX}.inbox.>", "_INBOX.>", "$JS.>", subjects.reply("loadgen", "a.>"),
)  # fmt: skip


class Server:
    """A server with the generated configuration."""

    def __init__(self, port: int, secrets: dict[str, str]) -> None:
        self.port = port
        self.secrets = secrets

    def url(self, user: str) -> str:
        return fleet.embedded_nats_url(user, self.secrets, self.port)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """NATS as `hotpath up` starts it."""
    directory = tmp_path_factory.mktemp("users")
    port = servers.free_port()
    secrets = credentials.ensure(directory / "secrets.env", {})
    conf = confs.nats_conf(directory, "127.0.0.1", port, secrets, 1_048_576)
    assert conf.stat().st_mode & 0o777 == 0o600
    with servers.running(servers.nats_command(conf), port, directory / "log"):
        yield Server(port, secrets)


class User:
    """A connection, and the server's complaints."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.errors: list[str] = []
        self.client: Any = None

    async def _on_error(self, error: Exception) -> None:
        self.errors.append(str(error).lower())

    async def __aenter__(self) -> Self:
        self.client = await nats.connect(self._url, error_cb=self._on_error, allow_reconnect=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def refused(self) -> bool:
        """Whether the server complained about what was sent last."""
        await self.client.flush()
        for _ in range(50):
            if self.errors:
                return "permissions violation" in self.errors.pop()
            await asyncio.sleep(0.001)
        return False


async def test_loadgen_may_publish(server: Server) -> None:
    """What it is for, and the messages arrive."""
    async with User(server.url("operator")) as operator, User(server.url("loadgen")) as loadgen:
        inbox = await operator.client.subscribe(f"{subjects.PREFIX}.>")
        await operator.client.flush()
        for subject in ALLOWED_PUBLISH:
            await loadgen.client.publish(subject, b"x", reply=subjects.reply("loadgen", "abc"))
            assert not await loadgen.refused()
            assert (await inbox.next_msg(1)).subject == subject


async def test_loadgen_may_publish_nowhere_else(server: Server) -> None:
    """Acceptance 3: nothing of it arrives anywhere."""
    async with User(server.url("operator")) as operator, User(server.url("loadgen")) as loadgen:
        inbox = await operator.client.subscribe(">")
        await operator.client.flush()
        for subject in REFUSED_PUBLISH:
            await loadgen.client.publish(subject, b"x")
            assert await loadgen.refused(), subject
        await operator.client.flush()
        assert inbox.pending_msgs == 0


async def test_loadgen_may_read_its_answers_only(server: Server) -> None:
    """Acceptance 3, and a 503 (nobody takes the request) reaches it on its reply subject."""
    async with User(server.url("loadgen")) as loadgen:
        mine = await loadgen.client.subscribe(subjects.reply("loadgen", "abc"))
        assert not await loadgen.refused()
        for pattern in REFUSED_SUBSCRIBE:
            await loadgen.client.subscribe(pattern)
            assert await loadgen.refused(), pattern
        await loadgen.client.publish(subjects.ADMIT, b"x", reply=subjects.reply("loadgen", "abc"))
        assert (await mine.next_msg(1)).headers["Status"] == "503"


async def test_the_roles(server: Server) -> None:
    """One user for the roles: everything under our prefix and JetStream's API, nothing of the server's own."""
    async with User(server.url("roles")) as roles:
        for pattern in (subjects.ADMIT, subjects.reply("ingress", "*"), f"{subjects.PREFIX}.inbox.abc.*", "_INBOX.a.*"):
            await roles.client.subscribe(pattern, queue="")
            assert not await roles.refused(), pattern
        for subject in (*ALLOWED_PUBLISH, subjects.worker("provider", "abc"), subjects.OUTCOME):
            await roles.client.publish(subject, b"x")
            assert not await roles.refused(), subject
        for pattern in (">", "$SYS.>"):
            await roles.client.subscribe(pattern)
            assert await roles.refused(), pattern
        assert (await roles.client.jetstream().account_info()).streams == 0


@pytest.mark.parametrize("options", ["{}", '{"user": "loadgen", "pass": "x"}', '{"user": "roles", "pass": ""}'])
def test_strangers_stay_outside(server: Server, options: str) -> None:
    """No user, or a wrong password: no connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as wire, wire.makefile("rb") as lines:
        assert lines.readline().startswith(b"INFO ")
        wire.sendall(f"CONNECT {options}\r\nPING\r\n".encode())
        assert b"Authorization Violation" in lines.readline()
        assert lines.read() == b""
