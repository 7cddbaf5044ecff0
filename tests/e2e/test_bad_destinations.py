"""Group E of faults.md, section 2: a request body can name no host, no key, nothing to be run (threat model, SSRF)."""

import json
from typing import Any

from shared.wire.openai import DENIED
from tests.e2e.door import MAX_BODY, PROMPT, SECRETS, Case, Door, bad, body, chat, covers

_ELSEWHERE = "http://169.254.169.254/latest"


def _image(url: Any) -> bytes:
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
    return body(messages=[{"role": "user", "content": parts}])


def _tool(schema: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": schema}}]


CASES: list[Case] = [
    bad("E111 file", chat(_image("file:///etc/passwd"))),
    bad("E111 gopher", chat(_image("gopher://169.254.169.254/"))),
    bad("E111 no text", chat(_image({"$ref": "#"}))),
    bad("E111 100 MB", chat(b"").replace(b"Length: 0", b"Length: 100000000") + _image("data:image/png,")[:-9], 413),
    bad("E111 above the limit", chat(_image("data:image/png;base64," + "A" * MAX_BODY)), 413),
    bad("E112 10,000 properties", chat(body(tools=_tool({"properties": {f"p{n}": {} for n in range(10_000)}})))),
    bad("E112 deep", chat(body(tools=_tool(json.loads('{"a":' * 100 + "1" + "}" * 100))))),
    bad("E112 513 tools", chat(body(tools=_tool({}) * 513))),
    *(bad(f"E113 {name}", chat(body(response_format=value)))
      for name, value in {"text": "json", "list": ["json"], "number": 1, "true": True}.items()),
    bad("E114 1 MB", chat(body(metadata={"a": "x" * 1_000_000}))),
    bad("E114 many", chat(body(metadata={f"k{n}": "v" for n in range(65)}))),
]  # fmt: skip


async def test_refused(door: Door) -> None:
    """Each with its status."""
    async with door.unharmed():
        for case in CASES:
            await door.check(case)


@covers("E109")
async def test_the_deny_list(door: Door) -> None:
    """The upstream is the catalogue's, with the catalogue's key, and sees none of it, in whatever letters."""
    ours = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature"}
    named: dict[str, Any] = dict.fromkeys(DENIED, _ELSEWHERE) | {
        "extra_headers": {"Authorization": "Bearer canary-x", "X-Evil": "canary-x"}, "mock_response": "canary-mock",
        "user_config": {"model_list": [{"litellm_params": {"api_base": _ELSEWHERE}}]}, "API_BASE": _ELSEWHERE,
        "Base_Url": _ELSEWHERE, "aws_secret_access_key": "canary-x", "azure_ad_token": "canary-x", "Stream": True,
        "vertex_credentials": "canary-x", "MAX_TOKENS": 4096,
    }  # fmt: skip
    async with door.unharmed():
        for fields in (named, *({name: value} for name, value in named.items())):
            door.echo.received.clear()
            answer = await door.send(chat(body(model="echo", temperature=0.5, **fields)))
            assert answer.status == 200, (fields, answer)
            (asked,) = door.echo.received
            assert set(asked.body) <= ours, fields
            assert (asked.body["model"], asked.body["temperature"]) == ("echo", 0.5)
            assert asked.path == "/v1/chat/completions"
            assert asked.headers["Authorization"] == f"Bearer {SECRETS['DOOR_PROVIDER_KEY']}"
            assert "X-Evil" not in asked.headers


@covers("E111", "E112", "E113")
async def test_passed_on_unread(door: Door) -> None:
    """URLs are not fetched, `$ref` is not followed, `pattern` is not run, formats we do not know are the upstream's."""
    recursive = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    pattern = {
        "type": "object",
        "properties": {"x": {"type": "string", "pattern": "(a+)+$", "default": "a" * 60 + "b"}},
    }
    odd: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": _ELSEWHERE}}]}]},
        {"tools": _tool(recursive)},
        {"tools": _tool(pattern)},
        {"tools": _tool({"properties": {f"p{n}": {} for n in range(900)}})},
        {"response_format": {"type": "junk", "json_schema": recursive}},
        {"response_format": {}},
    ]
    for fields in odd:
        door.echo.received.clear()
        answer = await door.send(chat(body(model="echo", **fields)))
        assert answer.status == 200, (fields, answer)
        (asked,) = door.echo.received
        for name, value in fields.items():
            assert asked.body[name] == value
