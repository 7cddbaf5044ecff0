"""Group D of faults.md, section 2: names that could become a subject, a key or a query (D6, S1-C3b)."""

import asyncio
import json
from typing import Any

import nats
import redis

from shared.state.admin import TENANT_NAME
from tests.e2e.door import REAL_NAMES, Case, Door, bad, body, chat, covers, watching

_NAMES: dict[str, str] = {
    "D85": "gpt 4",
    "D86": "gpt 4 x",
    "D87": "a\r\nPUB admin.reset 0\r\n\r\n",
    "D88": "a\tb",
    "D89": "*",
    "D90": ">",
    "D91": "a.>",
    "D92": "a..b",
    "D93 before": ".a",
    "D93 behind": "a.",
    "D94": "$SYS.REQ.SERVER.PING",
    "D95": "_INBOX.x",
    "D96": "b" * 5000,
    "D97": "gpt-4[a-z]*",
    "D98": "{gpt|claude}",
    "D99": "gpt-4} | @tenant:{*",
    "D100": "a\\} -@x:{y",
    "D101": "*)=>[KNN 10 @v $B]",
    "D102 will": "will",
    "D102 a": "a",
    "D103 tag": "{t1}",
    "D103 key": "acct:{other}",
    "D104 pattern": "res:*",
    "D104 NUL": "\x00",
    "D105 path": "../../etc/passwd",
    "D105 URL": "file:///",
    "D105 drive": "C:\\x",
    "D107 not registered": "anthropic/claude-none",
    "D107 other letters": REAL_NAMES[0].upper(),
    "D107 a space before": " " + REAL_NAMES[0],
    "D107 our own subject": "hotpath.v1.admit",
}
_NO_NAMES = {"a list": ["a", "b"], "an object": {"$ne": ""}, "null": None, "empty": "", "a number": 1}
#: As `user` these are refused: a store reads them as a pattern, or they are no text.
_NO_USERS = ("res:*", "\x00", "u" * 1_048_576, "a\r\nPUB admin.reset 0\r\n\r\n", "a\tb", "*")

CASES: list[Case] = [
    *(bad(name, chat(body(model=value)), 404, code="model_not_found") for name, value in _NAMES.items()),
    *(bad(f"D108 {name}", chat(body(model=value))) for name, value in _NO_NAMES.items()),
    *(bad(f"D104 user {number}", chat(body(user=value))) for number, value in enumerate(_NO_USERS)),
    *(bad(f"D103 as a key {value}", chat(body()).replace(b"@KEY@", value.encode()), 401)
      for value in ("{t1}", "acct:{other}", "*", ">", "br_live_*_x", "br_live_{t1}_" + "x" * 43)),
]  # fmt: skip


async def test_refused(door: Door) -> None:
    """404 `model_not_found` (400 where it is no text): no name becomes part of a subject, a key or a query."""
    async with door.unharmed():
        for case in CASES:
            await door.check(case)


@covers("D85", "D103", "D104")
async def test_as_user_and_metadata(door: Door) -> None:
    """Opaque to us: passed on as they are, and no name in Redis is made of them."""
    with redis.Redis.from_url(door.up.run["redis_url"]) as client:
        before = set(client.scan_iter())
        async with door.unharmed():
            for name in _NAMES.values():
                fields: dict[str, Any] = {"metadata": {"k": name[:500], name[:60]: "v"}}
                if not any(mark in name for mark in "*\r\t\x00"):
                    fields["user"] = name[:512]
                door.echo.received.clear()
                answer = await door.send(chat(body(model="echo", **fields)))
                assert answer.status == 200, (name, answer)
                (asked,) = door.echo.received
                assert asked.body["metadata"] == fields["metadata"]
        known = {name for name in before if b"{" in name}
        strange = [name for name in set(client.scan_iter()) - known for odd in _NAMES.values() if len(odd) > 3
                   and odd.encode() in name]  # fmt: skip
        assert strange == []


def test_as_a_tenant() -> None:
    """What an operator may call a tenant can stand in a log and a metric; its id is our own in any case."""
    allowed = {"will", "a", "a..b", "a.", "hotpath.v1.admit"}
    assert {name for name in _NAMES.values() if TENANT_NAME.fullmatch(name)} == allowed


@covers("D107")
async def test_names_of_real_catalogues(door: Door) -> None:
    """`/`, `:` and `@` are letters like others."""
    for name in REAL_NAMES:
        answer = await door.send(chat(body(model=name)))
        assert answer.status == 200, answer
        assert json.loads(answer.body)["model"] == name


async def test_the_watcher_sees_strange_subjects(door: Door) -> None:
    """The check around every group can fail: a subject of somebody else's is seen and is strange."""
    async with watching(door.up) as watch:
        connection = await nats.connect(door.up.run["nats_url"])
        await connection.publish("admin.reset", b"")
        await connection.flush()
        await connection.close()
        async with asyncio.timeout(2):
            while "admin.reset" not in watch.strange:
                await asyncio.sleep(0.01)
