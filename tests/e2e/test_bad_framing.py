"""Group B of faults.md, section 2: HTTP framing over raw sockets (from Http11Probe), paths and methods."""

import asyncio
import json
import time
from urllib.parse import urlsplit

from tests.e2e.door import BODY_MS, KEY, PROMPT, Case, Door, bad, body, chat, check_error, covers
from tests.e2e.raw import read_answer

_HEAD = chat(b"").partition(b"Content-Length")[0]
#: Behind whatever is refused: it must never be taken for a request.
_SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer @KEY@\r\n\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
_JSON = body()
_IN_CHUNK = b"%x\r\n%b\r\n" % (len(_JSON), _JSON)
_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64))

_FRAMING: dict[str, bytes] = {
    "B48 both lengths": b"Content-Length: 24\r\n" + _CHUNKED + b"0\r\n\r\n",
    "B48 the other way round": b"Transfer-Encoding: chunked\r\nContent-Length: 24\r\n\r\n0\r\n\r\n",
    "B48 a length of 0": b"Content-Length: 0\r\n" + _CHUNKED + b"0\r\n\r\n",
    "B49 two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "B50 list": b"Content-Length: 5, 6\r\n\r\nhello!",
    "B50 list of equals": b"Content-Length: 5, 5\r\n\r\nhello",
    "B51 -1": b"Content-Length: -1\r\n\r\n",
    "B51 +5": b"Content-Length: +5\r\n\r\nhello",
    "B51 0x5": b"Content-Length: 0x5\r\n\r\nhello",
    "B51 5 5": b"Content-Length: 5 5\r\n\r\nhello",
    "B51 empty": b"Content-Length: \r\n\r\n",
    "B51 2^64": b"Content-Length: 18446744073709551616\r\n\r\n",
    "B52 xchunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "B52 not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "B52 identity": b"Transfer-Encoding: identity\r\n\r\n{}",
    "B52 VT": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "B52 FF": b"Transfer-Encoding: \x0cchunked\r\n\r\n0\r\n\r\n",
    "B52 NUL": b"Transfer-Encoding: \x00chunked\r\n\r\n0\r\n\r\n",
    "B52 trailing VT": b"Transfer-Encoding: chunked\x0b\r\n\r\n0\r\n\r\n",
    "B53 space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "B54 folded": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "B56 chunk ended by LF": _CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "B56 size ended by LF": _CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "B57 extension ended by LF": _CHUNKED + b"5;\nhello\r\n0\r\n\r\n",
    "B58 last chunk ended by LF": _CHUNKED + _IN_CHUNK + b"0\r\n\n",
    "B58 last size ended by LF": _CHUNKED + _IN_CHUNK + b"0\n\r\n",
    "B59 64 KiB extension": _CHUNKED + b"%x;%b\r\n%b\r\n0\r\n\r\n" % (len(_JSON), b"x" * 65_536, _JSON),
    "B59 64 KiB extension at the end": _CHUNKED + _IN_CHUNK + b"0;" + b"x" * 65_536 + b"\r\n\r\n",
    "B60 100,000 trailers": _CHUNKED + _IN_CHUNK + b"0\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
    "B61 CR": b"X-Test: canary-val\rue\r\nContent-Length: 2\r\n\r\n{}",
    "B61 NUL": b"X-Test: canary-val\x00ue\r\nContent-Length: 2\r\n\r\n{}",
    "B61 BEL": b"X-Test: canary-\x07\r\nContent-Length: 2\r\n\r\n{}",
    "B61 BS": b"X-Test: canary-\x08\r\nContent-Length: 2\r\n\r\n{}",
    "B61 VT": b"X-Test: canary-\x0b\r\nContent-Length: 2\r\n\r\n{}",
    "B61 LF": b"X-Test: canary-val\nue\r\nContent-Length: 2\r\n\r\n{}",
    "B61 DEL": b"X-Test: canary-\x7f\r\nContent-Length: 2\r\n\r\n{}",
}
_TOO_LARGE: dict[str, bytes] = {
    "B63 URL": chat(body(), path="/" + "x" * 100_000),
    "B63 method": chat(body()).replace(b"POST", b"X" * 100_000, 1),
    "B63 field": chat(body(), headers=(b"X-Test: " + b"x" * 100_000,)),
    "B63 name of a field": chat(body(), headers=(b"X" * 100_000 + b": 1",)),
    "B63 10,000 fields": chat(body(), headers=(b"X-Test: x",) * 10_000),
    "B63 1 MiB of fields": chat(body(), headers=tuple(b"X-%d: " % n + b"x" * 8000 for n in range(125))),
}
_HOSTS: dict[str, bytes] = {
    "B62 two": chat(_JSON).replace(b"Host: x", b"Host: x\r\nHost: y"),
    "B62 twice the same": chat(_JSON).replace(b"Host: x", b"Host: x\r\nHost: x"),
    "B62 list": chat(_JSON).replace(b"Host: x", b"Host: a, b"),
    "B62 none": chat(_JSON).replace(b"Host: x\r\n", b""),
    "B62 user": chat(_JSON).replace(b"Host: x", b"Host: a@b"),
    "B62 path": chat(_JSON).replace(b"Host: x", b"Host: a/b"),
    "B62 another one in the target": chat(_JSON).replace(b"POST /v1", b"POST http://other/v1", 1),
    "B62 another one, and another route": chat(_JSON).replace(b"POST /v1", b"POST http://other/admin/../v1", 1),
}
_PATHS = (
    "/v1/chat/completions%00", "/v1/../admin/keys", "/v1/%2e%2e/admin", "//v1//chat", "/v1\\chat", "/%c0%ae/", "/",
    "/v1/chat/completions/", "/admin", "/%61dmin", "/v1/chat/completions;x", "/V1/chat/completions", "/./metrics",
)  # fmt: skip

CASES: list[Case] = [
    *(bad(name, _HEAD + raw + _SMUGGLED, *([400, 431] if "B59" in name else [400]), closes=True)
      for name, raw in _FRAMING.items()),
    *(bad(name, raw, 400, 414, 431, closes=True) for name, raw in _TOO_LARGE.items()),
    *(bad(name, raw) for name, raw in _HOSTS.items()),
    bad("B64 HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 0, closes=True, half_close=True),
    bad("B64 TLS", _HELLO, 400, 0, closes=True, half_close=True),
    bad("B64 junk", bytes(range(256)) * 4 + b"\r\n\r\n", 400, 0, closes=True, half_close=True),
    bad("B64 NUL and FF", b"\x00\xff" * 50 + b"\r\n\r\n", 400, 0, closes=True, half_close=True),
    bad("B65 a request in the body", chat(b"GET /admin HTTP/1.1\r\nHost: x\r\n\r\n")),
    bad("B65 behind a body that ends early", _HEAD + _CHUNKED + b"0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n", 400),
    *(bad(f"B67 {path}", chat(_JSON, path=path), 404, code="not_found") for path in _PATHS),
    *(bad(f"B68 {method}", chat(_JSON).replace(b"POST", method.encode(), 1), 405, code="method_not_allowed")
      for method in ("TRACE", "PRI", "PUT", "DELETE", "PATCH", "OPTIONS")),
    bad("B68 CONNECT", b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 405, code="method_not_allowed"),
    bad("B68 CONNECT to a path", chat(_JSON).replace(b"POST", b"CONNECT", 1), 405, 400),
]  # fmt: skip


async def test_refused(door: Door) -> None:
    """Each with its status, the connection ended, and nothing behind it taken for a request."""
    async with door.unharmed():
        for case in CASES:
            await door.check(case)


@covers("B51")
async def test_a_leading_zero(door: Door) -> None:
    """RFC 9112 allows it: the same body is read, or none at all."""
    raw = body(model="echo")
    answer = await door.send(chat(raw).replace(b"Content-Length: ", b"Content-Length: 0"))
    if answer.status != 200:
        check_error(answer, {400})
    assert b"HTTP/1.1" not in answer.rest


@covers("B65")
async def test_pipelined_requests_are_answered_in_order(door: Door) -> None:
    """What follows a body that is complete is a request of its own; what stands in a body is none."""
    inner = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    where = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    data = chat(inner) + chat(body(model="echo")) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    writer.write(data.replace(KEY.encode(), door.key.encode()))
    head = await reader.readuntil(b"\r\n\r\n")
    first = await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(first)["error"]["code"] == "invalid_json"
    second = await read_answer(reader, time.monotonic(), quiet=0.5)
    assert second.status == 200
    assert json.loads(second.body)["choices"][0]["message"]["content"] == PROMPT
    assert second.rest.endswith(b'{"status":"ok"}')
    writer.close()


@covers("B66")
async def test_a_body_that_does_not_come(door: Door) -> None:
    """`Expect: 100-continue`, then silence: 400 and closed at CLIENT_BODY_MS; a slow body likewise."""
    head = chat(_JSON, headers=(b"Expect: 100-continue",)).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    slow = chat(_JSON).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    async def silent() -> float:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(head.replace(KEY.encode(), door.key.encode()))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        began = time.monotonic()
        answer = await read_answer(reader, began, quiet=3)
        check_error(answer, {400})
        assert answer.closed
        writer.close()
        return answer.took

    async def trickle() -> float:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(slow.replace(KEY.encode(), door.key.encode()))
        answered = asyncio.create_task(read_answer(reader, time.monotonic(), quiet=3))
        for byte in _JSON:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait([answered], timeout=0.1)
            if done:
                break
        answer = await answered
        check_error(answer, {400})
        assert answer.closed
        writer.close()
        return answer.took

    where = urlsplit(door.url)
    async with door.unharmed():
        times = await asyncio.gather(*(silent() for _ in range(5)), *(trickle() for _ in range(5)))
        assert min(times) >= BODY_MS / 1000 - 0.05
        assert max(times) < BODY_MS / 1000 + 2
