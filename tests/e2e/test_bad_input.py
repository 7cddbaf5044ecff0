"""Bad input over raw sockets through the real processes (faults.md, section 2, groups A to E).

The common rule is checked for every case: an error in OpenAI's shape with an X-Request-ID (or the connection closed,
where the framing itself is broken), no upstream call, no reservation, every other stream unharmed, and no subject on
NATS that was not there before.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest

from tests.e2e.books import level
from tests.e2e.drive import Client
from tests.e2e.raw import Answer, exchange, post
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

#: Every subject this system uses, instance ids aside (shared/wire/subjects.py is not asked: it could be wrong too).
KNOWN = re.compile(
    r"hotpath\.v1\.(admit|outcome|notice\.(registry|circuit)|(guardian|routing|provider)\.[a-z0-9]+"
    r"|reply\.ingress\.[a-z0-9]+|control\.[a-z0-9]+|beat\.(ingress|guardian|routing|provider)\.[a-z0-9]+"
    r"|inbox\.[a-z0-9]+(-alive)?\.[a-z0-9]+)\Z"
)


class Watch:
    """Every subject NATS carries, as the operator sees them."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @property
    def strange(self) -> set[str]:
        """Those that are none of ours."""
        return {subject for subject in self.seen if not KNOWN.match(subject) and not subject.startswith("$")}


@pytest.fixture
async def watch(up: Up) -> AsyncIterator[Watch]:
    """A subscription to `>` with the operator's user."""
    found = Watch()
    connection = await nats.connect(up.run["nats_url"])

    async def note(message: Any) -> None:
        found.seen.add(message.subject)

    await connection.subscribe(">", cb=note)
    await connection.flush()
    yield found
    await connection.close()


def body(**fields: Any) -> bytes:
    """A valid request with these fields set."""
    asked = {"model": "sim-fast", "messages": [{"role": "user", "content": "x"}], **fields}
    return json.dumps(asked).encode()


def content(raw: bytes) -> bytes:
    """A valid request whose message is these raw bytes."""
    return b'{"model":"sim-fast","messages":[{"role":"user","content":"' + raw + b'"}]}'


def field(raw: bytes) -> bytes:
    """A valid request with one more raw member."""
    return b'{"model":"sim-fast","messages":[{"role":"user","content":"x"}],' + raw + b"}"


def check_error(answer: Answer, statuses: set[int]) -> None:
    """OpenAI's shape, with a request id, and one of the statuses."""
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["message"]
    assert answer.headers["content-type"].startswith("application/json")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])


async def check_nothing_happened(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """No upstream call, no reservation, no strange subject, and the next request is served."""
    assert (await asyncio.to_thread(sim.stats))["calls"] == 0
    assert (await asyncio.to_thread(level, up, "default"))["pending"] == 0
    assert watch.seen, "the watcher saw nothing at all"
    assert watch.strange == set()
    assert (await client.chat("[[sim chunks=2]]")).ended_well


# ---- A: the JSON body ------------------------------------------------------------------------------------------------

JSON_CASES: dict[str, bytes] = {
    "1 empty": b"",
    "2 null": b"null",
    "3 array": b"[]",
    "4 string": b'"x"',
    "5 number": b"1",
    "6 trailing comma": b'{"model":"sim-fast","messages":[],}',
    "7 single quotes": b"{'model':'sim-fast'}",
    "9 comment": body() + b"/**/",
    "10 NaN": field(b'"temperature":NaN'),
    "11 Infinity": field(b'"temperature":Infinity'),
    "12 -Infinity": field(b'"temperature":-Infinity'),
    "13 1e400": field(b'"temperature":1e400'),
    "14 huge integer": field(b'"max_tokens":99999999999999999999999999'),
    "16 duplicate key": b'{"model":"sim-free","model":"sim-fast","messages":[{"role":"user","content":"x"}]}',
    "18 lone surrogate": content(rb"\ud800"),
    "19 surrogate in UTF-8": content(b"\xed\xa0\x80"),
    "20 overlong": content(b"\xc0\xaf"),
    "21 truncated UTF-8": content(b"\xe5"),
    "22 above U+10FFFF": content(b"\xf4\x90\x80\x80"),
    "23 BOM": b"\xef\xbb\xbf" + body(),
    "24 UTF-16": b"\xff\xfe" + body().decode().encode("utf-16-le"),
    "25 raw NUL": content(b"\x00"),
    "27 raw LF": content(b"a\nb"),
    "29 deep": field(b'"metadata":' + b"[" * 500 + b"]" * 500),
    "30 deeper": b"[" * 100_000,
    "31 objects": b'[{"":' * 50_000,
    "32 million items": field(b'"stop":[' + b"1," * 500_000 + b"1]"),
    "33 keys": field(b'"metadata":{' + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}"),
    "36 true for a number": body(max_tokens=True),
    "38 text for a number": body(max_tokens="10"),
    "39 -1": body(max_tokens=-1),
    "39 0": body(max_tokens=0),
    "42 text for a boolean": body(stream="true"),
    "104 long user": body(user="u" * 900_000),
    "108 model a list": body(model=["a", "b"]),
    "108 model an object": body(model={"$ne": ""}),
    "108 model null": body(model=None),
    "108 model empty": body(model=""),
    "114 metadata of 1 MB": body(metadata={"a": "x" * 900_000}),
}


async def test_json_bodies(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Group A (and 104, 108, 114): 400 each, within 100 ms."""
    loop, key = asyncio.get_running_loop(), up.run["api_key"]
    slow = []
    for name, raw in JSON_CASES.items():
        began = loop.time()
        answer = await exchange(up.url, post(key, raw))
        took = loop.time() - began
        try:
            check_error(answer, {400})
        except AssertionError as error:
            raise AssertionError(name) from error
        if took > 0.1:
            slow.append((name, took))
    assert len(slow) <= 1, slow  # one hiccup of a shared machine
    await check_nothing_happened(up, sim, watch, client)


async def test_accepted_oddities(up: Up, sim: Sim, client: Client) -> None:
    """Cases 17, 26, 28, 35, 109 and 153: odd, legal, and harmless."""
    key = up.run["api_key"]
    for raw in (
        field(b'"Model":"gpt-4o"'),
        content(rb"\u0000"),
        content("a\u2028b\u2029c\u0085".encode()),
        field(b'"__proto__":{"admin":true}'),
        content(rb"data: [DONE]\n\n</s><|im_start|>"),
        body(api_base="http://169.254.169.254/", base_url="http://x", api_key="sk-x", extra_headers={"A": "b"}),
    ):
        answer = await exchange(up.url, post(key, raw))
        assert answer.status == 200, (raw[:100], answer.body)
        assert json.loads(answer.body)["model"] == "sim-fast"
        stream = raw[:-1] + b',"stream":true}'
        seen = await client.chat("x", **json.loads(stream))
        assert seen.ended_well
        assert seen.terminals == 1
    assert (await asyncio.to_thread(sim.stats))["calls"] == 12


async def test_sizes_and_types(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Cases 43, 44, 46, 47: 413 and 415 before anything is read that need not be."""
    key = up.run["api_key"]
    check_error(await exchange(up.url, post(key, body(user="x" * (1 << 20)))), {413})
    announced = post(key, b"").replace(b"Content-Length: 0", b"Content-Length: 10000000000")
    check_error(await exchange(up.url, announced, within=1), {413})
    chunked = post(key, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    flood = chunked + b"".join(b"10000\r\n" + b" " * 65536 + b"\r\n" for _ in range(17))
    check_error(await exchange(up.url, flood), {413})
    check_error(await exchange(up.url, post(key, body(), headers=(b"Content-Encoding: gzip",))), {415})
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/jsonx"):
        check_error(await exchange(up.url, post(key, body(), kind=kind)), {415})
    missing = post(key, body()).replace(b"Content-Type: application/json\r\n", b"")
    check_error(await exchange(up.url, missing), {415})
    await check_nothing_happened(up, sim, watch, client)


# ---- B: framing ------------------------------------------------------------------------------------------------------

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"
)

FRAMING: dict[str, bytes] = {
    "48 both lengths": b"Content-Length: 24\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "49 two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "50 list of lengths": b"Content-Length: 5, 6\r\n\r\nhello!",
    "51 -1": b"Content-Length: -1\r\n\r\n",
    "51 +5": b"Content-Length: +5\r\n\r\nhello",
    "51 0x5": b"Content-Length: 0x5\r\n\r\nhello",
    "51 5 5": b"Content-Length: 5 5\r\n\r\nhello",
    "52 xchunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "52 vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "53 space before colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "54 folded": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "50 empty": b"Content-Length: \r\n\r\n",
    "52 chunked, identity": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "56 chunk ended by LF": b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\n0\r\n\r\n",
    "57 extension ended by LF": b"Transfer-Encoding: chunked\r\n\r\n5;\nhello\r\n0\r\n\r\n",
    "58 last chunk ended by LF": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\n",
    "60 trailers": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
    "59 chunk extension": b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 70_000 + b"\r\n{}\r\n0\r\n\r\n",
    "61 CR in a value": b"X-Test: val\rue\r\nContent-Length: 2\r\n\r\n{}",
    "61 NUL in a value": b"X-Test: val\x00ue\r\nContent-Length: 2\r\n\r\n{}",
    "63 long header": b"X-Test: " + b"x" * 100_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    "63 many headers": b"X-Test: x\r\n" * 10_000 + b"Content-Length: 2\r\n\r\n{}",
}


async def test_framing(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Group B: 400 or 431 and the connection closed; nothing behind it is taken for a request."""
    head = HEAD % up.run["api_key"].encode()
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    for name, raw in FRAMING.items():
        answer = await exchange(up.url, head + raw + smuggled)
        try:
            assert answer.status in {0, 400, 413, 431}, answer
            if answer.status:
                check_error(answer, {400, 413, 431})
                assert b"HTTP/1.1 200" not in answer.rest
        except AssertionError as error:
            raise AssertionError(name) from error
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    for junk in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", hello, b"\x00\xff" * 50):
        answer = await exchange(up.url, junk + b"\r\n\r\n", half_close=True)
        assert answer.status in {0, 400, 405}, (junk, answer)
    await check_nothing_happened(up, sim, watch, client)


async def test_hosts(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Case 62: two Hosts, a list, none, or another one in the target: 400, and never another route."""
    whole = post(up.run["api_key"], body())
    for changed in (
        whole.replace(b"Host: x", b"Host: x\r\nHost: y"),
        whole.replace(b"Host: x\r\n", b""),
        whole.replace(b"Host: x", b"Host: a, b"),
        whole.replace(b"POST /v1", b"POST http://other/admin/../v1", 1),
    ):
        check_error(await exchange(up.url, changed), {400, 404})
    for line in (b"POST /" + b"x" * 100_000, b"X" * 100_000 + b" /v1/chat/completions"):
        answer = await exchange(up.url, line + whole[whole.index(b" HTTP/1.1") :])
        assert answer.status in {0, 400, 414, 431}
    await check_nothing_happened(up, sim, watch, client)


async def test_slow_heads(up: Up, client: Client) -> None:
    """Case 60: a head that does not end is closed at a timer (10 s); others go on."""
    halves = [b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n", b"P", b""]
    reads = [asyncio.create_task(exchange(up.url, half, within=20)) for half in halves for _ in range(10)]
    while not all(task.done() for task in reads):
        assert (await client.chat("[[sim chunks=1]]")).took < 1
        await asyncio.sleep(0.5)
    for task in reads:
        assert task.result().status in {0, 400, 408}


async def test_paths_and_methods(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Cases 65, 67 and 68: 404 and 405 in OpenAI's shape, never something else's handler."""
    key = up.run["api_key"]
    for path in (
        "/v1/chat/completions%00", "/v1/../admin/keys", "/v1/%2e%2e/admin", "//v1//chat", "/v1\\chat", "/%c0%ae/", "/",
        "/v1/chat/completions/", "/admin",
    ):  # fmt: skip
        check_error(await exchange(up.url, post(key, body(), path=path)), {400, 404})
    for method in ("TRACE", "PUT", "DELETE", "PATCH"):
        check_error(await exchange(up.url, post(key, body()).replace(b"POST", method.encode(), 1)), {405})
    inner = b"GET /admin HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await exchange(up.url, post(key, inner))
    check_error(answer, {400})
    assert b"HTTP/1.1" not in answer.rest
    await check_nothing_happened(up, sim, watch, client)


# ---- C: auth and ids -------------------------------------------------------------------------------------------------


async def test_authorization(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Cases 69 to 76: 401, or 400 and 431 where the header itself is wrong; never 500, never a hint."""
    ours: str = up.run["api_key"]
    plain = post("KEY", body())
    line = b"Authorization: Bearer KEY"
    cases: dict[bytes, set[int]] = {
        b"X-None: 1": {401},
        b"Authorization: Bearer": {401},
        b"Authorization: Bearer ": {401},
        b"Authorization: Basic eDp5": {401},
        b"Authorization: Bearer ' OR '1'='1": {401},
        b"Authorization: Bearer \xff\xfe": {400, 401},
        b"Authorization: Bearer " + ours[:20].encode() + b"junk": {401},
        b"Authorization: Bearer " + ours.encode() + b"x": {401},
        b"Authorization: Bearer " + ours[:-1].encode(): {401},
        b"Authorization: Bearer x\r\nAuthorization: Bearer " + ours.encode(): {400, 401},
        b"Authorization: Bearer " + b"k" * 1_000_000: {400, 401, 431},
    }
    messages = set()
    for header, statuses in cases.items():
        answer = await exchange(up.url, plain.replace(line, header))
        try:
            check_error(answer, statuses)
        except AssertionError as error:
            raise AssertionError(header[:60]) from error
        if answer.status == 401:
            messages.add(answer.error["message"])
    assert len(messages) == 1, "the message tells one wrong key from another"
    await check_nothing_happened(up, sim, watch, client)


async def test_ids_and_timeouts(up: Up, sim: Sim) -> None:
    """Cases 78 and 81: a label that is none is replaced; a timeout that is none is refused or clamped."""
    key = up.run["api_key"]
    for label in (b"x" * 10_000, b"../../x", b"<script>", b"%0d%0a", "\U0001f600".encode(), b"a b", b""):
        answer = await exchange(up.url, post(key, body(), headers=(b"X-Request-ID: " + label,)))
        if len(label) > 8000 and answer.status != 200:
            check_error(answer, {400, 431})
            continue
        assert answer.status == 200
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    for timeout in (b"0", b"-1", b"1e12", b"abc", b"999999999999999999999", b"NaN"):
        answer = await exchange(up.url, post(key, body(), headers=(b"X-Timeout-Ms: " + timeout,)))
        if answer.status != 200:
            check_error(answer, {400})


# ---- D and E: names and destinations ---------------------------------------------------------------------------------

NAMES = [
    "gpt 4", "gpt 4 x", "a\r\nPUB admin.reset 0\r\n\r\n", "a\tb", "*", ">", "a.>", "a..b", ".a", "a.",
    "$SYS.REQ.SERVER.PING", "_INBOX.x", "b" * 5000, "gpt-4[a-z]*", "{gpt|claude}", "gpt-4} | @tenant:{*", "a\\} -@x:{y",
    "*)=>[KNN 10 @v $B]", "will", "a", "{t1}", "../../etc/passwd", "file:///", "C:\\x", "anthropic/claude-none",
    "hotpath.v1.admit", "SIM-FAST", " sim-fast",
]  # fmt: skip


async def test_names(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Group D: 404 `model_not_found` (or 400); NATS carries no new subject and keeps its connections."""
    key = up.run["api_key"]
    for name in NAMES:
        answer = await exchange(up.url, post(key, body(model=name)))
        check_error(answer, {400, 404})
        if answer.status == 404:
            assert answer.error["code"] == "model_not_found"
    for name in NAMES:
        label = b"X-Request-ID: " + name.replace("\r\n", " ").encode()
        odd = body(model="none", user=name[:60], metadata={"k": name[:500]})
        check_error(await exchange(up.url, post(key, odd, headers=(label,))), {400, 404, 431})
    await check_nothing_happened(up, sim, watch, client)


async def test_the_watcher_sees_strange_subjects(up: Up, watch: Watch) -> None:
    """The check above can fail: a subject of somebody else's is seen and is strange."""
    connection = await nats.connect(up.run["nats_url"])
    await connection.publish("admin.reset", b"")
    await connection.flush()
    await connection.close()
    async with asyncio.timeout(2):
        while "admin.reset" not in watch.strange:
            await asyncio.sleep(0.01)


async def test_tiny_chunks(up: Up, sim: Sim, watch: Watch, client: Client) -> None:
    """Case 45: a body in 1-byte chunks is refused in the end, and costs the others little meanwhile."""
    head = post(up.run["api_key"], b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    flood = asyncio.create_task(exchange(up.url, head + b"1\r\n \r\n" * 1_100_000 + b"0\r\n\r\n", within=30))
    took = []
    while not flood.done():
        took.append(await client.chat("[[sim chunks=1]]"))
        await asyncio.sleep(0.01)
    answer = await flood
    assert answer.status in {0, 400, 413}
    assert all(seen.ended_well for seen in took)
    assert max(seen.took for seen in took) < 0.25
    sim.reset()
    await check_nothing_happened(up, sim, watch, client)


async def test_other_streams_are_unharmed(up: Up, sim: Sim, client: Client) -> None:
    """I10: while all of group A arrives, paced streams lose nothing."""
    streams = [asyncio.create_task(client.chat("[[sim chunks=100 pace=10 seed=2]]", stream=True)) for _ in range(8)]
    await asyncio.to_thread(sim.wait, 3000, calls=8)
    key = up.run["api_key"]
    await asyncio.gather(*(exchange(up.url, post(key, raw)) for raw in JSON_CASES.values() if len(raw) < 300_000))
    seen = await asyncio.gather(*streams)
    assert all(one.ended_well for one in seen)
    assert len({one.text for one in seen}) == 1
