"""Clients that read slowly, late or never: what waits for them, for how long, and that nothing of it is lost (I5, I8).

Deltas come here without regard to the window, so that much waits: about 300 KB stay with the kernel, the rest with us.
"""

import asyncio
import socket

from ingress.protocol import HIGH_WATER, MAX_PIECES, Connection
from shared.wire.messages import Ask
from tests.ingress.conftest import MakeWorld
from tests.ingress.test_streams import REQUEST, code_of, empty
from tests.ingress.world import HEAD, World, event
from tests.load.streams import plain

SMALL = 8192
PIECES = [event(f"{number:04}" + "x" * 300) for number in range(3000)]  # 1 MB


async def client(world: World, request: bytes = REQUEST) -> tuple[socket.socket, Ask]:
    """A connected client with a small receive buffer that has asked, and what it asked."""
    world.deaf = True
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", world.ingress.port))
    await loop.sock_sendall(sock, request)
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask))
    return sock, ask


async def say(world: World, ask: Ask, pieces: list[bytes]) -> None:
    """Text, a batch of ten pieces at a time."""
    for at in range(0, len(pieces), 10):
        provider = world.provider
        head = HEAD if at == 0 else None
        deltas = [provider.delta(ask, piece, None if i else head) for i, piece in enumerate(pieces[at : at + 10])]
        provider.send(ask, *deltas)
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)


def connection(world: World) -> Connection:
    """The one there is."""
    (found,) = world.ingress._server.connections
    assert isinstance(found, Connection)
    return found


async def read_all(sock: socket.socket) -> bytes:
    """Until the last chunk, or the close."""
    loop, got = asyncio.get_running_loop(), b""
    async with asyncio.timeout(10):
        while not got.endswith(b"0\r\n\r\n"):
            data = await loop.sock_recv(sock, 1 << 16)
            if not data:
                break
            got += data
    return got


async def test_what_waits_is_kept_small_and_read_late_is_whole(world: World) -> None:
    """I5; no write context for each chunk: the transport holds little, the rest waits in a few joined pieces."""
    sock, ask = await client(world)
    await say(world, ask, PIECES)
    here = connection(world)
    transport = here.transport
    assert transport is not None
    assert here.waiting > 300_000
    assert transport.get_write_buffer_size() < HIGH_WATER + len(PIECES[0]) + 200
    assert len(here._pieces) <= MAX_PIECES
    world.provider.send(ask, world.provider.end(ask))
    await asyncio.sleep(0.05)
    body = plain(await read_all(sock))
    assert body == b"".join(PIECES) + b"data: [DONE]\n\n"
    assert here.waiting == 0
    sock.close()
    await asyncio.sleep(0.05)
    empty(world)


async def test_http_1_0_read_late_is_whole_too(world: World) -> None:
    """Its end is the close of the connection, which must wait for what waits."""
    sock, ask = await client(world, REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    await say(world, ask, PIECES)
    world.provider.send(ask, world.provider.end(ask))
    await asyncio.sleep(0.1)
    _, _, body = (await read_all(sock)).partition(b"\r\n\r\n")
    assert body == b"".join(PIECES) + b"data: [DONE]\n\n"
    sock.close()


async def test_slow_is_not_stalled(make_world: MakeWorld) -> None:
    """faults 58: who takes 20 KB/s is no client that takes nothing, though the kernel asks us for more only when a
    third of its buffer is free, which takes 3 s here (at 1 KiB/s a minute)."""
    world = await make_world(CLIENT_STALLED_MS="1500")
    sock, ask = await client(world)
    await say(world, ask, PIECES)
    loop = asyncio.get_running_loop()
    got = b""
    for _ in range(13):
        got += await loop.sock_recv(sock, 4096)
        await asyncio.sleep(0.2)
    world.provider.send(ask, world.provider.end(ask))
    got += await read_all(sock)
    assert plain(got) == b"".join(PIECES) + b"data: [DONE]\n\n"
    sock.close()


async def test_a_stalled_client_that_says_it_is_done_is_gone(world: World) -> None:
    """FIN, and it does not read: waiting for it would keep its upstream open for STALLED_S."""
    sock, ask = await client(world)
    await say(world, ask, PIECES)
    assert connection(world).waiting
    sock.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(0.5):
        cancel = await world.provider.cancelled()
    assert cancel.stream == ask.reply.stream
    await asyncio.sleep(0.05)
    empty(world)
    sock.close()


async def test_the_deadline_ends_a_stalled_stream_and_who_reads_on_is_told(make_world: MakeWorld) -> None:
    """I4: idle does not count for a client that does not read, the total time does; what it reads later is the text
    so far and the one error. The request is over meanwhile, and its upstream stopped."""
    world = await make_world(TIMEOUT_IDLE_MS="200")
    sock, ask = await client(world, REQUEST.replace(b"\r\n", b"\r\nX-Timeout-Ms: 2000\r\n", 1))
    await say(world, ask, PIECES)
    await asyncio.sleep(1.6)
    assert world.ingress.in_flight() == 1, "idle counted"
    cancel = await world.provider.cancelled()
    assert cancel.reason == "deadline"
    assert world.ingress.in_flight() == 0
    body = plain(await read_all(sock))
    text, last = body[: len(b"".join(PIECES))], body[len(b"".join(PIECES)) :]
    assert text == b"".join(PIECES)
    assert code_of(last) == "deadline_exceeded"
    sock.close()
