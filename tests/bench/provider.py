"""CPU of the provider worker alone: per whole request, and per 1000 streamed chunks. Not a test: run it.

    python -m tests.bench.provider [--requests 20000] [--streams 200] [--chunks 60] [--pace-ms 20] [--profile]

The upstream is another process (bytes made once, written by a timer); Redis and NATS are stand-ins that answer at once,
so what is measured is decode, dispatch's await, HTTP out, SSE, translation, frames and settlement. The asker's credit
is given as an ingress gives it: once per batch.
"""

import argparse
import asyncio
import cProfile
import logging
import multiprocessing
import pstats
import secrets
import time
from multiprocessing.connection import Connection
from typing import Any

import orjson
import uvloop

from shared import settings
from shared.bus.roster import Roster
from shared.state.base import Dispatched, Principal
from shared.telemetry.metrics import Metrics
from shared.wire.messages import Admission, Ask, Call, Credit, Hop, Plan, Price, ReplyTo, Step, decode_batch, encode
from tests.workers.provider.rig import SECRETS, catalogue
from workers.provider.call import Provider

CHUNK = (
    b'data: {"id":"chatcmpl-BsxYz0123456789abcdefghijk","object":"chat.completion.chunk","created":1760000000,"model":'
    b'"gpt-4o-mini-2024-07-18","system_fingerprint":"fp_34a54ae93c","choices":[{"index":0,"delta":%b,"logprobs":null,'
    b'"finish_reason":%b}]}\n\n'
)
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":42,"completion_tokens":60,"total_tokens":102}}\n\n'
WHOLE = orjson.dumps({
    "id": "chatcmpl-BsxYz0123456789abcdefghijk", "object": "chat.completion", "created": 1760000000,
    "model": "gpt-4o-mini-2024-07-18", "choices": [{"index": 0, "message": {"role": "assistant", "refusal": None,
    "content": "Hello! " * 28, "annotations": []}, "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 42, "completion_tokens": 40, "total_tokens": 82}, "system_fingerprint": "fp_34a54ae93c",
})  # fmt: skip


class _Upstream(asyncio.Protocol):
    """Answers each request; a stream is paced."""

    def __init__(self, chunks: int, pace_s: float) -> None:
        self._pieces = [
            b"%x\r\n%b\r\n" % (len(piece), piece)
            for piece in (
                CHUNK % (b'{"role":"assistant","content":"","refusal":null}', b"null"),
                *(CHUNK % (b'{"content":" t%04d"}' % i, b"null") for i in range(chunks)),
                CHUNK % (b"{}", b'"stop"') + USAGE + b"data: [DONE]\n\n",
            )
        ]
        self._pieces[-1] += b"0\r\n\r\n"
        self._pace_s = pace_s
        self._loop = asyncio.get_running_loop()
        self._got = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]) if found else -1
        if not found or len(body) < length:
            return
        self._got = b""
        if b'"stream":true' in body:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            self._next(0)
        else:
            kind = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            self._transport.write(kind % len(WHOLE) + WHOLE)

    def _next(self, number: int) -> None:
        self._transport.write(self._pieces[number])
        if number + 1 < len(self._pieces):
            self._loop.call_later(self._pace_s, self._next, number + 1)


def _serve(pipe: Connection, chunks: int, pace_s: float) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Upstream(chunks, pace_s), "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(run())


class _Ledger:
    async def dispatch(self, **_fields: Any) -> Dispatched:
        return Dispatched(status="won", call=1)

    async def settle(self, **_fields: Any) -> str:
        return "settled"


class _State:
    ledger = _Ledger()

    class registry:  # noqa: N801 - an attribute
        fresh = ready = True

        @staticmethod
        def lookup(tenant: str, key: str) -> Principal:
            return Principal(tenant=tenant, key=key, tenant_name=tenant)

    class circuits:  # noqa: N801
        @staticmethod
        def look(_endpoint: str) -> None:
            """Closed."""

    class clock:  # noqa: N801
        @staticmethod
        def now() -> int:
            return int(time.monotonic() * 1000)


class _Bus:
    """Counts terminals; gives credit."""

    def __init__(self) -> None:
        self.provider: Any = None
        self.batches = 0
        self.ended: asyncio.Queue[None] = asyncio.Queue()
        self.cost = 0.0  # CPU seconds of the stand-in itself, taken off

    def publish(self, subject: str, payload: bytes, _reply: str = "") -> None:
        if ".reply." not in subject:
            return
        began = time.perf_counter()
        self.batches += 1
        batch = decode_batch(payload)
        ends = 0
        for raw in batch.frames:
            ends += bytes(raw)[1:3] == b"\xa1e"  # the tag of End
        self.cost += time.perf_counter() - began
        self.provider.control(Credit(role="ingress", instance="bench", read=batch.offset))
        for _ in range(ends):
            self.ended.put_nowait(None)

    async def subscribe(self, *_args: Any) -> Any:
        return self

    async def drain(self) -> None:
        """Nothing to wait for."""


class _Context:
    def __init__(self, port: int, bus: _Bus) -> None:
        self.settings = settings.load({**SECRETS, "MAX_IN_FLIGHT": "5000"})
        self.catalog = catalogue(f"http://127.0.0.1:{port}")
        self.bus, self.state, self.metrics = bus, _State(), Metrics()
        self.rosters = {"ingress": Roster("ingress")}
        self.instance, self.pid, self.log = "bench", 1, logging.getLogger()


def _message(number: int, *, stream: bool) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": stream}
    request = Ask(
        rid=secrets.token_hex(16), tenant="t", key="k", reply=ReplyTo("ingress", "bench", number), model="m",
        stream=stream, deadline=int(time.monotonic() * 1000) + 600_000, body=orjson.dumps(body),
    )  # fmt: skip
    admission = Admission(
        reserved=True, amount=10**9, estimate=10**6, input_tokens=9, output_cap=99, price=Price(10**8, 10**8, 10**8)
    )
    plan = Plan(steps=(Step("sim", "sim-fast"),), max_calls=3)
    hops = tuple(Hop(role, "abcdefghijkl", 1, 1) for role in ("ingress", "guardian", "routing"))
    return encode(Call(ask=request, admission=admission, plan=plan, hops=hops))


async def _round(provider: Any, bus: _Bus, count: int, concurrency: int, *, stream: bool) -> tuple[float, float]:
    """CPU and wall seconds of `count` requests, `concurrency` at a time."""
    messages = [_message(number, stream=stream) for number in range(count)]
    bus.cost = 0.0
    cpu, wall = time.process_time(), time.perf_counter()
    left = iter(messages)
    for message in [m for _, m in zip(range(concurrency), left, strict=False)]:
        provider._on_call("", "", message, False)
    for _ in range(count):
        await bus.ended.get()
        for message in left:
            provider._on_call("", "", message, False)
            break
    return time.process_time() - cpu - bus.cost, time.perf_counter() - wall


async def _run(arguments: argparse.Namespace, port: int) -> None:
    bus, provider = _Bus(), Provider()
    bus.provider = provider
    await provider.start(_Context(port, bus))  # type: ignore[arg-type]
    await _round(provider, bus, 2000, 64, stream=False)  # connections, caches
    profile = cProfile.Profile()
    if arguments.profile:
        profile.enable()
    for _ in range(arguments.rounds):
        cpu, wall = await _round(provider, bus, arguments.requests, 64, stream=False)
        print(f"whole, c64: {cpu / arguments.requests * 1e6:.1f} us CPU a request ({arguments.requests / wall:.0f}/s)")
    for _ in range(arguments.rounds):
        bus.batches = 0
        cpu, wall = await _round(provider, bus, arguments.streams * 2, arguments.streams, stream=True)
        chunks = arguments.streams * 2 * (arguments.chunks + 2)
        print(
            f"{arguments.streams} streams paced {arguments.pace_ms} ms: {cpu / chunks * 1e6:.1f} us CPU a chunk "
            f"({chunks / wall:.0f} chunks/s, {chunks / bus.batches:.1f} chunks a batch)"
        )
    if arguments.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    await provider.drain()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--pace-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    upstream = multiprocessing.Process(
        target=_serve, args=(theirs, arguments.chunks, arguments.pace_ms / 1000), daemon=True
    )
    upstream.start()
    try:
        uvloop.run(_run(arguments, ours.recv()))
    finally:
        upstream.terminate()


if __name__ == "__main__":
    main()
