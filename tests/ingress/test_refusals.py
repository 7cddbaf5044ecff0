"""Every refusal in the OpenAI error shape (S1-H4, R4, G01-G03; faults 2 groups A, B, C)."""

import asyncio
import io
import json
import time
from typing import Any

import aiohttp
import pytest

from tests.ingress.conftest import MakeWorld
from tests.ingress.world import ADMIN, KEY, World

CHAT = "/v1/chat/completions"
BODY = {"model": "sim-fast", "messages": [{"role": "user", "content": "hi"}]}
RAW = json.dumps(BODY).encode()
AUTH = f"Authorization: Bearer {KEY}\r\n".encode()
TYPE = b"Content-Type: application/json\r\n"
HOST = b"Host: gateway\r\n"
CANARY = "canary"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error, its shape checked."""
    body = await answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["X-Request-ID"]
    return dict(body["error"])


async def raw(world: World, *parts: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and body of what comes back for these bytes; the connection must be closed after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        data = await reader.read()
    writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]) if head else 0, head, body


def refused(world: World) -> None:
    """Nothing was handed over, nothing is left."""
    assert world.asks.empty()
    assert world.ingress.in_flight() == 0


# ---- paths, methods, types, sizes


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("TRACE", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_paths_and_methods(
    world: World, http: aiohttp.ClientSession, method: str, path: str, status: int, code: str
) -> None:
    async with http.request(method, world.url + path) as answer:
        assert answer.status == status
        assert (await error_of(answer))["code"] == code
        if code == "method_not_allowed" and method != "TRACE":
            assert "GET" in answer.headers["Allow"] or "POST" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions%00", "/v1/../admin/keys", "/v1/%2e%2e/admin", "//v1//chat", "/v1\\chat", "/%c0%ae/",
     "/v1/../metrics", "/%6detrics", "/./metrics"],
)  # fmt: skip
async def test_67_odd_paths_reach_nothing(world: World, path: str) -> None:
    status, _, body = await raw(
        world, b"GET " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\nAuthorization: Bearer "
        + ADMIN.encode() + b"\r\n\r\n"
    )  # fmt: skip
    assert status == 404
    assert json.loads(body)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": ""},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_46_47_only_plain_json(world: World, http: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    """S1-R4."""
    async with http.post(world.url + CHAT, data=RAW, headers=headers) as answer:
        assert answer.status == 415
        assert (await error_of(answer))["code"] == "unsupported_media_type"
    refused(world)


@pytest.mark.parametrize(
    "given",
    [
        'Application/JSON; charset="UTF-8"',
        "application/json;",
        "application/json; charset=utf-8;",
        "application/json;charset=UTF8",
    ],
)
async def test_json_with_a_charset_is_json(world: World, http: aiohttp.ClientSession, given: str) -> None:
    async with http.post(world.url + CHAT, data=RAW, headers={"Content-Type": given}) as answer:
        assert answer.status == 200


async def test_43_44_a_body_above_the_limit(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """S1-G02. A Content-Length that says so is refused before a byte of the body is read."""
    world = await make_world(MAX_BODY_BYTES="2048")
    body = json.dumps({**BODY, "user": "x" * 400}).encode()
    fits = body + b" " * (2048 - len(body))
    async with http.post(world.url + CHAT, data=fits, headers={"Content-Type": "application/json"}) as answer:
        assert answer.status == 200
    async with http.post(world.url + CHAT, data=fits + b" ", headers={"Content-Type": "application/json"}) as answer:
        assert answer.status == 413
        assert (await error_of(answer))["code"] == "request_too_large"
    begun = time.monotonic()
    status, head, _ = await raw(world, POST + HOST + AUTH + TYPE + b"Content-Length: 10000000000\r\n\r\n")
    assert status == 413
    assert b"Connection: close" in head
    assert time.monotonic() - begun < 3


async def test_45_a_large_body_in_one_byte_chunks(make_world: MakeWorld) -> None:
    """Refused as soon as the chunks are too many, and the loop stays free meanwhile."""
    world = await make_world()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(POST + HOST + AUTH + TYPE + b"Transfer-Encoding: chunked\r\n\r\n")
    flood = b"1\r\nx\r\n" * 4096
    lag = 0.0

    async def measure() -> None:
        nonlocal lag
        while True:
            begun = time.monotonic()
            await asyncio.sleep(0.005)
            lag = max(lag, time.monotonic() - begun - 0.005)

    measuring = asyncio.ensure_future(measure())
    sent = 0
    reading = asyncio.ensure_future(reader.read(4096))
    while not reading.done() and sent < 3_000_000:
        writer.write(flood)
        sent += 4096
        await asyncio.wait((reading,), timeout=0.0001)
    async with asyncio.timeout(20):
        answer = await reading
    measuring.cancel()
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert sent < 200_000
    assert lag < 0.2
    writer.close()


async def test_a_small_chunked_body_is_read(world: World) -> None:
    parts = b"".join(b"1\r\n%c\r\n" % byte for byte in RAW)
    status, _, body = await raw(
        world,
        POST + HOST + AUTH + TYPE + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
        parts + b"0\r\n\r\n",
    )
    assert status == 200, body


async def test_a_body_that_comes_late_is_read(world: World) -> None:
    status, _, _ = await raw(
        world,
        POST + HOST + AUTH + TYPE + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(RAW),
        RAW[:10],
        RAW[10:],
    )
    assert status == 200


async def test_66_expect_100_continue(make_world: MakeWorld) -> None:
    world = await make_world(CLIENT_BODY_MS="500")
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    head = POST + HOST + AUTH + TYPE + b"Content-Length: %d\r\n" % len(RAW)
    writer.write(head + b"Expect: 100-continue\r\n\r\n")
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(RAW)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
    writer.close()
    status, _, body = await raw(world, head + b"Expect: 100-continue\r\n\r\n")
    assert status == 100
    assert b"HTTP/1.1 400 " in body
    status, _, _ = await raw(world, head + b"Expect: a miracle\r\n\r\n")
    assert status == 400


async def test_66_a_final_answer_to_an_expectation(world: World) -> None:
    """RFC 9110 10.1.1: the client need not send the body any more, so what it sends next could be either."""
    head = POST + HOST + TYPE + b"Content-Length: %d\r\nExpect: 100-continue\r\n" % len(RAW)
    status, fields, _ = await raw(world, head + b"Authorization: Bearer wrong\r\n\r\n")
    assert status == 401
    assert b"\r\nConnection: close" in fields


async def test_66_http_1_0_knows_no_expectation(make_world: MakeWorld) -> None:
    world = await make_world(CLIENT_BODY_MS="500")
    head = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + HOST + AUTH + TYPE + b"Content-Length: %d\r\n" % len(RAW)
    status, _, _ = await raw(world, head + b"Expect: 100-continue\r\n\r\n")
    assert status == 400, "no interim answer before the body's time was up"


# ---- framing (Http11Probe)

FRAMING = [
    pytest.param(b"Content-Length: 24\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="48"),
    pytest.param(b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", id="49"),
    pytest.param(b"Content-Length: 5, 6\r\n\r\nhello", id="50"),
    pytest.param(b"Content-Length: -1\r\n\r\n", id="51 minus"),
    pytest.param(b"Content-Length: +5\r\n\r\nhello", id="51 plus"),
    pytest.param(b"Content-Length: 0x5\r\n\r\nhello", id="51 hex"),
    pytest.param(b"Content-Length: 5 5\r\n\r\nhello", id="51 two"),
    pytest.param(b"Content-Length:\r\n\r\n", id="51 empty"),
    pytest.param(b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="52 unknown"),
    pytest.param(b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="52 not last"),
    pytest.param(b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", id="52 VT"),
    pytest.param(b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="53"),
    pytest.param(b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", id="54"),
    pytest.param(b"Transfer-Encoding: chunked\r\n\r\n5\nhello\n0\r\n\r\n", id="56"),
    pytest.param(b"Transfer-Encoding: chunked\r\n\r\n5;\nhello\r\n0\r\n\r\n", id="57"),
    pytest.param(b"Transfer-Encoding: chunked\r\n\r\n0\r\n\n", id="58"),
    pytest.param(b"X-Test: canary\rue\r\n\r\n", id="61 CR"),
    pytest.param(b"X-Test: canary\x00ue\r\n\r\n", id="61 NUL"),
    pytest.param(b"X-Test: \x07\x08\x0b\r\n\r\n", id="61 control"),
    pytest.param(b"Host: other\r\n\r\n", id="62 two"),
    pytest.param(b"X-Request-ID: a\r\nX-Request-ID: b\r\nno colon here\r\n\r\n", id="no colon"),
]


@pytest.mark.parametrize("rest", FRAMING)
async def test_framing_is_refused_in_our_shape(world: World, rest: bytes) -> None:
    status, head, body = await raw(world, POST + HOST + AUTH + TYPE + rest)
    assert status == 400
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert b"X-Request-ID: " in head
    assert b"Connection: close" in head
    for echoed in (b"chunked", b"hello", b"identity", b"other", b"canary"):
        assert echoed not in body
    refused(world)


async def test_a_bad_chunk_half_way_answers_at_once(world: World) -> None:
    """aiohttp tells its parser's error to nobody who waits for the body."""
    begun = time.monotonic()
    status, _, body = await raw(
        world, POST + HOST + AUTH + TYPE + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"zz\r\nhello\r\n"
    )
    assert status == 400
    assert json.loads(body)["error"]["code"] == "invalid_request"
    assert body.count(b'"error"') == 1
    assert time.monotonic() - begun < 4
    refused(world)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(POST + b"\r\n", id="no Host"),
        pytest.param(POST + b"Host: a, b\r\n\r\n", id="Host list"),
        pytest.param(POST + b"Host: a b\r\n\r\n", id="Host with a space"),
        pytest.param(b"POST http://other/v1/chat/completions HTTP/1.1\r\n" + HOST + b"\r\n", id="other host"),
    ],
)
async def test_62_a_host_that_could_be_read_in_two_ways(world: World, head: bytes) -> None:
    assert head.endswith(b"\r\n\r\n")
    head = head[:-2] + b"Connection: close\r\n\r\n"
    status, _, body = await raw(world, head)
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_an_absolute_target_with_the_same_host_is_served(world: World) -> None:
    head = b"GET http://gateway/health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    assert (await raw(world, head))[0] == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431, id="URL"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 100_000 + b"\r\n\r\n", 431, id="header"),
        pytest.param(b"G" * 100_000 + b" / HTTP/1.1\r\n" + HOST + b"\r\n", 431, id="method"),
        pytest.param(b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 10_000 + b"\r\n", 431, id="many headers"),
    ],
)
async def test_63_heads_that_are_too_large(world: World, data: bytes, status: int) -> None:
    got, _, body = await raw(world, data)
    assert got == status
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), id="TLS"),
        pytest.param(b"\x00\xff\x01junk\r\n\r\n", id="junk"),
    ],
)
async def test_64_other_protocols(world: World, data: bytes) -> None:
    status, _, _ = await raw(world, data)
    assert status in {0, 400, 405}


@pytest.mark.parametrize("line", [b"CONNECT \r\n", b"CONNECT \n", b"CONNECT  HTTP/1.1\r\n"])
async def test_68_connect_to_nowhere(world: World, line: bytes) -> None:
    """aiohttp's loop failed on a message without a URL; the connection then stayed open without any timer."""
    status, _, _ = await raw(world, line + HOST + b"\r\n")
    assert status == 405
    upgrade = b"GET /health HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    status, _, rest = await raw(world, upgrade + line + HOST + b"\r\n")
    assert status == 200
    assert b"HTTP/1.1 405 " in rest or b"HTTP/1.0 405 " in rest


async def test_68_connect_and_trace(world: World) -> None:
    for line in (b"CONNECT example.com:443 HTTP/1.1\r\n", b"TRACE /v1/models HTTP/1.1\r\n"):
        status, _, body = await raw(world, line + HOST + b"\r\n")
        assert status == 405
        assert json.loads(body)["error"]["code"] == "method_not_allowed"


async def test_65_a_smuggled_second_request_reaches_no_handler(world: World) -> None:
    """The second request line stands inside the first one's body."""
    inner = b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n"
    status, _, body = await raw(
        world, POST + HOST + AUTH + TYPE + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(inner), inner)
    )
    assert status == 400
    assert body.count(b"HTTP/1.1") == 0


async def test_no_refusal_writes_the_input_to_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    await raw(world, POST + HOST + b"Authorization: Bearer canary\x00canary\r\n\r\n")
    await raw(world, b"canary\r\n\r\n")
    assert "canary" not in caplog.text


# ---- who asks


@pytest.mark.parametrize(
    "value",
    [
        None,
        "Bearer",
        "Bearer ",
        "Basic x",
        "bearer",
        f"Basic {KEY}",
        KEY,
        "Bearer ' OR '1'='1",
        f"Bearer {KEY[:20]}junk",
    ],
)
async def test_69_70_73_no_key_no_answer(world: World, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    async with aiohttp.ClientSession() as http, http.post(world.url + CHAT, json=BODY, headers=headers) as answer:
        assert answer.status == 401
        error = await error_of(answer)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    refused(world)


async def test_71_two_authorization_headers(world: World) -> None:
    status, _, _ = await raw(
        world, POST + HOST + AUTH + AUTH + TYPE + b"Connection: close\r\nContent-Length: 0\r\n\r\n"
    )
    assert status == 400


async def test_72_74_odd_keys(world: World) -> None:
    head = POST + HOST + TYPE + b"Connection: close\r\nContent-Length: 0\r\n"
    assert (await raw(world, head + b"Authorization: Bearer " + b"k" * 1_000_000 + b"\r\n\r\n"))[0] == 431
    assert (await raw(world, head + b"Authorization: Bearer \xff\xfe\r\n\r\n"))[0] == 401


async def test_an_unknown_key_while_the_registry_is_not_fresh(world: World, http: aiohttp.ClientSession) -> None:
    """DESIGN 5: known keys from the replica; unknown keys 503, not 401."""
    world.registry.fresh = False
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200
    for away in (False, True):
        world.registry.away = away
        headers = {"Authorization": "Bearer unknown"}
        async with http.post(world.url + CHAT, json=BODY, headers=headers) as answer:
            assert answer.status == 503
            assert (await error_of(answer))["code"] == "registry_unavailable"
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.headers["retry-after-ms"] == "1000"


async def test_auth_failures_are_told_to_the_siem_without_the_key(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """S1-R3; a flood costs a bounded number of lines."""
    headers = {"Authorization": "Bearer canary-key", "X-Forwarded-For": "10.0.0.9", "X-Request-ID": "who"}
    async with aiohttp.ClientSession() as http:
        for _ in range(40):
            async with http.post(world.url + CHAT, json=BODY, headers=headers) as answer:
                assert answer.status == 401
    lines = [vars(record) for record in caplog.records if record.getMessage() == "auth_failure"]
    assert 1 <= len(lines) <= 20
    assert lines[0]["security"] is True
    assert (lines[0]["event"], lines[0]["ip"], lines[0]["requestId"]) == ("auth_failure", "127.0.0.1", "who")
    assert lines[0]["forwarded"] == "'10.0.0.9'"
    assert "canary" not in repr(lines)
    assert world.ingress._events.counts["auth_failure"] == 40


async def test_unusual_model_names_are_told_to_the_siem(
    world: World, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """S1-R3, S1-C3b: what is no name at all, quoted and cut; a model that is merely not here is a typing error."""
    for name in ("gpt-none", "ft:gpt-4o:org::id", "a\r\nPUB admin 0", "$SYS.>", "x y" * 60):
        async with http.post(world.url + CHAT, json={**BODY, "model": name}) as answer:
            assert answer.status == 404
    lines = [vars(record) for record in caplog.records if record.getMessage() == "unusual_model"]
    assert [line["model"] for line in lines] == ["'a?PUB admin 0'", "'$SYS.>'", f"'{('x y' * 60)[:64]}...'"]
    assert {(line["security"], line["tenant"], line["ip"]) for line in lines} == {(True, "default", "127.0.0.1")}


# ---- ids, timeouts, forms, bodies


@pytest.mark.parametrize("label", ["x" * 65, "x" * 8000, "../../x", "<script>", "%0d%0a", "a b", "\u2603", ""])
async def test_78_a_request_id_that_is_none_is_replaced(world: World, http: aiohttp.ClientSession, label: str) -> None:
    async with http.post(world.url + CHAT, json=BODY, headers={"X-Request-ID": label}) as answer:
        assert answer.status == 200
        assert answer.headers["X-Request-ID"] == answer.headers["X-BR-Request-Id"]


async def test_two_request_ids_are_none(world: World) -> None:
    _, head, _ = await raw(
        world, b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\nX-Request-ID: a\r\nX-Request-ID: b\r\n\r\n"
    )
    assert b"X-Request-ID: a\r\n" not in head
    assert b"X-Request-ID: b\r\n" not in head


@pytest.mark.parametrize(("given", "expected"), [("0", 100), ("1", 100), ("5000", 5000), ("999999999999", 600_000)])
async def test_81_x_timeout_ms_is_clamped(world: World, http: aiohttp.ClientSession, given: str, expected: int) -> None:
    """S1-G03."""
    async with http.post(world.url + CHAT, json=BODY, headers={"X-Timeout-Ms": given}) as answer:
        assert answer.status == 200
    assert (await world.ask()).timeout_ms == expected


@pytest.mark.parametrize("given", ["-1", "1e12", "abc", "", "1.5", " ", "9" * 13])
async def test_81_x_timeout_ms_that_is_no_number(world: World, http: aiohttp.ClientSession, given: str) -> None:
    async with http.post(world.url + CHAT, json=BODY, headers={"X-Timeout-Ms": given}) as answer:
        assert answer.status == 400
    refused(world)


async def test_an_unknown_done_form(world: World, http: aiohttp.ClientSession) -> None:
    async with http.post(world.url + CHAT, json=BODY, headers={"X-BR-Done-Payload": "Inline"}) as answer:
        assert answer.status == 400


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"[]", 400, "invalid_request"),
        (b'{"model":"m","messages":[],}', 400, "invalid_json"),
        (b'{"messages":[{"role":"user","content":"x"}]}', 400, "missing_model"),
        (b'{"model":"*","messages":[{"role":"user","content":"x"}]}', 404, "model_not_found"),
        (b'{"model":"SIM-FAST","messages":[{"role":"user","content":"x"}]}', 404, "model_not_found"),
    ],
)
async def test_bodies(world: World, http: aiohttp.ClientSession, body: bytes, status: int, code: str) -> None:
    """S1-H4b, H4c, D6; the parse itself is tested in tests/wire."""
    headers = {"Content-Type": "application/json"}
    async with http.post(world.url + CHAT, data=body, headers=headers) as answer:
        assert answer.status == status
        assert (await error_of(answer))["code"] == code
    refused(world)


async def test_a_request_larger_than_the_bus_takes(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """faults 40: 413, and the connection to the bus stays."""
    world = await make_world(MAX_BODY_BYTES="4194304")
    body = {**BODY, "messages": [{"role": "user", "content": "x" * 2_200_000}]}
    data = io.BytesIO(json.dumps(body).encode())
    async with http.post(world.url + CHAT, data=data, headers={"Content-Type": "application/json"}) as answer:
        assert answer.status == 413
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200


# ---- bounds


async def test_the_connection_bound(make_world: MakeWorld) -> None:
    world = await make_world(MAX_CONNECTIONS="2")
    held = [await asyncio.open_connection("127.0.0.1", world.ingress.port) for _ in range(2)]
    head = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    for reader, writer in held:
        writer.write(head)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    status, _, body = await raw(world)
    assert status == 503
    assert json.loads(body)["error"]["code"] == "overloaded"
    for _, writer in held:
        writer.close()


async def test_60_a_head_that_does_not_come_is_cut(make_world: MakeWorld) -> None:
    world = await make_world(CLIENT_HEAD_MS="50")
    for begin in (b"", b"GET /hea"):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
        writer.write(begin)
        async with asyncio.timeout(3):
            assert await reader.read() == b""
        writer.close()
    # on a kept-alive connection the timer runs only from the first byte of a head
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
    await reader.readuntil(b'{"status":"ok"}')
    await asyncio.sleep(0.15)
    writer.write(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
    await reader.readuntil(b'{"status":"ok"}')
    writer.write(b"GET /heal")
    async with asyncio.timeout(3):
        assert await reader.read() == b""
    writer.close()


async def test_a_handler_that_fails_is_a_500_in_our_shape(
    world: World, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(visit: object) -> Any:
        raise ValueError(CANARY)

    assert world.ingress._door is not None
    world.ingress._door.add("GET", "/broken", broken)
    async with http.get(world.url + "/broken") as answer:
        assert answer.status == 500
        assert (await error_of(answer))["code"] == "internal_error"
    assert "canary" not in caplog.text
    assert "ValueError" in caplog.text
