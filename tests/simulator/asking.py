"""What the simulator's tests share: a raw HTTP connection, so that nothing between hides what was written."""

import asyncio
import json
from typing import Any

import aiohttp


def body(prompt: str = "Say something.", **fields: Any) -> dict[str, Any]:
    return {"model": "sim-fast", "messages": [{"role": "user", "content": prompt}], **fields}


class Simulator:
    """A client of one simulator."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            return json.loads(await response.read())

    async def post(self, path: str, value: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        async with self.session.post(self.url + path, json=value or {}, headers=headers) as response:
            return response.status, await response.read()

    async def fault(self, fault: dict[str, Any], *, times: int = 1, **match: Any) -> None:
        status, answer = await self.post("/_sim/faults", {"fault": fault, "match": match, "times": times})
        assert status == 201, answer

    async def whole(self, value: dict[str, Any], rid: str = "") -> dict[str, Any]:
        status, raw = await self.post("/v1/chat/completions", value, {"X-Request-ID": rid})
        assert status == 200, raw
        answer: dict[str, Any] = json.loads(raw)
        return answer

    async def raw(self, value: dict[str, Any], rid: str = "") -> bytes:
        status, raw = await self.post("/v1/chat/completions", value, {"X-Request-ID": rid})
        assert status == 200, raw
        return raw

    async def lines(self, rid: str = "") -> list[dict[str, Any]]:
        bill = await self.get(f"/_sim/bill?request_id={rid}")
        calls: list[dict[str, Any]] = bill["calls"]
        return calls

    async def line(self, rid: str = "") -> dict[str, Any]:
        (only,) = await self.lines(rid)
        return only

    async def connect(self, value: dict[str, Any], rid: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own with the request sent."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 16)
        data = json.dumps(value).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Connection: close", f"X-Request-ID: {rid}"]
        head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
        writer.write(head.encode() + data)
        return reader, writer


def chunks(raw: bytes) -> list[dict[str, Any]]:
    """The JSON events of a stream that ends with [DONE]."""
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def spoken(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def called(events: list[dict[str, Any]]) -> dict[int, dict[str, str]]:
    """The tool calls of a stream put together: index -> id, name, arguments."""
    calls: dict[int, dict[str, str]] = {}
    for event in events:
        for choice in event["choices"]:
            for part in choice["delta"].get("tool_calls", []):
                if "id" in part:
                    assert part["index"] not in calls, "id and name only with the first delta of an index"
                    calls[part["index"]] = {"id": part["id"], "name": part["function"]["name"], "arguments": ""}
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return calls
