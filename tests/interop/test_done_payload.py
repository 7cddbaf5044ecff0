"""The three forms of X-BR-Done-Payload, byte for byte, over a plain socket client (acceptance 2, D5)."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.interop.target import Target, says


def stream(target: Target, form: str | None, *, usage: bool = False) -> tuple[http.client.HTTPMessage, bytes]:
    """Headers and the undecoded body of one streamed answer."""
    where = urlsplit(target.url)
    body: dict[str, Any] = {"model": "sim-fast", "messages": says("done [[sim chunks=4 seed=9]]"), "stream": True}
    if usage:
        body["stream_options"] = {"include_usage": True}
    headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
    if form is not None:
        headers["X-BR-Done-Payload"] = form
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    try:
        connection.request("POST", f"{where.path}/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.headers, answer.read()
    finally:
        connection.close()


def blocks(body: bytes) -> list[bytes]:
    """The event blocks; the body ends with a blank line and holds no CR."""
    assert body.endswith(b"\n\n")
    assert b"\r" not in body
    return body.removesuffix(b"\n\n").split(b"\n\n")


def chunks(events: list[bytes]) -> list[dict[str, Any]]:
    """Every block but the terminal is exactly one `data:` line with one JSON object."""
    for event in events:
        assert event.startswith(b"data: {")
        assert b"\n" not in event
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def check_payload(payload: dict[str, Any], headers: http.client.HTTPMessage) -> None:
    assert payload["request_id"] == headers["X-BR-Request-Id"]
    assert payload["usage"]["output_tokens"] == 4
    assert payload["actual_cost_nano_usd"] > 0
    assert payload["actual_cost"].startswith("$")
    assert set(payload) == {
        "request_id", "guardian", "estimated_cost", "actual_cost", "actual_cost_nano_usd", "overhead_ms", "endpoint",
        "model", "calls", "usage", "estimated", "efficiency",
    }  # fmt: skip
    assert payload["efficiency"] == 1.0


@pytest.mark.parametrize("form", [None, "inline"])
@pytest.mark.parametrize("usage", [False, True])
def test_inline(hotpath: Target, form: str | None, usage: bool) -> None:
    """The default: `x_br` on the chunk with finish_reason, then a plain `data: [DONE]`."""
    headers, body = stream(hotpath, form, usage=usage)
    *events, last = blocks(body)
    assert last == b"data: [DONE]"
    parsed = chunks(events)
    carriers = [chunk for chunk in parsed if "x_br" in chunk]
    assert len(carriers) == 1
    assert carriers[0]["choices"][0]["finish_reason"] == "stop"
    check_payload(carriers[0]["x_br"], headers)
    assert bool(parsed[-1].get("usage")) is usage


def test_append(hotpath: Target) -> None:
    """The seed's literal form: `data: [DONE] {json}`."""
    headers, body = stream(hotpath, "append")
    *events, last = blocks(body)
    assert last.startswith(b"data: [DONE] {")
    assert b"\n" not in last
    check_payload(json.loads(last.removeprefix(b"data: [DONE] ")), headers)
    assert not any("x_br" in chunk for chunk in chunks(events))


def test_comment(hotpath: Target) -> None:
    """A comment line just before [DONE], in the same event block."""
    headers, body = stream(hotpath, "comment")
    *events, last = blocks(body)
    comment, done = last.split(b"\n")
    assert done == b"data: [DONE]"
    assert comment.startswith(b": x-br {")
    check_payload(json.loads(comment.removeprefix(b": x-br ")), headers)
    assert not any("x_br" in chunk for chunk in chunks(events))


def test_an_unknown_form_is_refused_or_inline(hotpath: Target) -> None:
    """Whatever is sent there, the stream stays one that strict clients read."""
    where = urlsplit(hotpath.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    body = json.dumps({"model": "sim-fast", "messages": says("done [[sim chunks=4]]"), "stream": True})
    headers = {
        "Authorization": f"Bearer {hotpath.key}",
        "Content-Type": "application/json",
        "X-BR-Done-Payload": "everything",
    }
    try:
        connection.request("POST", f"{where.path}/chat/completions", body, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status == 200:
        assert content.endswith(b"\n\ndata: [DONE]\n\n")
    else:
        assert answer.status == 400
        assert json.loads(content)["error"]["type"] == "invalid_request_error"


def test_no_named_events_no_ids(hotpath: Target) -> None:
    """D5: no named events, no `id:` fields, no extra chunks, ever."""
    counts = set()
    for form in ("inline", "append", "comment"):
        _, body = stream(hotpath, form)
        assert {line.partition(b":")[0] for line in body.split(b"\n") if line} <= {b"data", b""}
        counts.add(len(blocks(body)))
    assert counts == {1 + 4 + 1 + 1}, "role, four tokens, finish_reason, [DONE]"
