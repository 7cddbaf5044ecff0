"""A role that does nothing: ready at once, gone at SIGTERM. Its manners come from the command line.

stubborn: ignores SIGTERM. refused: exits with 78. crash: dies right after it was ready. loud: logs and prints.
"""

import asyncio
import json
import os
import signal
import socket
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """200 to everything."""
    await reader.readuntil(b"\r\n\r\n")
    body = b'{"data": [{"id": "standin"}]}'
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    writer.close()


async def main(role: str, *manners: str) -> int:
    """Run until told to end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if "stubborn" in manners else stop.set)
    if "refused" in manners:
        print("GATEWAY_SOMETHING: is not right", file=sys.stderr)
        return 78
    if "loud" in manners:
        print(json.dumps({"level": "warning", "msg": f"{role} is worried", "disk": "full"}), file=sys.stderr)
        print(json.dumps({"level": "info", "msg": "nobody wants to know"}), file=sys.stderr)
        print("plain words", file=sys.stderr, flush=True)
    if role == "ingress":
        listener = socket.socket(fileno=int(os.environ["HOTPATH_LISTEN_FD"]))
        await asyncio.start_server(answer, sock=listener)
    line = {"role": role, "instance": "x", "pid": os.getpid(), "metrics": f"http://127.0.0.1:1/{os.getpid()}"}
    os.write(int(os.environ["HOTPATH_READY_FD"]), json.dumps(line).encode() + b"\n")
    if "crash" in manners:
        return 3
    await stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
