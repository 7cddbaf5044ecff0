"""Group C of faults.md, section 2: headers, auth, ids (S1-C1d, S1-R3, S1-G03, D7)."""

import json

from tests.e2e.door import LABEL, PROMPT, Case, Door, bad, body, chat, check_error, covers

_LINE = b"Authorization: Bearer @KEY@"


def _with(line: bytes) -> bytes:
    """A valid request with another Authorization line."""
    return chat(body()).replace(_LINE, line)


def _key(name: str, line: bytes) -> Case:
    return bad(name, _with(line), 401, code="invalid_api_key")


#: Proxies and SDKs put these there; what is no label is replaced by our own id (S1-H1a).
LABELS = (
    b"x" * 10_240,
    b"x" * 65,
    b"../../x",
    b"<script>",
    b"%0d%0a",
    "\U0001f600".encode(),
    b"a b",
    b"",
    b"canary-\xff",
)

CASES: list[Case] = [
    _key("C69 no Authorization", b"X-None: 1"),
    _key("C70 scheme alone", b"Authorization: Bearer"),
    _key("C70 scheme and a space", b"Authorization: Bearer "),
    _key("C70 Basic", b"Authorization: Basic eDp5"),
    _key("C70 the key without a scheme", b"Authorization: @KEY@"),
    bad("C71 two", _with(b"Authorization: Bearer canary-x\r\n" + _LINE), 400),
    bad("C71 twice the same", _with(_LINE + b"\r\n" + _LINE), 400),
    bad("C72 1 MB", _with(b"Authorization: Bearer canary-" + b"k" * 1_000_000), 431, closes=True),
    _key("C73 SQL", b"Authorization: Bearer ' OR '1'='1"),
    _key("C74 FF", b"Authorization: Bearer canary-\xff"),
    _key("C74 UTF-8", "Authorization: Bearer canary-\u00e9\u2028".encode()),
    _key("C74 overlong", b"Authorization: Bearer canary-\xc0\x80"),
    _key("C76 one more character", _LINE + b"x"),
    _key("C76 the admin's key", b"Authorization: Bearer canary-admin-0123456789abcdef0123456789ab"),
    bad("C77 CR", chat(body(), headers=(b"X-Request-ID: a\rX-Admin: 1",)), closes=True),
    bad("C77 LF", chat(body(), headers=(b"X-Request-ID: a\nX-Admin: 1",)), closes=True),
    bad("C77 folded", chat(body(), headers=(b"X-Request-ID: a\r\n X-Admin: 1",)), closes=True),
    *(bad(f"C81 {given.decode()}", chat(body(), headers=(b"X-Timeout-Ms: " + given,)), 400)
      for given in (b"-1", b"1e12", b"abc", b"NaN", b"", b"1.5", b"9" * 21, b"0x10", b"+5")),
]  # fmt: skip


async def test_refused(door: Door) -> None:
    """Each with its status."""
    async with door.unharmed():
        for case in CASES:
            await door.check(case)


@covers("C76")
async def test_wrong_keys_are_all_alike(door: Door) -> None:
    """No answer tells how much of a key was right (its timing: `python -m tests.bench.key_timing`)."""
    key: str = door.key
    half = key[:20]
    told = set()
    for wrong in (half + "junk", key[:-1], key + "x", half + "A" * (len(key) - 20), "canary-none", key.upper()):
        answer = await door.send(_with(b"Authorization: Bearer " + wrong.encode()))
        check_error(answer, {401})
        told.add((answer.body, tuple(sorted(answer.headers))))
    assert len(told) == 1


@covers("C78")
async def test_a_label_that_is_none_is_replaced(door: Door) -> None:
    """Ignored, never refused, and echoed only when it is one."""
    for label in LABELS:
        answer = await door.send(chat(body(model="echo"), headers=(b"X-Request-ID: " + label,)))
        assert answer.status == 200, (label[:20], answer)
        assert LABEL.match(answer.headers["x-request-id"])
        assert answer.headers["x-request-id"] == answer.headers["x-br-request-id"]
    answer = await door.send(chat(body(model="echo"), headers=(b"X-Request-ID: My_label-1.2",)))
    assert answer.headers["x-request-id"] == "My_label-1.2"


@covers("C77")
async def test_a_second_header_line_gives_nothing(door: Door) -> None:
    """CRLF as it stands is two fields: the second one means nothing here and is not echoed."""
    answer = await door.send(chat(body(model="echo"), headers=(b"X-Request-ID: a\r\nX-Admin: canary-1",)))
    assert (answer.status, answer.headers["x-request-id"]) == (200, "a")
    assert "x-admin" not in answer.headers


@covers("C81", "C83")
async def test_headers_that_are_clamped_or_ignored(door: Door) -> None:
    """X-Timeout-Ms is clamped to its bounds; Last-Event-ID and Range change nothing."""
    for line in (b"X-Timeout-Ms: 999999999999", b"Last-Event-ID: 7", b"Range: bytes=0-1", b"If-None-Match: *"):
        answer = await door.send(chat(body(model="echo"), headers=(line,)))
        assert answer.status == 200, line
        assert json.loads(answer.body)["choices"][0]["message"]["content"] == PROMPT
    answer = await door.send(chat(body(model="echo"), headers=(b"X-Timeout-Ms: 0",)))
    assert answer.status in {200, 504}  # 0 is raised to TIMEOUT_MIN_MS
