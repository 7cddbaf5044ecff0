"""CPU of the ingress alone, per unary request, per refusal and per streamed chunk: fake workers answer in process.

    python -m tests.bench.ingress_cpu [--requests 20000] [--profile]

The clients run in a process of their own (raw sockets, keep-alive), so that only the ingress and the fake workers are
counted; what the fake workers cost (encoding their frames) is measured apart and shown.
"""

import argparse
import asyncio
import cProfile
import gc
import json
import multiprocessing
import pstats
import resource
import time

import uvloop

from shared.bus.memory import MemoryBus
from shared.wire.messages import Ask, ReplyTo
from tests.ingress.world import HEAD, KEY, Worker, World, event

BODY = b'{"model":"sim-fast","messages":[{"role":"user","content":"Tell me about the weather in Paris."}]}'
STREAM = BODY[:-1] + b',"stream":true}'
ANSWER = json.dumps({"object": "chat.completion", "choices": [{"message": {"content": "x" * 300}}]}).encode()
CHUNK = event("word ")


class DirectBus(MemoryBus):
    """MemoryBus without its faithfulness: matching every pattern costs more than all that is measured here."""

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        for subscription in self.broker._subscriptions:
            if subscription.pattern == subject:
                subscription.deliver(subject, reply, payload, no_responders=False)
                return


def request(body: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (KEY.encode(), len(body), body)
    )


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def client(port: int, count: int, connections: int, body: bytes, until: bytes) -> None:
    data = request(body)

    async def one(n: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        for _ in range(n):
            writer.write(data)
            await reader.readuntil(until)
        writer.close()

    await asyncio.gather(*(one(count // connections) for _ in range(connections)))


def run_client(*what: object) -> None:
    uvloop.run(client(*what))  # type: ignore[arg-type]


async def load(world: World, count: int, connections: int, body: bytes, until: bytes) -> tuple[float, float]:
    """Seconds of CPU here, and of wall time."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_client, args=(world.ingress.port, connections * 4, connections, body, until))
    process.start()
    while process.is_alive():
        await asyncio.sleep(0.01)
    process = context.Process(target=run_client, args=(world.ingress.port, count, connections, body, until))
    process.start()
    counted = world.ingress._server.requests_count
    while world.ingress._server.requests_count == counted:
        await asyncio.sleep(0.001)
    before, begun = cpu(), time.monotonic()
    while process.is_alive():
        await asyncio.sleep(0.02)
    return cpu() - before, time.monotonic() - begun


def unary(ask: Ask, worker: Worker) -> None:
    worker.send(ask, worker.accepted(ask), worker.delta(ask, ANSWER, HEAD), worker.end(ask))
    worker.seqs.clear()
    worker.world.guardian.asks.clear()  # what tests keep would be walked by the collector


def stream_of(chunks: int) -> object:
    loop = asyncio.get_running_loop()

    def script(ask: Ask, worker: Worker) -> None:
        worker.send(ask, worker.accepted(ask), worker.delta(ask, CHUNK, HEAD))

        def more(left: int) -> None:
            if left:
                worker.send(ask, worker.delta(ask, CHUNK))
                loop.call_soon(more, left - 1)
            else:
                worker.send(ask, worker.end(ask))
                worker.seqs.pop((ask.reply.stream, ask.delivery), None)

        loop.call_soon(more, chunks - 1)

    return script


def fake_side(ask: Ask, worker: Worker, count: int, make: object) -> float:
    """CPU us of the fake worker's own encoding, per request."""
    before = cpu()
    for _ in range(count):
        make(ask, worker)  # type: ignore[operator]
    return (cpu() - before) / count * 1e6


async def refusals(world: World, requests: int) -> None:
    """What a request costs that finds the process full."""
    door = world.ingress._door
    assert door is not None
    most, door._max = door._max, 0
    used, wall = await load(world, requests, 64, BODY, b'"overloaded"}}')
    door._max = most
    print(f"refused  : {used / requests * 1e6:7.1f} us CPU a request, {requests / wall:7.0f} requests/s")


async def main(requests: int, profile: bool) -> None:
    world = World()
    world.broker.client = lambda name, on_change=None: DirectBus(world.broker, name, on_change)  # type: ignore[method-assign]
    await world.start(MAX_IN_FLIGHT="5000")
    gc.collect()
    gc.freeze()  # as shared/service.py does after the boot
    world.admitted = lambda ask, guardian: world.script(ask, world.provider)  # type: ignore[method-assign]
    world.script = unary
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    used, wall = await load(world, requests, 64, BODY, b'"}}]}')
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
    print(f"unary c64: {used / requests * 1e6:7.1f} us CPU a request, {requests / wall:7.0f} requests/s")
    await refusals(world, requests)
    chunks, streams = 200, max(requests // 100, 64)
    world.script = stream_of(chunks)  # type: ignore[assignment]
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    used, wall = await load(world, streams, 32, STREAM, b"data: [DONE]\n\n\r\n0\r\n\r\n")
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    print(f"streams  : {used / (streams * chunks) * 1e6:7.1f} us CPU a chunk")
    world.bus.cut()
    ask = Ask(rid="0" * 32, tenant="t", key="k", reply=ReplyTo("ingress", "nobody", 1), body=b"")
    worker = world.provider
    print(f"of which the fake worker: {fake_side(ask, worker, 5000, unary):.1f} us a request,", end=" ")
    print(f"{fake_side(ask, worker, 5000, lambda a, w: w.send(a, w.delta(a, CHUNK))):.1f} us a chunk")
    await world.close()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--requests", type=int, default=20_000)
    arguments.add_argument("--profile", action="store_true")
    given = arguments.parse_args()
    uvloop.run(main(given.requests, given.profile))
