"""Rolling restarts under load (issue 3, acceptance 5; faults 84): long streams, short requests, official SDK.

    python -m tests.e2e.rolling        100 streams of 60 s, 70 % of the capacity it measures, two of each role
    python -m tests.e2e.rolling --seconds 8 --rate 30 --scale guardian=2

Prints progress, then what became of every request; exit code 1 when one failed or was cut. tests/e2e/test_rolling.py is
the short version.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
from msgspec import Struct

from tests.e2e import invariants
from tests.e2e.drive import Client, Seen, session
from tests.e2e.invariants import Asked
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

PACE_MS = 100  # between two tokens of a long stream
MAX_OPEN = 400  # short requests in flight; above it the load is not offered, and that is counted
SDK_CLIENTS = 4
EVERY_ROLE = "ingress=2,guardian=2,routing=2,provider=2"

Say = Callable[[str], None]


class Result(Struct):
    """What a run saw."""

    restarted: list[dict[str, Any]]
    asked: list[Asked]
    sdk_errors: list[str]
    sdk_answers: int
    held_back: int
    seconds: float

    @property
    def failed(self) -> list[Any]:
        """Whatever did not end well."""
        bad = [
            (one.prompt, one.seen.rid, one.seen.status, one.seen.error, one.seen.broken, one.seen.body[-200:])
            for one in self.asked
            if not one.seen.ended_well
        ]
        return bad + self.sdk_errors


class Load:
    """`streams` long streams always open, `rate` short requests a second, and the openai SDK beside them."""

    def __init__(self, client: Client, sdk: openai.AsyncOpenAI, *, streams: int, seconds: float, rate: float) -> None:
        self.client = client
        self.sdk = sdk
        self.streams = streams
        self.seconds = seconds
        self.rate = rate
        self.asked: list[Asked] = []
        self.sdk_errors: list[str] = []
        self.sdk_answers = 0
        self.held_back = 0
        self.open_streams = 0
        self._going = True
        self._short: set[asyncio.Task[Seen]] = set()

    async def run(self) -> None:
        """Until `stop`; everything begun is finished."""
        long = [self._long(number) for number in range(self.streams)]
        await asyncio.gather(self._offer(), *long, *(self._official(number) for number in range(SDK_CLIENTS)))
        await asyncio.gather(*self._short)

    def stop(self) -> None:
        """Begin nothing more."""
        self._going = False

    async def _ask(self, prompt: str, *, stream: bool) -> Seen:
        one = Asked(prompt=prompt, seen=Seen(), at=time.monotonic())
        self.asked.append(one)
        one.seen = await self.client.chat(prompt, stream=stream)
        return one.seen

    async def _long(self, number: int) -> None:
        await asyncio.sleep(self.seconds * number / self.streams)  # they end one after the other
        while self._going:
            self.open_streams += 1
            chunks = round(self.seconds * 1000 / PACE_MS)
            await self._ask(invariants.prompt(chunks, pace=PACE_MS), stream=True)
            self.open_streams -= 1

    async def _offer(self) -> None:
        due = time.monotonic()
        number = 0
        while self._going:
            due += 1 / self.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number += 1
            if len(self._short) >= MAX_OPEN:
                self.held_back += 1
                continue
            task = asyncio.create_task(self._ask(invariants.prompt(8), stream=number % 3 == 0))
            self._short.add(task)
            task.add_done_callback(self._short.discard)

    async def _official(self, number: int) -> None:
        """The SDK does not try again here: what it would hide is what we look for."""
        while self._going:
            messages: Any = [{"role": "user", "content": invariants.prompt(10, pace=20)}]
            try:
                if number % 2:
                    answer: Any = await self.sdk.chat.completions.create(model="sim-fast", messages=messages)
                    assert answer.choices[0].finish_reason
                else:
                    parts = [
                        part
                        async for part in await self.sdk.chat.completions.create(
                            model="sim-fast", messages=messages, stream=True
                        )
                    ]
                    assert any(part.choices and part.choices[0].finish_reason for part in parts)
            except (openai.OpenAIError, AssertionError) as error:
                self.sdk_errors.append(f"openai: {error!r} {error.__cause__!r}")
            self.sdk_answers += 1


async def capacity(client: Client, seconds: float = 5.0, concurrency: int = 64) -> float:
    """Short requests a second at full speed, beside what runs already."""
    end = time.monotonic() + seconds
    done = 0

    async def ask(number: int) -> None:
        nonlocal done
        while time.monotonic() < end:
            await client.chat(invariants.prompt(8), stream=number % 3 == 0)
            done += 1

    await asyncio.gather(*(ask(number) for number in range(concurrency)))
    return done / seconds


async def restart(up: Up, role: str, say: Say) -> list[dict[str, Any]]:
    """`hotpath restart ROLE`, its progress told. Raises AssertionError when it fails."""
    command = [sys.executable, "-m", "deploy.cli", "restart", role, "--data", str(up.data)]
    process = await asyncio.create_subprocess_exec(
        *command, env=up.env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    said = ""
    async for line in process.stdout:
        said += line.decode()
        say("  " + line.decode().rstrip())
    assert await process.wait() == 0, said
    return [{"name": line.partition(":")[0]} for line in said.splitlines() if " has ended (" in line]


async def roll(
    up: Up, made: dict[str, Any], *, role: str, streams: int, seconds: float, rate: float, say: Say
) -> Result:
    """Load, `hotpath restart ROLE` in the middle of it, and the load's end. `rate` 0: 70 % of what is measured."""
    began = time.monotonic()
    sdk = openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key=made["key"], max_retries=0, timeout=60)
    async with session() as http, sdk:
        client = Client(http, up.url, made["key"])
        load = Load(client, sdk, streams=streams, seconds=seconds, rate=rate or 1.0)
        running = asyncio.create_task(load.run())
        while load.open_streams < streams:
            await asyncio.sleep(0.1)
        if not rate:
            full = await capacity(client)
            load.rate = 0.7 * full
            say(f"{full:.0f} requests/s at full speed beside {streams} streams; offering {load.rate:.0f}/s")
        try:
            restarted = await restart(up, role, say)
        finally:
            load.stop()
            say(f"waiting for {load.open_streams} streams to end")
            await running
    return Result(
        restarted, load.asked, load.sdk_errors, load.sdk_answers, load.held_back, round(time.monotonic() - began, 1)
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.rolling", description=__doc__)
    parser.add_argument("--role", default="all")
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a long stream")
    parser.add_argument("--rate", type=float, default=0.0, help="short requests a second (0: 70 %% of capacity)")
    parser.add_argument("--scale", default=EVERY_ROLE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        env = {"SHUTDOWN_STREAM_DRAIN_MS": "120000"}
        with Up(Path(directory) / "data", "--scale", options.scale, env=env) as up:
            sim = Sim(up.run["simulator_url"])
            sim.reset()
            made = {"tenant": "rolling", **up.cli("keys", "create", "--tenant", "rolling")}
            work = roll(
                up, made, role=options.role, streams=options.streams, seconds=options.seconds, rate=options.rate,
                say=lambda text: print(text, flush=True),
            )  # fmt: skip
            result = asyncio.run(work)
            print(json.dumps({"requests": len(result.asked), "sdk": result.sdk_answers, "failed": len(result.failed),
                              "held back": result.held_back, "seconds": result.seconds}))  # fmt: skip
            for one in result.failed[:20]:
                print("FAILED", one)
            if not result.failed:
                print(invariants.show(asyncio.run(invariants.check(up, sim, made, result.asked))))
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
