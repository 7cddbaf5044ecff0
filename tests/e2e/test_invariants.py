"""The checker itself: it passes a sound run, and sees each kind of wrong."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.e2e import invariants
from tests.e2e.books import Entry
from tests.e2e.drive import Client, Seen
from tests.e2e.invariants import Asked
from tests.e2e.rig import Up
from tests.e2e.sim import Sim


async def test_a_sound_run(up: Up, sim: Sim, tenant: Callable[..., Any], http: Any) -> None:
    """Whole, streamed, left in the middle, failed upstream: I1 to I9 hold, and everything was looked at."""
    made = await asyncio.to_thread(tenant, "--limit-usd", "1")
    client, before = Client(http, up.url, made["key"]), invariants.baseline(up)
    asked = []
    for number in range(12):
        prompt = invariants.prompt(10 + number, mixed=number % 2)
        asked.append(Asked(prompt=prompt, seen=await client.chat(prompt, stream=bool(number % 3))))
    prompt = invariants.prompt(300, pace=5)
    asked.append(Asked(prompt=prompt, seen=await client.chat(prompt, stream=True, leave_at=2000)))
    prompt = invariants.prompt(30, cut_after=12)
    asked.append(Asked(prompt=prompt, seen=await client.chat(prompt, stream=True), may_fail=True))
    counts = await invariants.check(up, sim, made, asked, before)
    print(invariants.show(counts))
    assert counts["ended well"] == 12
    assert counts["left"] == 1
    assert counts["calls billed"] == counts["calls settled"] + counts["calls settled (estimated)"] == 14
    assert counts["calls settled (estimated)"] == 2
    assert counts["logs searched"] >= 8


ENTRY = Entry("a" * 32, 1, "settled", 1000, 600)
LINE = {"request_id": "a" * 32 + ".1", "cost_nano_usd": 600}
ROW = {"settled": 600, "pending": 0, "unconfirmed": 0, "limit": 600}


def money(*, entry: Entry = ENTRY, dead: bool = False, lines: list[dict[str, Any]] | None = None, **row: Any) -> None:
    """Check one call."""
    invariants.check_money({"a" * 32 + ".1": entry}, [LINE] if lines is None else lines, {**ROW, **row}, dead=dead)


def test_wrong_money_is_seen() -> None:
    money()
    with pytest.raises(AssertionError, match="another amount"):
        money(entry=msgspec.structs.replace(ENTRY, cost=601), settled=601)
    with pytest.raises(AssertionError, match="below the bill"):
        money(entry=msgspec.structs.replace(ENTRY, cost=599, estimated=True))
    with pytest.raises(AssertionError, match="nobody died"):
        money(entry=msgspec.structs.replace(ENTRY, state="unconfirmed", cost=0), settled=0, unconfirmed=1000)
    money(entry=msgspec.structs.replace(ENTRY, state="unconfirmed", cost=0), dead=True, settled=0, unconfirmed=1000,
          limit=None)  # fmt: skip
    with pytest.raises(AssertionError, match="voided, but billed"):
        money(entry=msgspec.structs.replace(ENTRY, state="voided", cost=0), settled=0)
    with pytest.raises(AssertionError, match="past the limit"):
        money(limit=599)
    with pytest.raises(AssertionError, match="same"):
        money(lines=[LINE, LINE])
    with pytest.raises(AssertionError, match="not in the ledger"):
        money(lines=[LINE, {"request_id": "b" * 32 + ".1", "cost_nano_usd": 1}])
    with pytest.raises(AssertionError):
        money(pending=1)


def stream(body: bytes) -> Seen:
    """A streamed 200."""
    return Seen(status=200, headers={"content-type": "text/event-stream"}, body=body)


def chunk(text: str) -> bytes:
    """One event."""
    return b'data: {"id":"x","choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()


def test_wrong_streams_are_seen() -> None:
    prompt = invariants.prompt(3)
    text = invariants.text_of(prompt)
    assert text is not None
    done = b"data: [DONE]\n\n"
    invariants.check_clients([Asked(prompt=prompt, seen=stream(chunk(text) + done))])
    for body, told in (
        (chunk(text), "terminals"),
        (chunk(text) + done + done, "terminals"),
        (chunk(text[:-3]) + done, "silence"),
        (chunk(" other words") + done, "provider's text"),
        (chunk(text) + b'data: {"error":{"message":"x"}}\n\n', "failed"),
    ):
        with pytest.raises(AssertionError, match=told):
            invariants.check_clients([Asked(prompt=prompt, seen=stream(body))])
    with pytest.raises(AssertionError, match="connection ended"):
        invariants.check_clients([Asked(prompt=prompt, seen=Seen(status=200, broken=True))])


def test_too_many_calls_are_seen() -> None:
    with pytest.raises(AssertionError):
        invariants.check_calls([{"request_id": f"{'a' * 32}.{call}"} for call in range(1, 5)])
