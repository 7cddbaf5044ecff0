"""Hostile bytes at a whole ingress: valid and odd requests put together, changed, cut anywhere, left at any moment.

    python -m tests.ingress.fuzz [--inputs 100000] [--seed 0]

Deterministic by seed. A 5xx other than 503, a line of level error in the log, an exception in the loop, a connection
that stays, or anything left behind (exchanges, requests in flight) is a finding.
"""

import argparse
import asyncio
import logging
import random
import sys
from collections import Counter
from typing import Any

import uvloop

from tests.ingress.world import KEY, World

#: A hundred at once, as many as one process's loop keeps busy with.
AT_ONCE = 100
#: Short timers, so that what hangs is cut within the run.
TIMERS: dict[str, Any] = {"CLIENT_HEAD_MS": "700", "CLIENT_BODY_MS": "500", "CLIENT_IDLE_MS": "1500"}
#: Longer than all of them: an answer, or the end of the connection, has come by then.
WITHIN_S = 4.0

_BODY = b'{"model":"sim-fast","messages":[{"role":"user","content":"hi"}]}'
_STREAM = _BODY[:-1] + b',"stream":true}'
_FIELDS = b"Host: g\r\nAuthorization: Bearer %b\r\nContent-Type: application/json\r\n" % KEY.encode()
_POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + _FIELDS
_UPGRADE = b"Upgrade: websocket\r\nConnection: upgrade\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

SEEDS = [
    _POST + b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY),
    _POST + b"Content-Length: %d\r\n\r\n%b" % (len(_STREAM), _STREAM),
    _POST + _CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY),
    _POST + _CHUNKED + b"%x;a=b\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(_STREAM), _STREAM),
    _POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY),
    _POST + _UPGRADE + b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY),
    b"GET /health HTTP/1.1\r\nHost: g\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: g\r\n" + _CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n",
    b"GET http://g/health HTTP/1.1\r\nHost: g\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n" + _FIELDS + b"\r\n",
    b"HEAD /v1/models/x HTTP/1.1\r\n" + _FIELDS + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: g\r\n" + _UPGRADE + b"Sec-WebSocket-Key: x\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: g\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b"\x80", b": ", b" ", b"\t", b";", b"/", b"?", b"#", b"%", b"*", b"[",
    b"]", b"@", b"//", b"http://[", b"GET ", b"POST ", b"PRI ", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"chunked",
    b"0\r\n\r\n", b"f" * 20, b"X" * 9000, b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Host: h\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", _UPGRADE,
    b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n", b"Sec-WebSocket-Key1: x\r\n", b"X-Timeout-Ms: 5\r\n",
    b"X-Request-ID: \xe2\x80\xa8\r\n", b"User-Agent: a\r\n", b"Cookie: a=b\r\n",
]  # fmt: skip


def changed(dice: random.Random) -> bytes:
    """One to forty requests after one another, changed in up to eight places."""
    data = bytearray(b"".join(dice.choice(SEEDS) for _ in range(dice.choice([1, 1, 1, 2, 3, 40]))))
    for _ in range(dice.choice([0, 1, 1, 2, 3, 8])):
        at, token = dice.randrange(len(data)), dice.choice(TOKENS)
        other = dice.randrange(len(data))
        match dice.randrange(5):
            case 0:
                data[at] = dice.randrange(256)
            case 1:
                data[at:at] = token
            case 2:
                data[at : at + dice.randrange(1, min(20, len(data)))] = b"x"
            case 3:
                data[at:at] = data[other : other + dice.randrange(60)]
            case _:
                data[at : at + len(token)] = token
    return bytes(data)


class Findings(logging.Handler):
    """What went wrong, and how the answers were distributed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.wrong: list[str] = []
        self.answers: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """A line of level error is a finding."""
        self.wrong.append(f"log: {record.getMessage()} {record.exc_info}")

    def on_loop(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """And so is whatever the loop complains of."""
        self.wrong.append(f"loop: {context}")

    def note(self, seed: int, got: bytes) -> None:
        """The answers of one connection."""
        for part in got.split(b"HTTP/1.")[1:]:
            status = part[2:5].decode("latin-1")
            self.answers[status] += 1
            if status.startswith("5") and status != "503":
                self.wrong.append(f"seed {seed}: {part[:300]!r}")


async def one(port: int, seed: int, findings: Findings) -> None:
    """One connection: bytes in pieces, perhaps an end of ours, perhaps gone before the answer."""
    dice = random.Random(seed)
    data = changed(dice)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got, step, end = b"", dice.choice([1, 17, 1000, len(data)]), dice.choice(["eof", "leave", "wait"])
    try:
        for at in range(0, len(data), step):
            if writer.is_closing():
                break
            writer.write(data[at : at + step])
            await asyncio.sleep(0)
        if end == "eof" and writer.can_write_eof():
            writer.write_eof()
        async with asyncio.timeout(0.05 if end == "leave" else WITHIN_S):
            while piece := await reader.read(65536):
                got += piece
    except TimeoutError:
        if end != "leave":
            findings.wrong.append(f"seed {seed}: the connection stayed open")
    except (ConnectionError, RuntimeError):  # uvloop says RuntimeError for a transport that has ended
        findings.answers["reset"] += 1
    finally:
        writer.close()
    findings.note(seed, got)


async def run(inputs: int, seed: int = 0, *, progress: bool = False) -> Findings:
    """Send so many; what was found."""
    findings = Findings()
    logging.getLogger().addHandler(findings)
    asyncio.get_running_loop().set_exception_handler(findings.on_loop)
    world = await World().start(**TIMERS)
    gate = asyncio.Semaphore(AT_ONCE)

    async def gated(number: int) -> None:
        async with gate:
            await one(world.ingress.port, number, findings)

    for start in range(seed, seed + inputs, 1000):
        await asyncio.gather(*(gated(number) for number in range(start, min(start + 1000, seed + inputs))))
        if progress:
            print(start + 1000 - seed, dict(findings.answers), len(findings.wrong), flush=True)
    desk, server = world.ingress._desk, world.ingress._server
    for _ in range(300):
        if not server.connections and not desk.exchanges:
            break
        await asyncio.sleep(0.01)
    left = (len(server.connections), len(desk.exchanges), world.ingress.in_flight())
    if left != (0, 0, 0):
        findings.wrong.append(f"left behind: connections, exchanges, in flight {left}")
    await world.close()
    logging.getLogger().removeHandler(findings)
    return findings


def main() -> int:
    """Many inputs, with progress."""
    parser = argparse.ArgumentParser(prog="python -m tests.ingress.fuzz")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    findings = uvloop.run(run(arguments.inputs, arguments.seed, progress=True))
    for line in findings.wrong[:20]:
        print(line)
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
