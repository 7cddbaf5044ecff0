"""A role that does nothing: ready at once, gone at SIGTERM. Its manners come from the command line.

stubborn: ignores SIGTERM. refused: exits with 78. crash: dies right after it was ready. loud: logs and prints.
With a file that need not exist: broken=FILE: exits with 3 while it does. mute=FILE: is not ready while it does.
drains=FILE: after SIGTERM it goes when the file is there, or at a second one, which it notes in FILE.twice.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """200 to everything."""
    await reader.readuntil(b"\r\n\r\n")
    body = b'{"data": [{"id": "standin"}]}'
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    writer.close()


def on_term(stop: asyncio.Event, stubborn: bool, drains: Path | None) -> None:
    """What SIGTERM does."""

    def told() -> None:
        if stop.is_set() and drains is not None:
            Path(f"{drains}.twice").touch()
            os._exit(1)
        stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if stubborn else told)


async def main(role: str, *manners: str) -> int:
    """Run until told to end."""
    stop = asyncio.Event()
    files = {name: Path(path) for name, _, path in (manner.partition("=") for manner in manners) if path}
    if "broken" in files and files["broken"].exists():
        return 3
    on_term(stop, "stubborn" in manners, files.get("drains"))
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
    while "mute" in files and files["mute"].exists():
        await asyncio.sleep(0.02)
    line = {"role": role, "instance": "x", "pid": os.getpid(), "metrics": f"http://127.0.0.1:1/{os.getpid()}"}
    os.write(int(os.environ["HOTPATH_READY_FD"]), json.dumps(line).encode() + b"\n")
    if "crash" in manners:
        return 3
    await stop.wait()
    while "drains" in files and not files["drains"].exists():
        await asyncio.sleep(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
