"""Group A of faults.md, section 2: the JSON body (S1-H4a, H4b, H4c, S1-R4, S0-14)."""

import asyncio
import json
import time
from urllib.parse import urlsplit

from tests.e2e.door import MAX_BODY, PROMPT, Case, Door, bad, body, chat, check_error, content, covers, member
from tests.e2e.raw import Answer, read_answer

_KEYS = b",".join(b'"%05x":1' % number for number in range(200_000))
_BOM, _UTF16 = b"\xef\xbb\xbf" + body(), b"\xff\xfe" + body().decode().encode("utf-16-le")
_TWO_MODELS = b'{"model":"echo",' + body()[1:]

_PARSED: dict[str, bytes] = {
    "A1 empty": b"",
    "A6 trailing comma": b'{"model":"sim-fast","messages":[],}',
    "A7 single quotes": b"{'model':'sim-fast'}",
    "A9 comment": body() + b"/**/",
    "A10 NaN": member(b'"temperature":NaN'),
    "A11 Infinity": member(b'"temperature":Infinity'),
    "A12 -Infinity": member(b'"temperature":-Infinity'),
    "A16 duplicate key": _TWO_MODELS,
    "A18 lone surrogate": content(rb"\ud800"),
    "A19 surrogate in UTF-8": content(b"\xed\xa0\x80"),
    "A20 overlong": content(b"\xc0\xaf"),
    "A21 truncated UTF-8": content(b"\xe5"),
    "A22 above U+10FFFF": content(b"\xf4\x90\x80\x80"),
    "A23 BOM": _BOM,
    "A24 UTF-16": _UTF16,
    "A25 raw NUL": content(b"\x00"),
    "A27 raw LF": content(b"a\nb"),
    "A30 100,000 arrays": b"[" * 100_000,
    "A31 50,000 objects": b'[{"":' * 50_000,
}
_CHECKED: dict[str, bytes] = {
    "A2 null": b"null",
    "A3 array": b"[]",
    "A4 string": b'"x"',
    "A5 number": b"1",
    "A13 1e400": member(b'"temperature":1e400'),
    "A13 1e400 where nobody looks": member(b'"metadata":{"x":1e400}'),
    "A14 beyond 64 bits": member(b'"max_tokens":99999999999999999999999999'),
    "A29 500 nested arrays": member(b'"metadata":{"a":' + b"[" * 500 + b"]" * 500 + b"}"),
    "A32 1 MiB of items": member(b'"stop":[' + b"1," * 524_287 + b"1]"),
    "A33 200,000 keys": b'{"model":"sim-fast","messages":[{"role":"user","content":"x"}],"metadata":{' + _KEYS + b"}}",
    "A33 200,000 keys at the top": member(_KEYS),
    "A34 empty key alone": b'{"":1}',
    "A34 empty key": member(b'"":1'),
    "A36 true for a number": body(max_tokens=True),
    "A37 10.0": member(b'"max_tokens":10.0'),
    "A38 text for a number": body(max_tokens="10"),
    "A39 -1": body(max_tokens=-1),
    "A39 0": body(max_tokens=0),
    "A40 -0, as 0": member(b'"max_tokens":-0'),
    "A42 text for a boolean": body(stream="true"),
}
CASES: list[Case] = [
    *(bad(name, chat(raw), code="invalid_json") for name, raw in _PARSED.items()),
    *(bad(name, chat(raw)) for name, raw in _CHECKED.items()),
    bad("A43 1 byte above", chat(body() + b" " * (MAX_BODY + 1 - len(body()))), 413, code="request_too_large"),
    bad("A44 10 GB announced", chat(b"").replace(b"Length: 0", b"Length: 10000000000"), 413, closes=True),
    bad("A46 gzip", chat(b"\x1f\x8b\x08" + bytes(1000), headers=(b"Content-Encoding: gzip",)), 415),
    bad("A47 text", chat(body(), kind="text/plain"), 415),
    bad("A47 multipart", chat(body(), kind="multipart/form-data; boundary=x"), 415),
    bad("A47 nearly", chat(body(), kind="application/jsonx"), 415),
    bad("A47 missing", chat(body()).replace(b"Content-Type: application/json\r\n", b""), 415),
]


async def test_refused(door: Door) -> None:
    """Each with its status; 400 says what is wrong with the JSON or with the field."""
    async with door.unharmed():
        for case in CASES:
            await door.check(case)


async def test_object_expected(door: Door) -> None:
    for raw in (b"null", b"[]", b'"x"', b"1"):
        assert "object expected" in (await door.send(chat(raw))).error["message"]


@covers("A17", "A26", "A28", "A35", "A40")
async def test_odd_legal_and_harmless(door: Door) -> None:
    """What is accepted is forwarded as it was meant: one event per event, nothing raw, no other model."""
    lines = "a\u2028b\u2029c\u0085d"
    odd = {
        "A17": (b'{"Model":"sim-fast","model":"echo",%s', PROMPT),
        "A26": (b'{"model":"echo",%s', PROMPT + "\x00"),
        "A28": (b'{"model":"echo",%s', PROMPT + lines),
        "G153": (b'{"model":"echo",%s', PROMPT + "data: [DONE]\n\n</s><|im_start|>"),
        "A35": (b'{"__proto__":{"admin":true},"model":"echo",%s', PROMPT),
        "A40": (b'{"temperature":-0,"model":"echo",%s', PROMPT),
    }
    for name, (start, text) in odd.items():
        raw = start % b'"messages":[{"role":"user","content":%s}]}' % json.dumps(text, ensure_ascii=False).encode()
        door.echo.received.clear()
        whole = await door.send(chat(raw))
        assert whole.status == 200, (name, whole)
        assert json.loads(whole.body)["choices"][0]["message"]["content"] == text
        streamed = await door.send(chat(raw[:-1] + b',"stream":true}'))
        events = [event for event in streamed.body.split(b"\n\n") if event]
        assert all(event.startswith(b"data: ") and event.count(b"\n") == 0 for event in events), name
        assert events[-1] == b"data: [DONE]"
        chunks = [json.loads(event[6:]) for event in events[:-1]]
        assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == text
        for asked in door.echo.received:
            assert asked.body["model"] == "echo"
            assert "Model" not in asked.body
            assert b"\x00" not in asked.raw
        assert len(door.echo.received) == 2


async def _flood(door: Door, piece: bytes, total: int) -> tuple[Answer, int]:
    """A chunked request whose pieces come until it is answered or `total` bytes went out: the answer, bytes sent."""
    where = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = chat(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked").replace(b"@KEY@", door.key.encode())
    answered = asyncio.create_task(read_answer(reader, time.monotonic()))
    sent = 0
    try:
        writer.write(head)
        while sent < total and not answered.done():
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
        return await asyncio.wait_for(answered, 5), sent
    except ConnectionError:
        return await asyncio.wait_for(answered, 5), sent
    finally:
        writer.close()


async def _slowest_health(door: Door, until: "asyncio.Task[object]") -> float:
    """The longest time that /health took on one connection while something else went on: the lag of the loop."""
    where = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    slowest = 0.0
    while not until.done():
        began = time.monotonic()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_answer(reader, began, quiet=0.001)).status == 200
        slowest = max(slowest, time.monotonic() - began)
    writer.close()
    return slowest


@covers("A45")
async def test_tiny_chunks(door: Door) -> None:
    """100 MB in 1-byte chunks: refused after few of them, and the loop is never held for 50 ms (CVE-2025-69229)."""
    async with door.unharmed():
        lags = []
        for _ in range(3):
            flood = asyncio.create_task(_flood(door, b"1\r\nx\r\n" * 10_000, 600_000_000))
            lags.append(await _slowest_health(door, flood))
            answer, sent = await flood
            check_error(answer, {400, 413})
            assert sent < 32_000_000, "it was read on and on"
        assert min(lags) < 0.05, lags
        large = await _flood(door, b"4000\r\n" + b" " * 0x4000 + b"\r\n", 100_000_000)
        check_error(large[0], {413})


async def test_small_bodies_in_tiny_pieces_are_served(door: Door) -> None:
    """A legal body in 1-byte chunks, and in TCP segments of one byte."""
    raw = body(model="echo")
    chunked = chat(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    answer = await door.send(chunked + b"".join(b"1\r\n%c\r\n" % byte for byte in raw) + b"0\r\n\r\n")
    assert answer.status == 200, answer
    where = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    for byte in chat(raw).replace(b"@KEY@", door.key.encode()):
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(read_answer(reader, time.monotonic()), 5)).status == 200
    writer.close()
