"""The two ways in: over HTTP like any client, or straight to NATS like a direct publisher. Both fill a Result."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import aiohttp
import orjson

from shared.core.stream import Fail, Finish
from tests.load.nats_client import NatsClient, Outcome
from tests.load.work import Job, Result


class Caller(Protocol):
    """Makes one request and says how it went; never raises for what the server does."""

    async def call(self, job: Job) -> Result: ...


class _Reader:
    """Reads a stream's events or a whole body as it comes, and takes the times."""

    def __init__(self, job: Job, result: Result) -> None:
        self._job = job
        self._result = result
        self._start = self._last = time.perf_counter()
        self._rest = b""
        self._pieces = 0
        self.done = False

    def elapsed(self) -> float:
        return (time.perf_counter() - self._start) * 1000

    def feed(self, data: bytes) -> bool:
        """True when the client leaves now."""
        self._rest += data
        if not self._job.body.get("stream"):
            return False
        *events, self._rest = self._rest.split(b"\n\n")
        leaves = False
        for event in events:
            leaves = self._event(event) or leaves
        return leaves

    def _event(self, event: bytes) -> bool:
        for line in event.split(b"\n"):
            if line.startswith(b"data: [DONE]"):
                self.done = True
            elif line.startswith(b"data: "):
                self._chunk(orjson.loads(line[6:]))
        return 0 < self._job.leave_after <= self._pieces

    def _chunk(self, chunk: dict[str, Any]) -> None:
        result = self._result
        if "error" in chunk:
            result.status = str(chunk["error"].get("code") or chunk["error"].get("type"))
            return
        self._numbers(chunk)
        delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
        if delta.get("content") or delta.get("tool_calls"):
            now = time.perf_counter()
            if self._pieces:
                result.gaps.append((now - self._last) * 1000)
            else:
                result.ttft = (now - self._start) * 1000
            self._last = now
            self._pieces += 1

    def _numbers(self, told: dict[str, Any]) -> None:
        usage, ours = told.get("usage"), told.get("x_br")
        if usage:
            self._result.input_tokens = usage["prompt_tokens"]
            self._result.output_tokens = usage["completion_tokens"]
        if ours:
            self._result.cost_nano = ours["actual_cost_nano_usd"]

    def whole(self) -> None:
        """The body is complete."""
        self._numbers(orjson.loads(self._rest))
        self.done = True


class HttpCaller:
    """`url` is the base with or without /v1."""

    def __init__(self, url: str, key: str, session: aiohttp.ClientSession) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._session = session

    async def call(self, job: Job) -> Result:
        result = Result(job.kind)
        reader = _Reader(job, result)
        try:
            await self._exchange(job, result, reader)
        except (aiohttp.ClientError, TimeoutError) as error:
            result.status = type(error).__name__
        result.latency = reader.elapsed()
        return result

    async def _exchange(self, job: Job, result: Result, reader: _Reader) -> None:
        async with self._session.post(self._url, json=job.body, headers=self._headers) as response:
            result.http = response.status
            if response.status != 200:
                result.status = _code(await response.read()) or str(response.status)
                return
            async for data in response.content.iter_any():
                if reader.feed(data):
                    result.status = "left"
                    response.close()
                    return
            if not job.body.get("stream"):
                reader.whole()
        result.status = result.status or ("ok" if reader.done else "truncated")


def _code(raw: bytes) -> str:
    try:
        error = orjson.loads(raw)["error"]
        return str(error["code"] or error["type"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


class NatsCaller:
    """`tenant` and `key` are the ids of a synthetic tenant and its key."""

    def __init__(self, client: NatsClient, tenant: str, key: str) -> None:
        self._client = client
        self._tenant = tenant
        self._key = key

    async def call(self, job: Job) -> Result:
        result = Result(job.kind)
        reader = _Reader(job, result)
        async with aclosing(self._events(job)) as events:
            async for event in events:
                if isinstance(event, Finish):
                    result.status, result.http = result.status or "ok", 200
                    result.input_tokens, result.output_tokens = event.summary.input_tokens, event.summary.output_tokens
                    result.cost_nano = event.summary.cost
                elif isinstance(event, Fail):
                    result.status, result.http = event.error.code, event.error.status
                elif reader.feed(event.data):
                    result.status = "left"
                    break
        result.latency = reader.elapsed()
        return result

    def _events(self, job: Job) -> AsyncGenerator[Outcome, None]:
        return self._client.ask(self._tenant, self._key, job.body)
