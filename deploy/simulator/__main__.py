"""`python -m deploy.simulator --port P`: run the simulator until SIGTERM or SIGINT.

Port 0 takes a free one. The port is told like every process tells it: one JSON line on the file descriptor
HOTPATH_READY_FD ({"role": "simulator", "url": ...}), else on standard output.
"""

import argparse
import asyncio
import os
import secrets
import signal

import orjson
import uvloop
from aiohttp import web

from deploy.simulator.server import application
from deploy.simulator.wanted import Defaults


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.simulator", description="A stand-in for an LLM provider.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--seed", type=int, default=0, help="of every text that the request itself does not seed")
    parser.add_argument("--tps", type=float, default=50.0, help="tokens per second of sim-paced")
    parser.add_argument("--chunks", type=int, default=16, help="tokens of an answer, unless the prompt says otherwise")
    parser.add_argument("--api-key", default="", help="the only key that is accepted; default: any")
    return parser.parse_args()


def _tell(url: str) -> None:
    ready_fd = int(os.environ.get("HOTPATH_READY_FD", "-1"))
    line = {"role": "simulator", "instance": secrets.token_hex(6), "pid": os.getpid(), "metrics": "", "url": url}
    if ready_fd >= 0:
        os.write(ready_fd, orjson.dumps(line) + b"\n")
    else:
        print(orjson.dumps(line).decode(), flush=True)


async def _serve(arguments: argparse.Namespace) -> None:
    defaults = Defaults(seed=arguments.seed, chunks=arguments.chunks, pace_ms=1000 / arguments.tps)
    app = application(defaults, api_key=arguments.api_key)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, arguments.host, arguments.port, backlog=4096).start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host, port = runner.addresses[0][:2]
    _tell(f"http://{host}:{port}")
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    """Run the simulator."""
    uvloop.run(_serve(_arguments()))


if __name__ == "__main__":
    main()
